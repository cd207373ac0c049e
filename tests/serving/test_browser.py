"""The page in a real browser, on a wide and on a narrow screen."""

from __future__ import annotations

import base64
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fastapi import FastAPI
from PIL import Image

from llavar_peft import Chat
from tests.pdf_files import paragraph, pdf
from tests.serving.browser import Browser, find_chromium, open_browser
from tests.serving.server import MODEL, serving

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

ASK, QUESTION = "button#ask", "#question textarea"


@pytest.fixture(scope="module")
def server(chat: Chat) -> Iterator[tuple[str, FastAPI]]:
    with serving(chat, ui=True) as running:
        yield running


@pytest.fixture
def browser(server: tuple[str, FastAPI]) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as page:
        page.resize(1280, 900)
        page.open(f"{server[0]}/ui/")
        page.wait_for(f"document.querySelector({ASK!r}) && document.querySelectorAll('#window_0 h2').length")
        yield page


def _words(side: int) -> str:
    return f"[...document.querySelectorAll('#window_{side} .answer:not(.waiting) .words')].map(it => it.textContent)"


def _answers(browser: Browser, side: int, count: int) -> list[str]:
    """Wait for the given number of complete answers in a window, and return them."""
    found: list[str] = json.loads(browser.wait_for(f"(w => w.length == {count} && JSON.stringify(w))({_words(side)})"))
    return found


def _save_screenshot(browser: Browser, name: str) -> None:
    """Save a screenshot in the folder LLAVAR_SCREENSHOTS, if it is set."""
    if folder := os.environ.get("LLAVAR_SCREENSHOTS"):
        browser.save_screenshot(Path(folder) / f"{name}.png")


def _choose(browser: Browser, where: str, name: str) -> None:
    browser.click(f"#{where} input")
    browser.type(f"#{where} input", name)
    browser.press("Enter")
    browser.wait_for(f"document.querySelector('#{where} input').value == {name!r}")


@pytest.mark.slow
def test_ask_about_an_image(browser: Browser, chat: Chat, images: list[Path], tmp_path: Path) -> None:
    browser.download_to(tmp_path)
    browser.set_file("#image input[type=file]", images[0])
    browser.wait_for("document.querySelector('#image img')?.naturalWidth > 0")
    _select_greedy(browser)
    for count, text in enumerate(("Read.", "Again?"), start=1):
        browser.type(QUESTION, text)
        # Gradio ignores a click while the stream of the previous answer is being closed, so click again.
        asked = f"document.querySelectorAll('#window_0 .question').length == {count}"
        browser.wait_for(f"{asked} || (document.querySelector({ASK!r}).click(), false)", pause=0.5)
        answers = _answers(browser, 0, count)
    talk = chat.conversation(images[0], adapter=None)
    sampling = {"temperature": 0.0, "max_new_tokens": 12}
    assert answers == [talk.send("Read.", **sampling), talk.send("Again?", **sampling)]
    _save_screenshot(browser, "asked")

    browser.click("#as_json")
    path = tmp_path / "conversation.json"
    browser.wait_for("new Promise(done => setTimeout(() => done(true), 500))")
    assert [turn["question"] for turn in json.loads(path.read_text("utf-8"))["turns"]] == ["Read.", "Again?"]
    # A mounted page has no manifest, and browsers request an icon by themselves.
    assert [one for one in browser.errors if "manifest" not in one and "favicon" not in one] == []
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in browser.requested), browser.requested


