"""Generate conversations about images with a language model that gets only the text that was read and a caption.

Source: arXiv 2306.17107, section 3: text-only GPT-4, two OCR results and a caption, 16K conversations. The wording of
the request is our own, and so is the check of the replies, which the paper does not mention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from llavar_peft.atomic_files import check_output_file, write_json
from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.json_schema import AnswerSchema, write_fields
from llavar_peft.data.record_store import open_records, parse_record
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.build_ocr_records import Progress, journal_path, read_folder
from llavar_peft.datagen.ocr.caption_images import ImageCaptioner
from llavar_peft.datagen.ocr.check_replies import CheckedReply, Pair, check_fields, check_reply
from llavar_peft.datagen.ocr.ocr_lines import OcrLine, Polygon
from llavar_peft.datagen.ocr.ocr_quality import transcribe
from llavar_peft.datagen.ocr.stored_readings import stored_readings
from llavar_peft.datagen.openai_client import ChatModel, Endpoint, EndpointRejectedError, Message
from llavar_peft.errors import (
    DAMAGED,
    DataError,
    EnvironmentFaultError,
    ImageError,
    InterruptedRunError,
    describe_reason,
)
from llavar_peft.text_files import read_json, read_json_lines

# Both texts stay byte for byte, because replies are kept by the hash of the whole request.
REQUEST: Final = """\
You write training conversations between a person and an assistant who both look at the same picture. You cannot see \
it. You are given what programs read in it, which may hold mistakes, and perhaps a caption.

Write {low} to {high} turns. Ask what a person would want to know from the text in the picture: what it is, what it \
says, names, dates, prices, and what follows from them. Each question must be clear without the turns before it. \
Answer in one to three sentences, as if you saw the picture, and only from what is given: mend obvious mistakes of \
reading, but invent no word and no number. Never mention that you were given text, OCR or a caption.

Reply with JSON alone: {{"turns": [{{"question": "...", "answer": "..."}}, ...]}}"""

EXTRACT: Final = """\
You write the fields of a form that a person and you both look at. You cannot see it. You are given what programs read \
in it, which may hold mistakes, and perhaps a caption.

Copy values as they are printed: fix obvious mistakes of reading, but invent no word and no number. Leave out, or set \
to null, what the form does not say, as far as the schema allows it.

Reply with JSON alone, which follows this schema: {schema}"""

AGAIN: Final = "That cannot be used:\n{faults}\nReply with the whole conversation again, mended, as JSON alone."

Outcome = Literal["refused", "malformed", "ungrounded"]
_MAX_REJECTIONS: Final = 10  # in a row: then the command is wrong, not the images


@dataclass(frozen=True, kw_only=True)
class ConverseSettings:
    """How conversations are generated.

    Attributes:
        least: Minimum number of valid turns.
        most: Maximum number of turns.
        attempts: Maximum number of requests for one image.
        seed: Selects, with a record's id, whether the image precedes the first question.
        concurrency: Maximum number of simultaneous requests.
        schema: Write one turn about each image, whose answer is JSON that follows this schema, instead of a
            conversation.
        caption_endpoint: A model that sees images and writes the missing captions.
        images: The folder of the images for it; None for the one that ``ocr build`` has read.
    """

    endpoint: Endpoint
    least: int = 2
    most: int = 5
    attempts: int = 3
    seed: int = 0
    concurrency: int = 4
    schema: AnswerSchema | None = None
    caption_endpoint: Endpoint | None = None
    images: Path | None = None


@dataclass
class ConverseReport:
    """Report of a run.

    Attributes:
        kept: Number of conversations written.
        turns: Number of questions in them.
        repaired: Number of conversations that took more than one request.
        asked: Number of requests sent.
        remembered: Number of replies that an earlier run had received.
        drops: Images without a conversation: record, outcome, detail.
    """

    images: int
    kept: int = 0
    turns: int = 0
    repaired: int = 0
    asked: int = 0
    remembered: int = 0
    drops: list[tuple[str, Outcome, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-ready dictionary, with the keys of version 0.1."""
        keys = {"images": "pictures", "repaired": "mended"}
        fields = {keys.get(name, name): value for name, value in vars(self).items()}
        return {**fields, "dropped": dict(Counter(outcome for _, outcome, _ in self.drops).most_common())}


