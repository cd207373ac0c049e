"""Images: the original's pixels for ordinary files, and no lost text in the others."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from transformers import CLIPImageProcessorPil

from llavar_peft.data.image_files import MAX_PIXELS, decode_image, open_image, read_header
from llavar_peft.data.image_preparation import image_token_count, prepare_image, prepared_scale
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.errors import ConfigError, ImageError
from llavar_peft.page.inline_images import embed_image
from llavar_peft.types import ImageMode

GOLDEN = Path(__file__).parents[1] / "golden" / "images"
MODES: dict[ImageMode, str] = {"pad": "pad", "square": "square", "keep": "keep", "pad_black": "inference"}
BETTER = ("exif6.jpg", "gray16.png", "palette_P.png", "rgba_tall.png")  # opened better here than in the original
ORDINARY = ("cmyk.jpg", "extreme_2x90.png", "extreme_600x1.png", "gray_L_square336.png", "text_wide.png")
REAL = ("demo1.png", "demo2.png", "extreme_ironing.jpg", "gatech_post.jpg", "waterview.jpg")
CLIP = CLIPImageProcessorPil.from_pretrained(GOLDEN)
SMALL = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def assert_golden(image: Any, folder: Path, mode: ImageMode, name: str) -> None:
    with np.load(folder / f"{MODES[mode]}.npz") as golden:
        expected = golden[name]
    pixels = prepare_image(image, mode, CLIP)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.float32, expected.shape)
    np.testing.assert_array_equal(pixels.numpy().astype(np.float16), expected)


def library(image: Image.Image, processor: Any = CLIP, **options: Any) -> torch.Tensor:
    pixels: torch.Tensor = processor(image, return_tensors="pt", **options)["pixel_values"][0]
    return pixels


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng((width, height)).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# ---- parity with the original


@pytest.mark.parity
@pytest.mark.parametrize(
    ("mode", "name"),
    # The original raises for a strip of one pixel's height in the other modes.
    [(mode, name) for mode in MODES for name in ORDINARY if mode == "pad" or name != "extreme_600x1.png"],
)
def test_ordinary_images_have_the_pixels_of_the_original(mode: ImageMode, name: str) -> None:
    assert_golden(GOLDEN / "inputs" / name, GOLDEN, mode, name)


@pytest.mark.parity
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REAL)
def test_photographs_have_the_pixels_of_the_original(shared_dir: Path, mode: ImageMode, name: str) -> None:
    folder = shared_dir / "golden" / "images"
    if not (folder / "inputs").is_dir():
        pytest.skip(f"the photographs are not at {folder}")
    assert_golden(folder / "inputs" / f"real_{name}", folder, mode, f"real_{name}")


@pytest.mark.parity
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BETTER)
def test_for_other_images_only_opening_differs_from_the_original(mode: ImageMode, name: str) -> None:
    with Image.open(GOLDEN / "inputs" / name) as opened:
        as_original = opened.convert("RGB")
    as_original.info = {}
    assert_golden(as_original, GOLDEN, mode, name)


def test_modes_match_their_type() -> None:
    assert set(MODES) == set(get_args(ImageMode))
    with pytest.raises(ConfigError, match="expected one of pad, square, keep, pad_black"):
        prepare_image(noise(4, 4), "stretch", CLIP)  # type: ignore[arg-type]


SIDES = st.integers(1, 90)


@given(SIDES, SIDES, st.sampled_from([SMALL, CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size=28)]))
def test_square_is_bit_equal_to_transformers(width: int, height: int, processor: Any) -> None:
    image = noise(width, height)
    if max(image.size) <= 32 * min(image.size):
        assert torch.equal(prepare_image(image, "square", processor), library(image, processor))


@given(SIDES, SIDES)
def test_pad_is_bit_equal_to_transformers_on_a_padded_square(width: int, height: int) -> None:
    image, side = noise(width, height), max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    assert torch.equal(prepare_image(image, "pad", SMALL), library(square, SMALL))


@pytest.mark.parametrize(("width", "height"), [(5, 3000), (3000, 5), (1200, 3100), (2999, 2001)])
def test_padding_in_bands_is_bit_equal_to_padding_at_once(width: int, height: int) -> None:
    test_pad_is_bit_equal_to_transformers_on_a_padded_square.hypothesis.inner_test(width, height)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_center_crop": False},
        {"size": {"height": 20, "width": 44}, "crop_size": {"height": 33, "width": 30}},
        {"resample": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.125]},
        {"do_resize": False},
    ],
    ids=str,
)
def test_the_settings_of_the_image_processor_are_applied(settings: dict[str, Any]) -> None:
    processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 28}, "crop_size": 28, **settings})
    for image in (noise(60, 35), noise(21, 50)):
        assert torch.equal(prepare_image(image, "square", processor), library(image, processor).float())


def test_unsupported_sizes_are_rejected() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 50})
    with pytest.raises(ConfigError, match="expected shortest_edge"):
        prepare_image(noise(4, 4), "square", processor)


# ---- extreme shapes


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(600, 1), (1, 600), (1, 1), (3, 1), (1, 3), (30_000, 2), (2, 30_000)], ids=str)
def test_extreme_shapes_are_prepared(mode: ImageMode, size: tuple[int, int]) -> None:
    pixels = prepare_image(noise(*size), mode, CLIP)
    if mode != "keep":
        assert tuple(pixels.shape) == (3, 336, 336)
    assert torch.isfinite(pixels).all()


@pytest.mark.slow
def test_a_very_long_strip_is_scaled_down_before_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to a square it would have 10^12 pixels; the scaled strip gives nearly the same result."""
    long, steps = Image.new("RGB", (40, 8000)), range(0, 8000, 400)
    for step in steps:
        long.paste((step % 251, step // 32, 255 - step // 32), (0, step, 40, step + 400))
    for image in (long, long.transpose(Image.Transpose.ROTATE_90)):
        whole = prepare_image(image, "pad", CLIP)
        with monkeypatch.context() as patch:
            patch.setattr("llavar_peft.data.image_preparation._LONGEST_PADDED", 6000)
            short = prepare_image(image, "pad", CLIP)
        assert float((short - whole).abs().max()) < 4 / 255 / 0.26
    for size in ((20, 1_000_000), (1_000_000, 20)):
        prepare_image(Image.new("RGB", size), "pad", CLIP)


def test_the_crop_of_a_strip_is_its_centre() -> None:
    image = noise(28 * 40, 28)  # as high as the crop: nothing is resized
    middle = image.crop((28 * 20 - 14, 0, 28 * 20 + 14, 28))
    assert torch.equal(prepare_image(image, "square", SMALL), library(middle, SMALL))


FIXED = CLIPImageProcessorPil(size={"height": 96, "width": 96}, do_center_crop=False)  # as SigLIP's
CROPPED = CLIPImageProcessorPil(size={"shortest_edge": 128}, crop_size=112)  # as DINOv2's


@pytest.mark.parametrize("processor", [CLIP, SMALL, FIXED, CROPPED], ids=["336", "28", "fixed", "cropped"])
@pytest.mark.parametrize("size", [(600, 600), (900, 300), (300, 900), (1200, 1600), (60, 40)])
@pytest.mark.parametrize("mode", get_args(ImageMode))
def test_the_height_of_text_is_that_in_the_prepared_image(
    mode: ImageMode, size: tuple[int, int], processor: Any
) -> None:
    image, bar = Image.new("RGB", size, "white"), min(size) // 4
    top = (size[1] - bar) // 2
    image.paste((255, 0, 0), (0, top, size[0], top + bar))
    red, green = (
        channel * std + mean
        for channel, std, mean in zip(
            prepare_image(image, mode, processor), processor.image_std[:2], processor.image_mean[:2], strict=False
        )
    )
    column = (red - green)[:, 1 if mode == "pad_black" else red.shape[1] // 2]  # of the paddings' colours about 0
    height = float(column[column > 0.1].sum())
    assert height == pytest.approx(bar * prepared_scale(size, mode, processor), rel=0.06, abs=0.7)


def test_keep_returns_at_least_one_patch() -> None:
    processor = SimpleNamespace(image_processor=CLIP, patch_size=14)
    for size in ((600, 1), (1, 600), (2, 90), (20_000, 2)):
        assert image_token_count(prepare_image(noise(*size), "keep", processor), 14) in range(1, 33)
    assert tuple(prepare_image(noise(600, 1), "keep", CLIP).shape) == (3, 1, 448)


def test_image_tokens_are_counted_as_the_original_does() -> None:
    assert image_token_count((336, 336), 14) == 576
    assert image_token_count(torch.zeros(3, 161, 447), 14) == 11 * 31


# ---- no text in an image is lost


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(noise(40, 24), tmp_path / f"a.{kind.lower()}", format=kind, exif=exif)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    once = open_image(path)
    assert np.array_equal(once, upright)
    assert np.array_equal(open_image(once), upright)
    with Image.open(path) as opened:
        assert np.array_equal(open_image(opened), upright)
        assert np.array_equal(open_image(opened.convert("RGB")), upright)


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = saved(noise(8, 4), tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert open_image(path).size == (8, 4)


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32", "float32"])
def test_sixteen_bits_are_scaled(dtype: str, tmp_path: Path) -> None:
    values = (np.arange(30 * 40).reshape(30, 40) * 54).astype(dtype)
    path = saved(Image.fromarray(values), tmp_path / "a.tiff")
    assert np.abs(np.asarray(open_image(path), int)[..., 0] - values / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 7, 255]], np.uint16), [0, 7, 255]),  # eight bits in a wide type
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),  # twelve bits, as scanners and X-ray devices write
        (np.array([[0, 1023]], np.uint16), [0, 255]),
        (np.array([[0, 16383]], np.uint16), [0, 255]),
        (np.array([[-100, 0, 155]], np.int32), [0, 100, 255]),
        (np.array([[0, 10**6]], np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[5, 5]], np.int32) * 10**6, [0, 0]),
    ],
)
def test_other_ranges_are_scaled_by_their_minimum_and_maximum(values: np.ndarray, expected: list[int]) -> None:
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == expected


