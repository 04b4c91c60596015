"""The page, in a real browser: Chromium, driven by Playwright, where both are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import edgevlm
from edgevlm.manifest import read_manifest, write_manifest
from edgevlm.models import built_in
from edgevlm.runtimes import fakes
from edgevlm.server.access import Access
from edgevlm.server.pool import Pool
from tests.browsing import DESK, PHONE, Browser, Page, browsing, expect, opened
from tests.serving import PLENTY, Gate, Served, gated, pool_of, serving
from tests.test_server_chat import Halves

if TYPE_CHECKING:
    from edgevlm.runtimes.session import VLM

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def slow() -> tuple[VLM, Gate]:
    return gated("an answer that is stopped")


@pytest.fixture(scope="module")
def served(slow: tuple[VLM, Gate]) -> Iterator[Served]:
    models = {
        "pico": lambda: edgevlm.load(threads=1),
        "script": lambda: fakes.vlm(SCRIPT),
        "slow": lambda: slow[0],
        "masked": masked,
    }
    with serving(models) as found:
        yield found


@pytest.fixture(params=[PHONE, DESK], ids=["phone", "desk"])
def page(browser: Browser, served: Served, request: pytest.FixtureRequest) -> Iterator[Page]:
    yield from opened(browser, served.base, request.param)


@pytest.fixture
def desk(browser: Browser, served: Served) -> Iterator[Page]:
    yield from opened(browser, served.base, DESK)


def choose(page: Page, *names: str) -> None:
    page.set_input_files("#files", [EXAMPLES / name for name in names])


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")


def turn(page: Page, n: int) -> Any:
    return page.locator(".turn").nth(n)


def test_a_picture_is_asked_about(page: Page) -> None:
    choose(page, "shapes.png")
    page.get_by_role("button", name="Describe").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(turn(page, 0).locator(".facts summary")).to_contain_text("tokens/s")
    expect(turn(page, 0).locator(".said")).to_have_text(
        "a red circle, a blue square, a yellow triangle and a green star"
    )
    expect(turn(page, 0).locator(".said")).to_be_in_viewport()
    turn(page, 0).locator(".facts summary").click()
    expect(turn(page, 0).get_by_role("row", name="total")).to_be_visible()
    turn(page, 0).get_by_role("row", name="total").scroll_into_view_if_needed()
    assert_below(page, "#form", turn(page, 0).get_by_role("row", name="total"))
    expect(page.locator("#overlay rect")).to_have_count(0)
    ask(page, "detect circle ; star")
    expect(page.locator("#overlay text")).to_have_text(["circle", "star"])
    assert_drawn_over_the_circle(page)
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]


def assert_below(page: Page, lower: str, upper: Any) -> None:
    """The page is long enough for both, whatever sticks to its end."""
    page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
    above, below = upper.bounding_box(), page.locator(lower).bounding_box()
    assert above and below and above["y"] + above["height"] <= below["y"] + 1


def assert_drawn_over_the_circle(page: Page) -> None:
    """The first box lies in the left upper quarter of the picture as it is shown."""
    box, shown = page.locator("#overlay rect").first.bounding_box(), None
    picture = page.locator("#picture")
    shown = picture.bounding_box()
    assert box and shown
    size = picture.evaluate("p => [p.naturalWidth, p.naturalHeight]")
    scale = min(shown["width"] / size[0], shown["height"] / size[1])
    left = shown["x"] + (shown["width"] - size[0] * scale) / 2
    top = shown["y"] + (shown["height"] - size[1] * scale) / 2
    x = (box["x"] + box["width"] / 2 - left) / scale / size[0]
    y = (box["y"] + box["height"] / 2 - top) / scale / size[1]
    assert abs(x - 0.22) < 0.05 and abs(y - 0.3) < 0.05, (x, y)


def test_the_models_words_are_text(desk: Page) -> None:
    desk.get_by_label("Model").select_option("script")
    ask(desk, SCRIPT)
    expect(turn(desk, 0).locator(".said")).to_have_text(SCRIPT)
    expect(turn(desk, 0).locator(".asked")).to_have_text(SCRIPT)
    expect(desk.locator(".turn b, .turn img")).to_have_count(0)
    assert desk.title() == "edgevlm"


def test_masks_are_drawn(desk: Page) -> None:
    desk.get_by_label("Model").select_option("masked")
    choose(desk, "shapes.png")
    ask(desk, "segment circle")
    expect(desk.locator("#overlay mask image")).to_have_attribute("href", re.compile("^data:"))
    expect(desk.locator("#overlay > rect[mask]")).to_have_count(1)


def masked() -> VLM:
    vlm = fakes.vlm(f"<loc0136><loc0096><loc0488><loc0360>{'<seg001>' * 16} circle")
    vlm.engines = replace(vlm.engines, masks=Halves())
    return vlm


def test_an_answer_is_stopped(desk: Page, slow: tuple[VLM, Gate], served: Served) -> None:
    vlm, gate = slow
    desk.get_by_label("Model").select_option("slow")
    ask(desk, "go on")
    expect(turn(desk, 0).locator(".said")).to_have_text("a")
    desk.get_by_role("button", name="Stop").click()
    expect(turn(desk, 0).locator(".bad")).to_have_text("Stopped.")
    expect(desk.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    gate.open.set()
    desk.get_by_label("Model").select_option("pico")


def test_the_conversation_is_kept_and_cleared(desk: Page) -> None:
    choose(desk, "shapes.png")
    ask(desk, "answer en what shape is red?")
    expect(turn(desk, 0).locator(".facts")).to_be_visible()
    # It is saved when the next question may be asked.
    expect(desk.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    desk.reload()
    expect(turn(desk, 0).locator(".said")).to_have_text("circle")
    expect(desk.get_by_role("button", name="Show picture 1, shapes.png")).to_be_visible()
    desk.get_by_role("button", name="Clear conversation").click()
    expect(desk.locator(".turn")).to_have_count(0)
    desk.reload()
    desk.wait_for_selector("body[data-ready]")
    expect(desk.locator(".turn, #thumbs li")).to_have_count(0)


def test_pictures_are_shown_and_removed(desk: Page) -> None:
    choose(desk, "shapes.png", "sign.png")
    expect(desk.get_by_role("button", name="Show picture 2, sign.png")).to_have_attribute(
        "aria-pressed", "true"
    )
    desk.get_by_role("button", name="Show picture 1, shapes.png").click()
    assert desk.locator("#picture").get_attribute("alt") == "shapes.png"
    desk.get_by_role("button", name="Remove picture 1, shapes.png").click()
    expect(desk.locator("#thumbs li")).to_have_count(1)
    ask(desk, "ocr")
    expect(turn(desk, 0).locator(".said")).to_have_text("OPEN")


@pytest.fixture
def film(tmp_path: Path) -> Iterator[Served]:
    """A server of a model that is shown videos, and one of pictures alone."""
    (tmp_path / "film").mkdir()
    pico, video = read_manifest(built_in()), fakes.vlm(films=True).manifest.prompt.video
    made = replace(pico, prompt=replace(pico.prompt, video=video))
    write_manifest(tmp_path / "film", made)
    folders = {"film": tmp_path / "film", "still": built_in()}
    options = {"films": True, "conversational": True, "later_pictures": True}
    pool = Pool(
        lambda: folders, lambda _: fakes.vlm("it moves", **options), budget=PLENTY, idle_s=None
    )
    with serving(pool) as found:
        yield found


def test_a_video_is_asked_about(browser: Browser, film: Served, tmp_path: Path) -> None:
    pytest.importorskip("av", reason='videos need pip install "edgevlm[video]"')
    from tests.test_video import write_video

    clip = write_video(tmp_path / "clip.mp4", 10)
    for page in opened(browser, film.base, DESK):
        expect(page.locator("#files")).to_have_attribute("accept", "image/*,video/*")
        page.set_input_files("#files", [clip, EXAMPLES / "sign.png"])
        expect(page.locator("#picture")).to_be_visible()
        page.get_by_role("button", name="Show video 1, clip.mp4").click()
        expect(page.locator("#hint")).to_contain_text("clip.mp4: the model is shown frames")
        expect(page.locator("#picture")).to_be_hidden()
        ask(page, "what happens?")
        expect(turn(page, 0).locator(".said")).to_have_text("it moves")
        page.get_by_role("button", name="Remove video 1, clip.mp4").click()
        page.get_by_label("Model").select_option("still")
        expect(page.locator("#files")).to_have_attribute("accept", "image/*")
        page.set_input_files("#files", [clip])
        expect(page.locator("#thumbs li")).to_have_count(1)


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(desk: Page, event: str) -> None:
    desk.evaluate(
        """async ([event, bytes]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "new.png", { type: "image/png" }));
          const target = document.getElementById("question");
          target.dispatchEvent(event === "paste"
            ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
            : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [event, list((EXAMPLES / "shapes.png").read_bytes())],
    )
    ask(desk, "answer en what shape is red?")
    expect(turn(desk, 0).locator(".said")).to_have_text("circle")