@dataclass(frozen=True, slots=True)
class _Task:
    """An image with its record's id, the texts that engines read, where they are, and its caption."""

    record_id: str
    image: str
    readings: Mapping[str, str]
    places: tuple[Polygon, ...]
    caption: str

    @property
    def evidence(self) -> tuple[str, ...]:
        return (*self.readings.values(), self.caption)


@dataclass(frozen=True, slots=True)
class _Made:
    """Result for one image: its turns, or why there are none."""

    turns: tuple[Pair, ...]
    requests: int
    outcome: Outcome | None = None
    detail: str = ""


def make_conversations(
    records: Path,
    out: Path,
    settings: ConverseSettings,
    captions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ConverseReport:
    """Generate a conversation for each record that ``build_records`` wrote.

    Args:
        records: The file of records, with the readings next to it; those of two engines give better results.
        out: The file of conversations to write, ``.json``. Replies are kept next to it.
        captions: Captions by the images' paths in the records.
        progress: Called with the number of images done and in total.

    Returns:
        The report, which is also written next to the conversations.

    Raises:
        DataError: The records or the readings are missing or malformed, or no conversation was valid.
        InterruptedRunError: Ctrl-C was pressed, or the endpoint keeps failing; run again to resume.
        EnvironmentFaultError: The key, the address or the model's name is wrong.
        MissingDependencyError: ``openai`` is not installed, or OpenCV for captions.
    """
    check_output_file(out, "--out")
    tasks = _read_tasks(records, captions or {})
    report = ConverseReport(len(tasks))
    with ExitStack() as stack:
        journal = stack.enter_context(ResumeJournal(out.with_suffix(".replies.jsonl"), {"format": 1}))
        model = ChatModel(settings.endpoint, journal)
        captioner = None
        if settings.caption_endpoint is not None:
            captions_file = stack.enter_context(ResumeJournal(out.with_suffix(".captions.jsonl"), {"format": 1}))
            roots = ImageRoots(settings.images or read_folder(records))
            captioner = ImageCaptioner(ChatModel(settings.caption_endpoint, captions_file), roots)
        try:
            made = dict(_converse_all(tasks, model, captioner, settings, report, progress))
        except KeyboardInterrupt:
            raise InterruptedRunError.at(
                str(journal.path), "interrupted; replies so far are kept", "run the same command again to resume"
            ) from None
        report.asked, report.remembered = model.asked, model.remembered
        written = [_make_record(task, made[task.record_id], settings.seed) for task in tasks if task.record_id in made]
        report.kept, report.turns = len(written), sum(len(turns) for turns in made.values())
        report.drops.sort()
        write_json(out, written)
        write_json(out.with_suffix(".report.json"), report.as_dict())
    if tasks and not written:
        _, outcome, detail = report.drops[0]
        raise DataError.at(
            str(records), f"no conversation was valid (first image: {outcome}, {detail})", "use a better model"
        )
    return report


def read_captions(path: Path) -> dict[str, str]:
    """Read captions by image from a JSON object, or from JSON lines with ``image`` and ``caption``.

    Raises:
        DataError: The file is missing or has another form.
    """
    fix = 'write {"a.jpg": "...", ...}, or lines of {"image": ..., "caption": ...}'
    in_lines = path.suffix.lower() != ".json"
    value = [value for _, value in read_json_lines(path)] if in_lines else read_json(path, fix=fix, unique=True)
    try:
        found = value if isinstance(value, dict) else {entry["image"]: entry["caption"] for entry in value}
    except DAMAGED as error:
        what = f"cannot be read as captions ({type(error).__name__}: {describe_reason(error)})"
        raise DataError.at(str(path), what, fix) from error
    for image, caption in found.items():
        if not isinstance(caption, str):
            raise DataError.at(f"{path}:{image}", f"is {type(caption).__name__}, expected text", "write the caption")
    return found


def _read_tasks(records: Path, captions: Mapping[str, str]) -> list[_Task]:
    readings: dict[str, dict[str, str]] = {}
    places: dict[str, tuple[Polygon, ...]] = {}
    source = journal_path(records)
    if not source.is_file():
        raise DataError.at(str(source), "is missing", "run llavar-peft ocr build, which writes it next to the records")
    for _, entry in stored_readings(source):
        found = {
            name: [OcrLine.from_json(line) for line in lines] for name, lines in (entry.get("lines") or {}).items()
        }
        readings[entry["path"]] = {name: transcribe(lines) for name, lines in found.items()}
        places[entry["path"]] = tuple(line.polygon for lines in found.values() for line in lines)
    tasks = []
    store = open_records(str(records))
    for index in range(len(store)):
        conversation = parse_record(store[index], store.where(index))
        for image in conversation.images:
            if image not in readings:
                raise DataError.at(store.where(index), f"{image} was never read", "run llavar-peft ocr build again")
            caption = captions.get(image, "")
            tasks.append(_Task(conversation.id, image, readings[image], places[image], caption))
    return tasks


def _converse_all(
    tasks: Sequence[_Task],
    model: ChatModel,
    captioner: ImageCaptioner | None,
    settings: ConverseSettings,
    report: ConverseReport,
    progress: Progress | None,
) -> Iterator[tuple[str, tuple[Pair, ...]]]:
    """Yield the turns of each image, asking about several at a time; errors of the endpoint stop it."""
    waiting, running, rejected = iter(tasks), dict[Future[_Made], _Task](), 0
    pool = ThreadPoolExecutor(settings.concurrency)
    try:
        for done in range(1, len(tasks) + 1):
            for task in islice(waiting, settings.concurrency - len(running)):
                running[pool.submit(_converse_one, task, model, captioner, settings)] = task
            finished = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            task, made = running.pop(finished), finished.result()
            rejected = rejected + 1 if made.outcome == "refused" else 0
            if rejected == _MAX_REJECTIONS:
                raise EnvironmentFaultError.at(
                    settings.endpoint.model,
                    f"rejects all requests ({made.detail})",
                    "check the model's name and limits",
                )
            if progress is not None:
                progress(done, len(tasks))
            if made.outcome is not None:
                report.drops.append((task.record_id, made.outcome, made.detail))
                continue
            report.repaired += made.requests > 1
            yield task.record_id, made.turns
    finally:
        pool.shutdown(cancel_futures=True)


def _converse_one(task: _Task, model: ChatModel, captioner: ImageCaptioner | None, settings: ConverseSettings) -> _Made:
    if captioner is not None and not task.caption:
        try:
            task = replace(task, caption=captioner.caption(task.image, task.places))
        except (EndpointRejectedError, ImageError) as error:
            return _Made((), 0, "refused" if isinstance(error, EndpointRejectedError) else "malformed", str(error))
    schema = settings.schema
    request = REQUEST.format(low=settings.least, high=settings.most)
    request = request if schema is None else EXTRACT.format(schema=schema.text)
    messages: list[Message] = [
        {"role": "system", "content": request},
        {"role": "user", "content": _describe(task)},
    ]
    outcome: Outcome = "malformed"
    faults: Sequence[str] = ()
    for attempt in range(1, settings.attempts + 1):
        try:
            reply = model.ask(messages)
        except EndpointRejectedError as error:
            return _Made((), attempt, "refused", str(error))
        checked = check_reply(reply, task.evidence) if schema is None else _check_form(reply, schema, task.evidence)
        if len(checked.turns) >= (settings.least if schema is None else 1):
            return _Made(checked.turns[: settings.most], attempt)
        outcome = "ungrounded" if checked.understood else "malformed"
        faults = checked.faults or (f"there are {len(checked.turns)} turns, wanted at least {settings.least}",)
        messages += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": AGAIN.format(faults="\n".join(f"- {fault}" for fault in faults))},
        ]
    return _Made((), settings.attempts, outcome, "; ".join(faults))


def _check_form(reply: str, schema: AnswerSchema, evidence: Sequence[str]) -> CheckedReply:
    fields, fault, understood = check_fields(reply, schema, evidence)
    if fault is not None:
        return CheckedReply((), (fault,), understood)
    return CheckedReply(((schema.question, write_fields(fields)),), (), understood)


def _describe(task: _Task) -> str:
    parts = [f"Caption:\n{task.caption}"] if task.caption else []
    parts += [f"Read by program {number}:\n{text}" for number, text in enumerate(task.readings.values(), 1)]
    return "\n\n".join(parts)


def _make_record(task: _Task, turns: Sequence[Pair], seed: int) -> dict[str, Any]:
    first = Random(f"{seed}/{task.record_id}").choice((f"{IMAGE_PLACEHOLDER}\n{{}}", f"{{}}\n{IMAGE_PLACEHOLDER}"))
    conversation: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": question if number else first.format(question)})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": task.record_id, "image": task.image, "conversations": conversation}