def test_values_that_are_not_finite_are_rejected() -> None:
    with pytest.raises(ImageError, match="not finite"):
        open_image(Image.fromarray(np.array([[0.0, np.nan]], np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_areas_become_white(mode: str, tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (4, 2), (9, 9, 9, 0))  # nearly black, where it cannot be seen
    hidden.paste((0, 0, 0, 255), (0, 0, 1, 2))
    options: dict[str, Any] = {}
    image = hidden if mode == "RGBA" else hidden.convert("LA" if mode == "LA" else "RGB").convert(mode)
    if mode == "P":
        image = Image.new("P", (4, 2), 1)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.paste(0, (0, 0, 1, 2))
        options = {"transparency": 1}
    elif mode in ("L", "RGB"):
        options = {"transparency": 9 if mode == "L" else (9, 9, 9)}
    pixels = np.asarray(open_image(saved(image, tmp_path / "a.png", **options)))
    assert (pixels[:, 0] == 0).all()
    assert (pixels[:, 1:] == 255).all()


def _drawn(mode: str, *colours: int, size: tuple[int, int] = (60, 20)) -> Image.Image:
    """Return bars as wide as strokes of letters on a transparent ground."""
    drawing = Image.new("RGBA", size, (255, 255, 255, 0))
    for place, colour in enumerate(colours):
        drawing.paste((colour, colour, colour, 255), (4 + 10 * place, 4, 7 + 10 * place, size[1] - 4))
    return drawing.convert(mode)


@pytest.mark.parametrize(
    ("colours", "ground"),
    [
        ((0,), 255), ((90,), 255), ((160,), 255), ((200,), 0), ((250,), 0), ((255,), 0), ((255, 0), 128),
        ((0, 255, 250, 5), 128),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_text_on_a_transparent_ground_stays_readable(
    mode: str, colours: tuple[int, ...], ground: int, tmp_path: Path
) -> None:
    pixels = np.asarray(open_image(saved(_drawn(mode, *colours), tmp_path / "a.png")), dtype=int)[..., 0]
    assert pixels[0, 0] == ground
    for place, colour in enumerate(colours):
        assert pixels[10, 5 + 10 * place] == colour
        assert abs(pixels[10, 5 + 10 * place] - ground) > 60


def test_black_letters_beside_a_bright_box_stay_readable(tmp_path: Path) -> None:
    drawing = _drawn("RGBA", 0, 0, size=(400, 200))
    drawing.paste((255, 255, 255, 255), (100, 20, 390, 180))
    pixels = np.asarray(open_image(saved(drawing, tmp_path / "a.png")), dtype=int)[..., 0]
    assert pixels[10, 5] == 0
    assert pixels[0, 0] >= 128


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_fewer_bits_in_files_of_16_are_scaled(bits: int, alpha: bool, tmp_path: Path) -> None:
    """Pillow keeps the upper 8 of 16 bits, so that 12 bits would be almost black."""
    largest = 2**bits - 1
    values = np.linspace(0, largest, 64).astype(np.uint16)
    pixels = np.stack([values, values[::-1], values] + [np.full(64, largest, np.uint16)] * alpha, axis=-1)
    rows = zlib.compress(b"\0" + pixels.astype(">u2").tobytes())
    head = struct.pack(">IIBBBBB", 64, 1, 16, 6 if alpha else 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    found = np.asarray(open_image(path), dtype=int)[0]
    assert np.abs(found[:, 0] - np.linspace(0, 255, 64)).max() <= 255 / (largest >> 8) + 2
    assert (found[0, 0], found[0, 1]) == (0, 255)


@pytest.mark.parametrize(
    "remark",
    [
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
        (b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 2_000_000)),
    ],
)
def test_large_remarks_in_a_png_are_skipped_everywhere(remark: tuple[bytes, bytes], tmp_path: Path) -> None:
    data = saved(noise(8, 4), tmp_path / "plain.png").read_bytes()
    path = tmp_path / "a.png"
    path.write_bytes(data[:33] + chunk(*remark) + data[33:])
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(noise(8, 4)))
    with read_header(path.read_bytes(), ("PNG",)) as header:
        assert (header.size, header.format) == ((8, 4), "PNG")
    assert embed_image(tmp_path, "a.png") is not None


def test_a_jpeg_of_very_many_markers_is_rejected_by_every_opener(tmp_path: Path) -> None:
    """A million of them in 4 MB would take Pillow 10 seconds."""
    data = io.BytesIO()
    noise(8, 8).save(data, "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data.getvalue()[:2] + b"\xff\xfe\0\x02" * 20_000 + data.getvalue()[2:])
    for opens in (lambda: open_image(path), lambda: decode_image(path.read_bytes(), "image"),
                  lambda: read_header(path.read_bytes(), ("JPEG",))):  # fmt: skip
        with pytest.raises(ImageError, match="more than 10000 markers"):
            opens()
    assert embed_image(tmp_path, "a.jpg") is None


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_jpeg_2000_is_not_black(share: float, tmp_path: Path) -> None:
    path = saved(noise(64, 48), tmp_path / "a.jp2")
    whole = path.read_bytes()
    assert open_image(path).size == (64, 48)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ImageError, match="cannot be read as an image"):
        open_image(path)


@pytest.mark.parametrize("name", ["postscript.png", "large.png"])
def test_pages_open_images_as_training_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone would start Ghostscript for a drawing named as a PNG, and decode any number of pixels."""
    image = noise(40, 30)
    image.save(tmp_path / "postscript.png", "EPS")
    image.save(tmp_path / "large.png")
    monkeypatch.setattr("llavar_peft.data.image_files.MAX_PIXELS", 1000)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    assert embed_image(tmp_path, name) is None


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
def test_large_texts_in_a_png_are_skipped(place: str, tmp_path: Path) -> None:
    image = noise(8, 4)
    data = saved(image, tmp_path / "plain.png").read_bytes()
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000))
    at = 33 if place == "before the pixels" else data.rindex(b"IEND") - 4
    path = tmp_path / "a.png"
    path.write_bytes(data[:at] + text + data[at:])
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(image))
    assert np.array_equal(np.asarray(decode_image(path.read_bytes(), "image")), np.asarray(image))


@pytest.mark.parametrize(
    ("start", "what", "fix"),
    [
        (b"\0\0\0\x18ftypheic", "a HEIC photograph", "pillow-heif"),
        (b"\0\0\0\x18ftypmif1", "a HEIC photograph", "convert it"),
        (b"%PDF-1.7", "a PDF document that was cut off", "get the file again"),
        (b"\0\0\0\x18ftypmp42", "a video", "save a frame"),
        (b"\x1aE\xdf\xa3", "a video", "save a frame"),
        (b"<svg xmlns=''>", "an SVG drawing", "convert it"),
        (b"<!DOCTYPE html>", "a web page", "download the image"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer", "git lfs pull"),
        (b"%!PS-Adobe", "a PostScript drawing", "convert it"),
        (b'{"error": "not found"}', "JSON or other text", "download the image"),
        (b"data:image/png;base64,AAAA", "the text of a data URL", "decode it"),
        (b"PK\x03\x04", "a ZIP archive or an Office document", "save its images"),
        (b"8BPS\0\1", "a Photoshop document", "convert it"),
        (b"\xff\x0a", "a JPEG XL image", "convert it"),
        (b"\x89PNG\r\n\x1a\n", "damaged", "get the file again"),
        (b"\0\0\0\x18ftypavif", "damaged", "get the file again"),
        (b"II*\0\x10\0\0\0CR", "damaged, or a camera's raw file", "convert it"),
        (b"", "an empty file", "get the file again"),
        (b"hello", "not an image", "one of these formats"),
    ],
)
def test_files_that_are_no_images_are_named(start: bytes, what: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(start + b"\0" * 40 if start else b"")
    for opened in (lambda: open_image(path), lambda: decode_image(path.read_bytes(), "image")):
        with pytest.raises(ImageError, match=f"is {what}.*Fix: .*{fix}"):
            opened()


def test_a_heic_photograph_opens_where_it_is_supported(tmp_path: Path) -> None:
    plugin = pytest.importorskip("pillow_heif")
    plugin.register_heif_opener()
    path = tmp_path / "IMG_1.HEIC"
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    frames[0].save(path, "HEIF", save_all=True, append_images=frames[1:])  # a burst is one photograph
    assert open_image(path).size == (40, 20)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"is a damaged HEIC photograph.*Fix: get the file again"):
        open_image(path)


def test_a_pipe_or_a_device_is_rejected_without_reading_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match="is a pipe or a device, expected a file"):
            open_image(path)


def test_paths_that_no_file_has_are_named_in_one_short_line() -> None:
    for path in ("a\0b.png", "x" * 5000):
        with pytest.raises(ImageError) as raised:
            open_image(path)
        assert len(str(raised.value)) < 600


def test_damaged_remarks_of_a_png_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), "red").save(path)
    data = path.read_bytes()
    for remark in (chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0", chunk(b"zTXt", b"no end")):
        assert decode_image(data[:33] + remark + data[33:], "image").getpixel((2, 1)) == (255, 0, 0)


def test_golden_images_that_are_opened_better_than_in_the_original() -> None:
    inputs = GOLDEN / "inputs"
    assert open_image(inputs / "exif6.jpg").size == (160, 300)
    with Image.open(inputs / "gray16.png") as opened:
        assert np.asarray(opened.convert("RGB")).mean() > 245  # what the original sees
    assert 60 < np.asarray(open_image(inputs / "gray16.png")).mean() < 200
    with Image.open(inputs / "rgba_tall.png") as opened:
        alpha = np.asarray(opened.getchannel("A"))
    assert (np.asarray(open_image(inputs / "rgba_tall.png"))[alpha == 0] == 255).all()


# ---- rejected files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_decompression_bomb_is_rejected_before_it_is_decoded(tmp_path: Path) -> None:
    side = 8193
    path = tmp_path / "bomb.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"not even zlib") + chunk(b"IEND", b""))
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=r"bomb\.png: .*got 8193 x 8193 = 67 megapixels.*Fix: scale it down"):
        open_image(path)


@pytest.mark.parametrize("repeated", [b"\xff\xe2\x00\x02", b"\xff", b"\xff\xe0\x00\x02a", b"\xff\xd0"])
def test_a_jpeg_of_endless_markers_is_rejected(repeated: bytes, tmp_path: Path) -> None:
    """Pillow takes a second for 500,000 of them, and joins what some of them hold."""
    path = saved(noise(9, 8), tmp_path / "a.jpg")
    data = path.read_bytes()
    path.write_bytes(data[:2] + repeated * 20_000 + data[2:])
    for opened in (lambda: open_image(path), lambda: decode_image(path.read_bytes(), "image")):
        with pytest.raises(ImageError, match="more than 10000 markers"):
            opened()
    path.write_bytes(data[:2] + repeated * 200 + data[2:])
    assert open_image(path).size == (9, 8)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_animations_are_rejected(kind: str, tmp_path: Path) -> None:
    path = saved(noise(8, 8), tmp_path / f"a.{kind}", save_all=True, append_images=[noise(9, 8).crop((0, 0, 8, 8))])
    with pytest.raises(ImageError, match="got 2 frames"):
        open_image(path)


def test_a_photograph_with_a_preview_is_one_image(tmp_path: Path) -> None:
    path = saved(noise(8, 6), tmp_path / "a.mpo", save_all=True, append_images=[noise(4, 4)])
    assert open_image(path).size == (8, 6)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is an empty file"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a PostScript drawing, expected an image"),
    ],
)
def test_the_kind_of_other_files_is_reported(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=what):
        open_image(path)


def test_missing_files_and_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        open_image("https://127.0.0.1/a.jpg")


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise(24, 16, "L" if kind == "JPEG" else "RGB").save(file, kind)
    return file.getvalue()


WHOLE = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "JPEG2000")}


@hypothesis_settings(max_examples=400)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    st.floats(0, 1),
)
def test_a_damaged_file_raises_only_image_errors(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]], kept: float
) -> None:
    content = bytearray(WHOLE[kind])
    for place, value in changes:
        content[int(place * len(content))] = value
    if kept < 0.5:
        del content[int(2 * kept * len(content)) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert open_image(path).mode == "RGB"
    except ImageError as error:
        assert str(path) in str(error)  # noqa: PT017 - both outcomes are valid
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_rejected_unless_it_holds_all_pixels(
    tmp_path_factory: pytest.TempPathFactory, kind: str, kept: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(WHOLE[kind][: int(kept * len(WHOLE[kind]))])
    with Image.open(io.BytesIO(WHOLE[kind])) as opened:
        whole = np.asarray(opened.convert("RGB"))
    try:
        cut = np.asarray(open_image(path))
    except ImageError:
        return
    assert np.array_equal(cut, whole)


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_image_errors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        open_image(path)


# ---- roots


@pytest.fixture
def roots(tmp_path: Path) -> ImageRoots:
    for name in ("one/train/a.png", "two/train/a.png", "two/train/b.png", "secret/s.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        saved(noise(4, 2), tmp_path / name)
    return ImageRoots([tmp_path / "one", tmp_path / "two"])


def test_the_first_folder_with_the_file_is_used(roots: ImageRoots, tmp_path: Path) -> None:
    assert roots.resolve("train/a.png") == tmp_path / "one/train/a.png"
    assert roots.resolve("train/b.png") == tmp_path / "two/train/b.png"
    assert roots.open("train/b.png").size == (4, 2)
    assert pickle.loads(pickle.dumps(roots)).resolve("train/b.png") == tmp_path / "two/train/b.png"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("train/A.PNG", "if train/a.png is meant"),
        ("train/b.jpg", "if train/b.png is meant"),
        ("train\\b.png", "if train/b.png is meant"),
        ("train/ab.png", r"if train/[ab]\.png is meant"),
        ("nowhere/x.png", r"two\)\. Fix: add the image"),
        ("train", "is a folder"),
    ],
)
def test_a_missing_image_is_reported_with_a_similar_name(roots: ImageRoots, path: str, hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        roots.resolve(path)


@pytest.mark.parametrize("path", ["../secret/s.png", "train/../../secret/s.png", "../secret/none.png", "..", "../.."])
def test_a_path_may_not_leave_its_root(roots: ImageRoots, path: str) -> None:
    with pytest.raises(ImageError, match="leads outside the image folders"):
        roots.resolve(path)


def test_empty_paths_are_rejected(roots: ImageRoots) -> None:
    for path in ("", "a\0b"):
        with pytest.raises(ImageError, match="is not a path"):
            roots.resolve(path)


def test_an_absolute_path_is_taken_inside_a_root_only(roots: ImageRoots, tmp_path: Path) -> None:
    assert roots.resolve(str(tmp_path / "one/train/a.png")) == tmp_path / "one/train/a.png"
    with pytest.raises(ImageError, match="leads outside the image folders"):
        roots.resolve(str(tmp_path / "secret/s.png"))


def test_links_may_lead_into_image_folders_only(roots: ImageRoots, tmp_path: Path) -> None:
    (tmp_path / "one/out.png").symlink_to(tmp_path / "secret/s.png")
    (tmp_path / "one/outside").symlink_to(tmp_path / "secret")
    (tmp_path / "one/in.png").symlink_to(tmp_path / "two/train/b.png")
    (tmp_path / "link").symlink_to(tmp_path / "two")
    assert roots.open("in.png").size == (4, 2)
    assert ImageRoots(tmp_path / "link").open("train/b.png").size == (4, 2)
    for path in ("out.png", "outside/s.png", "outside/none.png"):
        with pytest.raises(ImageError, match="leads outside"):
            roots.resolve(path)


def test_roots_must_be_folders(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is not a folder"):
        ImageRoots([tmp_path / "missing"])
    with pytest.raises(ImageError, match="no image folder was given"):
        ImageRoots().resolve("a.png")


PARTS = st.sampled_from(["..", ".", "", "one", "two", "secret", "train", "a.png", "s.png", "out", "\\", "~", "\0", "é"])


@hypothesis_settings(max_examples=300)
@given(st.lists(PARTS, max_size=8).map("/".join) | st.text(max_size=20))
def test_no_path_ever_leads_outside(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    base = tmp_path_factory.getbasetemp() / "traversal"
    if not base.exists():
        for name in ("one/train/a.png", "secret/s.png"):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_bytes(b"")
        (base / "one/out").symlink_to(base / "secret")
    try:
        found = ImageRoots(base / "one").resolve(path)
    except ImageError:
        return
    assert os.path.realpath(found).startswith(os.path.realpath(base / "one") + os.sep)