@pytest.mark.slow
def test_ask_about_pages_of_a_document(browser: Browser, chat: Chat, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    path = tmp_path / "two.pdf"
    path.write_bytes(pdf(paragraph("First page"), paragraph("Another page")))
    browser.set_file("#document input[type=file]", path)
    browser.wait_for("/two/.test(document.querySelector('#document').textContent)")
    browser.type("#pages input, #pages textarea", "2")
    _select_greedy(browser)
    browser.type(QUESTION, "Read.")
    browser.click(ASK)
    answers = _answers(browser, 0, 1)
    assert answers == [chat.ask(f"{path}#page=2", "Read.", adapter=None, temperature=0.0, max_new_tokens=12)]
    _save_screenshot(browser, "document")


def _select_greedy(browser: Browser) -> None:
    """Set temperature 0 and 12 tokens in the page's fields."""
    browser.wait_for(
        "(() => { const it = [...document.querySelectorAll('button')].find(b => /Answer settings/.test(b.textContent));"
        " it?.click(); return !!it })()"
    )
    for name, value in (("Temperature", 0), ("Tokens", 12)):
        # Svelte updates a slider on these events only.
        browser.wait_for(
            f"(() => {{ const it = document.querySelector('input[type=range][aria-label*={name}]');"
            f" if (!it) return false; it.value = {value};"
            " for (const kind of ['input', 'change', 'pointerup']) it.dispatchEvent(new Event(kind, {bubbles: true}));"
            f" return document.querySelector('input[type=number][aria-label*={name}]').value == {value} }})()"
        )


@pytest.mark.slow
def test_two_models_side_by_side_wide_and_narrow(browser: Browser, images: list[Path]) -> None:
    browser.set_file("#image input[type=file]", images[1])
    browser.wait_for("document.querySelector('#image img')?.naturalWidth > 0")
    _choose(browser, "model", "one")
    _choose(browser, "other", "two")
    browser.wait_for("document.querySelector('#window_1 h2')?.textContent == 'two'")
    _select_greedy(browser)
    browser.type(QUESTION, "Read <b>it</b> ${1+1}.")
    browser.click(ASK)
    assert _answers(browser, 0, 1) != _answers(browser, 1, 1)
    shown = "document.querySelector('#window_0 .question').textContent"
    assert browser.run(shown) == "Read <b>it</b> ${1+1}."
    tops = "[0, 1].map(side => document.querySelector(`#window_${side}`).getBoundingClientRect().top)"
    for width in (1280, 390):
        browser.resize(width, 900)
        browser.wait_for("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        assert browser.run("document.documentElement.scrollWidth") <= width
        left, right = browser.run(tops)
        assert (left == right) == (width == 1280)
        _save_screenshot(browser, f"compared-{width}")


@pytest.mark.slow
def test_an_example_is_filled_in_by_a_click(browser: Browser) -> None:
    browser.click(".gallery-item, table tbody tr")
    browser.wait_for(f"document.querySelector({QUESTION!r}).value.length > 3")
    browser.wait_for("document.querySelector('#image img')?.naturalWidth > 0")
    _select_greedy(browser)
    browser.click(ASK)
    assert len(_answers(browser, 0, 1)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("endless", "slow")
def test_stop_ends_an_answer(browser: Browser, server: tuple[str, FastAPI]) -> None:
    _choose(browser, "model", MODEL)
    _choose(browser, "other", "one")
    browser.type(QUESTION, "Go on and on.")
    browser.click(ASK)
    browser.wait_for("!!document.querySelector('#window_0 .waiting')")
    browser.click("button#stop")
    service, deadline = server[1].state.scheduler, time.monotonic() + 40  # the whole answer would take longer
    while service.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.running == service.waiting == 0


_WATCH = """(() => {
  window.seen = [];
  new MutationObserver(() => {
    const answer = document.querySelector("#window_0 .answer");
    if (answer) seen.push([answer.querySelector(".words").textContent, answer.classList.contains("waiting")]);
  }).observe(document.querySelector("#window_0"), {childList: true, subtree: true, characterData: true});
})()"""
_COPY = "#window_0 .answer .copy"


@pytest.fixture
def gate(chat: Chat) -> Iterator[threading.Semaphore]:
    """Let the model compute a token for each release."""
    allowed = threading.Semaphore(0)
    hook = chat.engine.base_model.lm_head.register_forward_hook(lambda *_: (allowed.acquire(timeout=60), None)[1])
    yield allowed
    hook.remove()
    allowed.release(100)


@pytest.mark.slow
@pytest.mark.usefixtures("endless")
def test_an_answer_is_streamed_and_can_be_copied(browser: Browser, gate: threading.Semaphore) -> None:
    browser.allow_clipboard()
    _select_greedy(browser)
    browser.type(QUESTION, "Go on.")
    browser.run(_WATCH)
    browser.click(ASK)
    gate.release()
    for number in range(4):
        gate.release()
        # The next token is computed when the page has shown this one, or after a while, because text may be held back.
        with suppress(AssertionError):
            browser.wait_for(f"new Set(seen.map(it => it[0]).filter(it => it)).size > {number}", seconds=5)
    gate.release(100)
    (answer,) = _answers(browser, 0, 1)
    seen = browser.run("seen")
    growing = [text for text, waiting in seen if waiting and text]
    assert len(set(growing)) > 3
    assert all(later.startswith(text) for text, later in zip(growing, [*growing[1:], answer], strict=True))
    assert 0 < len(growing[0]) < len(answer) == 12

    for clipboard in (True, False):  # as over HTTP from another machine
        browser.run("navigator.clipboard.writeText('something else')")
        browser.wait_for("navigator.clipboard.readText().then(text => text == 'something else')")
        browser.run(f"document.querySelector({_COPY!r}).textContent = 'Copy'")
        if not clipboard:
            browser.run("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
        browser.press_mouse(_COPY)
        browser.wait_for(f"document.querySelector({_COPY!r}).textContent == 'Copied'")
        browser.run("delete navigator.clipboard")  # remove the override
        assert browser.run("navigator.clipboard.readText()") == answer


@pytest.mark.slow
def test_mistakes_are_told_on_the_page(browser: Browser, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    no_image = tmp_path / "a.png"
    no_image.write_bytes(b"hello")
    _select_greedy(browser)
    for file, question, message in (
        (None, " ", "Please write a question"),
        (None, "x" * 8001, "The question is too long"),
        (None, "Hm?", "No image was uploaded"),
        (no_image, "Read.", "An image cannot be read"),
    ):
        if file is not None:
            browser.set_file("#image input[type=file]", file)
            browser.wait_for("!!document.querySelector('#image img')")
        browser.type(QUESTION, question)
        # Gradio ignores a click while the stream of the previous answer is being closed, so click again.
        told = f"[...document.querySelectorAll('.toast-body')].some(it => it.innerText.includes({message!r}))"
        browser.wait_for(f"{told} || (document.querySelector({ASK!r}).click(), false)", pause=0.5)
        _save_screenshot(browser, f"mistake-{len(question)}")
    assert "Traceback" not in "".join(capfd.readouterr())


_TOLD = "[...document.querySelectorAll('.toast-body')].map(it => it.innerText).join()"
_DROP = """(files => {{
  const transfer = new DataTransfer();
  for (const [name, data] of files)
    transfer.items.add(new File([Uint8Array.from(atob(data), it => it.charCodeAt())], name, {{type: "image/png"}}));
  document.querySelector("#image .upload-container, #image button").dispatchEvent(
    new DragEvent("drop", {{dataTransfer: transfer, bubbles: true, cancelable: true}}));
}})({files})"""


def _drop(browser: Browser, *paths: Path) -> None:
    files = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    browser.run(_DROP.format(files=json.dumps(files)))


@pytest.mark.slow
def test_several_images_at_once_are_told(browser: Browser, images: list[Path]) -> None:
    _drop(browser, images[1])
    browser.wait_for("document.querySelector('#image img')?.naturalWidth > 0")
    assert browser.run(_TOLD) == ""
    browser.open(browser.run("location.href"))
    browser.wait_for(f"document.querySelector({ASK!r}) && !document.querySelector('#image img')")
    _drop(browser, *images[:2])
    browser.wait_for(f"{_TOLD}.includes('only the first of these is used')")
    browser.wait_for(f"document.querySelector('#image img')?.src.endsWith({images[0].name!r})")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_an_image_that_cannot_be_stored_is_told(browser: Browser, tmp_path: Path) -> None:
    import resource

    image = tmp_path / "noise.png"
    Image.frombytes("RGB", (200, 200), random.Random(1).randbytes(120_000)).save(image)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        browser.set_file("#image input[type=file]", image)
        browser.wait_for(f"{_TOLD}.includes('its disk is full')")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