def test_a_picture_is_taken_with_the_camera(page: Page) -> None:
    page.get_by_role("button", name="Camera…").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.get_by_role("button", name="Show picture 1, camera.png")).to_be_visible()
    ask(page, "caption en")
    expect(turn(page, 0).locator(".facts")).to_be_visible()
    page.get_by_role("button", name="Camera…").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_everything_has_a_name_and_the_keyboard_reaches_it(desk: Page) -> None:
    choose(desk, "shapes.png")
    names = ("Model", "Clear conversation", "Show picture 1, shapes.png", "Choose pictures…")
    for name in (*names, "Camera…", "Question", "Ask", "Describe"):
        expect(
            desk.get_by_label(name).or_(desk.get_by_role("button", name=name)).first
        ).to_be_visible()
    reached = set()
    desk.locator("#model").focus()
    for _ in range(20):
        reached.add(
            desk.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
        desk.keyboard.press("Tab")
    assert {"model", "clear", "choose", "camera", "question", "ask", "Describe"} <= reached
    desk.locator("#question").focus()
    desk.keyboard.type("caption en")
    desk.keyboard.press("Enter")
    expect(desk.get_by_role("status")).to_contain_text("Answer: a red circle")


def test_an_error_is_said(desk: Page) -> None:
    desk.get_by_text("Settings").click()
    desk.get_by_label("Longest answer, tokens").fill("0")
    desk.locator("#max-tokens").evaluate("field => field.removeAttribute('min')")
    ask(desk, "x")
    expect(turn(desk, 0).locator(".bad")).to_have_text("max_tokens must be at least 1")


def test_a_server_with_a_key_asks_for_it(browser: Browser) -> None:
    pool = pool_of({"fake": lambda: fakes.vlm("yes")})
    with serving(pool, Access(key="secret")) as served, browser.new_context() as context:
        page = context.new_page()
        page.goto(served.base)
        expect(page.get_by_role("alert")).to_contain_text("asks for a key")
        page.get_by_label("Key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The key is wrong.")
        page.get_by_label("Key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_be_hidden()
        ask(page, "x")
        expect(page.locator(".said")).to_have_text("yes")
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("fake")


def test_the_browser_lets_nothing_be_added(served: Served) -> None:
    answer = httpx.get(served.base)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for sign in ("src=", "innerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sign not in answer.text.replace('src="data:,"', "")
    assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
