"""Ways to damage a valid file. The same ``random.Random`` damages it in the same way."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**9), 0.5, -0.0,
    1e308, 1e-320, float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "é日本",
    "x" * 5000, "1", "true", "null",
    "../x", "/etc/passwd", "~", "C:\\x", "</s>", "<image>", "<im_patch>", "a" * 300 + "/b", "(a+)+$", "(x|x)*y", "[",
    "*", "%s", "{{ x }}", "float16", "cuda", "\x1b[31mred", [], {}, [[]], [None], [0], ["x"], [1, 2], {"": None},
    {"x": {}}, [[1, 2], [3]], [1e9] * 5, {"type": "x"},
)  # fmt: skip
"""Values where another one is expected."""
SIZES = (0, 1, -1, 2, 3, 1000, 10**5, 10**6, 10**7, 10**9, 2**31 - 1, 2**63, 10**30)
KEYS = (
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "rope_scaling",
    "rope_parameters", "rope_theta", "layer_types", "num_hidden_layers", "vocab_size", "head_dim", "hidden_act",
    "image_size", "patch_size", "num_channels", "vision_feature_layer", "image_seq_length", "tie_word_embeddings",
    "text_config", "vision_config", "id2label", "num_labels", "label2id", "attn_implementation", "_name_or_path",
    "pruned_heads", "sep_token", "pad_token", "extra_special_tokens", "additional_special_tokens",
    "added_tokens_decoder",
    "model_max_length", "chat_template", "tokenizer_class", "processor_class", "backend", "size",
    "crop_size", "resample",
    "image_mean", "image_std", "do_resize", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices", "use_dora", "use_rslora",
    "lora_bias", "use_qalora", "fan_in_fan_out", "megatron_config", "layer_replication", "target_parameters",
    "loftq_config", "eva_config", "corda_config", "lora_dropout", "bias", "init_lora_weights", "inference_mode",
    "task_type", "revision", "peft_type", "runtime_config", "alora_invocation_tokens", "ensure_weight_tying",
    "lora_alpha",
    "r", "__metadata__", "metadata", "weight_map", "format", "id", "image", "conversations", "from", "value", "images",
    "messages", "role", "content", "type", "text", "image_url", "url", "bytes", "path", "tool_calls",
)  # fmt: skip
_STARTS = (
    b"", b"null", b"[]", b"{}", b"0", b'""', b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff\x00{",
    b"version https://git-lfs.github.com/spec/v1\noid x\nsize 1\n", b"<!DOCTYPE html><html></html>",
    b"PK\x03\x04", b"\x80\x02}q\x00.",
    b"%PDF-1.4", b"\0" * 64, b"GGUF\x03\0\0\0", b"[" * 3000, b'{"a":' * 3000, b"[" * 200000,
)  # fmt: skip
_TOKENS = (
    b"\0", b"\xff", b'"', b"{", b"[", b"}", b"]", b":", b",", b"\\", b"\\ud800", b"\\u0000", b"1e999", b"-", b"\n",
    b"\r", b"\xe2\x80\xa8", b"NaN", b"null", b"&a *a", b"!!python/object:x.y {}",
    b"{% for i in range(9**9) %}", b"{{", b"%}",
)  # fmt: skip


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change, remove, insert or repeat a few bytes, cut the file, or replace it."""
    if draw.random() < 0.04:
        return draw.choice(_STARTS)
    if draw.random() < 0.03:
        return draw.choice(_STARTS) + data
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8, 40))):
        place = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 1, 2, 4, 30, 1000))
        what = draw.randrange(5)
        if what == 0:
            changed[place : place + length] = draw.randbytes(min(length, max(1, len(changed) - place)))
        elif what == 1:
            del changed[place : place + length]
        elif what == 2:
            changed[place:place] = draw.choice(_TOKENS)
        elif what == 3:
            changed[place:place] = changed[place : place + length * 9]
        elif changed:
            changed[min(place, len(changed) - 1)] ^= 1 << draw.randrange(8)
    return bytes(changed[: draw.randrange(len(changed) + 1)] if draw.random() < 0.15 else changed)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value in a document, few of a long list."""
    if isinstance(value, dict):
        keys: list[Any] = list(value) if len(value) < 200 else [*list(value)[:20], *list(value)[-20:]]
    else:
        keys = [*range(min(len(value), 12)), *range(max(12, len(value) - 4), len(value))]
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list) and depth < 30:
            yield from _places(value[key], depth + 1)


def _strange(draw: random.Random, value: Any) -> Any:
    """Return another value: often a size for a size, and the value in another form."""
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice((*SIZES, value + 1, value - 1, -value, value * 2, float(value), str(value), [value]))
    if isinstance(value, str) and draw.random() < 0.3:
        return draw.choice((value * 2, value[:-1], value + "\0", [value], {value: value}, value.upper(), value * 3000))
    if isinstance(value, list | dict) and value and draw.random() < 0.4:
        inner = list(value.values()) if isinstance(value, dict) else value
        return draw.choice((inner, inner * 2, inner[0], {str(number): one for number, one in enumerate(inner)}))
    if draw.random() < 0.02:
        deep: Any = 1
        for _ in range(draw.choice((50, 900, 3000))):
            deep = [deep] if draw.random() < 0.5 else {"a": deep}
        return deep
    return copy.deepcopy(draw.choice(STRANGE))


def damage_document(value: Any, draw: random.Random) -> Any:
    """Return a JSON document with a few values replaced, removed, added, renamed or exchanged."""
    document = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(document)) if isinstance(document, dict | list) else []
        if not places or draw.random() < 0.02:
            return _strange(draw, document)
        holder, key = draw.choice(places)
        what = draw.random()
        if what < 0.12:
            del holder[key]
        elif what < 0.22 and isinstance(holder, dict):
            holder[draw.choice(KEYS)] = _strange(draw, 1)
        elif what < 0.26 and isinstance(holder, dict):
            holder[draw.choice(("", "x", "\0", *KEYS))] = holder.pop(key)
        elif what < 0.32:
            other, name = draw.choice(places)
            holder[key] = copy.deepcopy(other[name]) if _inside(other, name) else None
        else:
            holder[key] = _strange(draw, holder[key])
    return document


def _inside(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _dump(value: Any, draw: random.Random) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=draw.random() < 0.8, indent=draw.choice((None, 2)))
    except (RecursionError, ValueError):
        text = '{"a":' * 5000
    encoding = draw.choice(("utf-8",) * 20 + ("utf-8-sig", "utf-16", "latin-1"))
    return text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


def damage_json(data: bytes, draw: random.Random) -> bytes:
    """Damage a JSON file: its values, or its text."""
    if draw.random() < 0.2:
        return damage_bytes(data, draw)
    try:
        value = json.loads(data)
    except ValueError:
        return damage_bytes(data, draw)
    return _dump(damage_document(value, draw), draw)


def damage_lines(data: bytes, draw: random.Random) -> bytes:
    """Damage a file of JSON lines: one line, their order, or the text."""
    lines = data.split(b"\n")
    what = draw.random()
    if what < 0.15 or not lines:
        return damage_bytes(data, draw)
    number = draw.randrange(len(lines))
    if what < 0.85 and lines[number]:
        lines[number] = damage_json(lines[number], draw)
    elif what < 0.9:
        del lines[number]
    else:
        lines.insert(number, draw.choice((lines[-1], lines[0], b"", b" ", b"[]", b"1", b"{}", b"null", *_STARTS)))
    return draw.choice((b"\n",) * 9 + (b"\r\n",)).join(lines)


def damage_yaml(data: bytes, draw: random.Random) -> bytes:
    """Damage a recipe: as JSON, which is YAML, or its text."""
    import yaml

    if draw.random() < 0.05:
        return b"a: &a [x, x]\nb: &b [*a, *a]\n" + b"".join(
            b"%c: &%c [*%c, *%c]\n" % (n, n, n - 1, n - 1) for n in range(ord("c"), ord("z"))
        )
    if draw.random() < 0.35 or b"&a" in data:  # such aliases were put in before, and take forever to resolve
        return damage_bytes(data, draw)
    return _dump(damage_document(yaml.safe_load(data), draw), draw)


def pack_safetensors(header: bytes, tensors: bytes, *, length: int | None = None) -> bytes:
    """Return a safetensors file."""
    return struct.pack("<Q", len(header) if length is None else length) + header + tensors


def damage_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Damage the header, its length, the names and places of tensors, or the bytes of the tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = data[8 : 8 + length], data[8 + length :]
    what = draw.random()
    if what < 0.15:
        return damage_bytes(data, draw)
    if what < 0.25:
        stated = draw.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001))
        return pack_safetensors(header, tensors, length=stated)
    if what < 0.3:
        many = {
            f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(draw.choice((300, 10**5)))
        }
        return pack_safetensors(json.dumps(many).encode(), b"")
    if what < 0.4:  # values: NaN, infinity, flipped bits
        place = draw.randrange(max(1, len(tensors) // 4)) * 4
        put = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\0\x7e\0\x7e", draw.randbytes(4)))
        return pack_safetensors(header, tensors[:place] + put + tensors[place + 4 :])
    fields = json.loads(header)
    if draw.random() < 0.1:  # a name twice
        name = draw.choice([name for name in fields if name != "__metadata__"])
        text = json.dumps(fields)
        return pack_safetensors((text[:-1] + "," + json.dumps({name: fields[name]})[1:]).encode(), tensors)
    damaged = _damage_header(fields, len(tensors), draw)
    return pack_safetensors(_dump(damaged, draw), tensors + draw.choice((b"",) * 9 + (b"\0" * 8,)))


def _damage_header(fields: Any, size: int, draw: random.Random) -> Any:
    """Return a header with one entry damaged; ``size`` is the number of bytes of all tensors."""
    names = [name for name in fields if name != "__metadata__"]
    name = draw.choice(names)
    entry, place = fields[name], fields[name]["data_offsets"]
    shapes = ([], [0], [-1], [1.0], ["1"], [2**63], [2**33, 2**33], entry["shape"][::-1], [*entry["shape"], 1], None, 5,
              [True], [10**30])  # fmt: skip
    places = ([0, 0], [0, size], [-4, 0], place[::-1], [1, 2, 3], [0.0, 4.0], ["0", "4"], None, [2**63, 2**64],
              [size, size], fields[names[0]]["data_offsets"])  # fmt: skip
    dtypes = ("F64", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "x", None, 1, "f32")
    what = draw.randrange(8)
    if what < 3:
        key, values = (("shape", shapes), ("data_offsets", places), ("dtype", dtypes))[what]
        entry[key] = draw.choice(values)
    elif what == 3:
        return damage_document(fields, draw)
    elif what == 4:
        fields[draw.choice(("", "x", name + "\0", name.upper(), "\ud800", "a" * 10000))] = fields.pop(name)
    elif what == 5:
        del fields[name]
    elif what == 6:
        other = draw.choice(names)
        fields[name], fields[other] = fields[other], fields[name]
    else:
        fields["__metadata__"] = damage_document(fields.get("__metadata__", {"format": "pt"}), draw)
    return fields


def damage_zip(data: bytes, draw: random.Random) -> bytes:
    """Damage a ``.bin``: the zip archive, the names of its parts, or the pickle in it."""
    what = draw.random()
    if what < 0.3 or not zipfile.is_zipfile(io.BytesIO(data)):
        return damage_bytes(data, draw)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = draw.randrange(len(parts))
    name, content = parts[number]
    packing = zipfile.ZIP_DEFLATED if draw.random() < 0.15 else zipfile.ZIP_STORED
    if what < 0.6:
        number = next(n for n, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
        parts[number] = (parts[number][0], _damage_pickle(parts[number][1], draw))
    elif what < 0.7:
        del parts[number]
    elif what < 0.8:
        parts.insert(number, (name, draw.choice((content, b"", content[::-1]))))
    elif what < 0.9:
        parts[number] = (draw.choice(("x", "../x", name + "/", name.upper(), name.split("/")[-1])), content)
    else:
        parts[number] = (name, draw.choice((b"", content[:-1], content * 2, b"\0" * (1 << 24))))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", packing) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return packed.getvalue()


def _damage_pickle(data: bytes, draw: random.Random) -> bytes:
    """Damage a pickle; half of the time its numbers, which are sizes, strides and offsets."""
    changed = bytearray(data)
    numbers = [place for place, byte in enumerate(changed[:-5]) if byte in b"KMJ"]
    if draw.random() < 0.5 or not numbers:
        return damage_bytes(data, draw)
    for _ in range(draw.choice((1, 1, 2))):
        place = draw.choice(numbers)
        changed[place + 1 : place + 2] = bytes([draw.choice((0, 1, 2, 127, 128, 255))])
    return bytes(changed)


def damage_image(data: bytes, draw: random.Random) -> bytes:
    """Damage an image; or make one of very many markers or pixels."""
    if draw.random() < 0.03:
        return (
            b"\xff\xd8"
            + draw.choice((b"\xff\xe2\x00\x02", b"\xff\xe1\x00\x10Exif\0\0MM\0*\0\0\0\x08\0", b"\xff")) * 3000000
        )
    return damage_bytes(data, draw)


DAMAGES: dict[str, Damage] = {
    ".json": damage_json, ".jsonl": damage_lines, ".yaml": damage_yaml, ".safetensors": damage_safetensors,
    ".bin": damage_zip, ".pt": damage_zip, ".pth": damage_zip, ".png": damage_image, ".jpg": damage_image,
}  # fmt: skip
"""By the suffix of a file; every other file is bytes."""


def damage_file(name: str, data: bytes, draw: random.Random) -> bytes:
    """Damage a file as its name says."""
    suffix = name[name.rfind(".") :] if "." in name else ""
    try:
        return DAMAGES.get(suffix, damage_bytes)(data, draw)
    except Exception:  # noqa: BLE001 - the file was damaged before
        return damage_bytes(data, draw)
