"""The page that searches pictures, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edgevlm.server.access import Access
from tests.browsing import DESK, PHONE, Browser, Page, browsing, expect, opened
from tests.serving import Served, album, serving, solid
from tests.test_server_limits import until
from tests.test_server_photos import GREEN, RED, status

ODD = "<b>bold</b>.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "album"
    solid(root / "rose.png", RED)
    solid(root / "garden" / "with a rather long name of a tomato.jpg", (200, 40, 20), (30, 60))
    solid(root / ODD, (180, 30, 60))
    solid(root / "grass.png", GREEN)
    solid(root / "grass copy.png", GREEN)
    for i in range(40):
        solid(root / f"sea {i}.png", (20, 20, 100 + 3 * i), (64, 40))
    return root


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pool, photos = album(tmp_path_factory.mktemp("album"), folder, answering=True)
    with serving(pool, photos=photos) as found:
        until(lambda: not status(found)["indexing"])
        yield found


@pytest.fixture(params=[PHONE, DESK], ids=["phone", "desk"])
def page(browser: Browser, served: Served, request: pytest.FixtureRequest) -> Iterator[Page]:
    yield from opened(browser, served.base, request.param, path="/photos")


@pytest.fixture
def desk(browser: Browser, served: Served) -> Iterator[Page]:
    yield from opened(browser, served.base, DESK, path="/photos")


def find(page: Page, words: str) -> None:
    page.get_by_label("Words to look for").fill(words)
    page.keyboard.press("Enter")


def test_words_find_pictures_and_these_others(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("album: 45 pictures")
    find(page, "red")
    first = page.locator(".grid button").first
    expect(first).to_have_accessible_name(re.compile(r"rose\.png, score 0\.99"))
    expect(first.locator("img")).to_be_visible()
    assert first.locator("img").evaluate("i => [i.naturalWidth, i.naturalHeight]") == [40, 30]
    expect(page.locator(".grid button b")).to_have_count(0)  # a name is text
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("img", name="rose.png")).to_be_visible()
    expect(dialog.get_by_role("button", name="Previous")).to_be_disabled()
    page.keyboard.press("ArrowRight")
    expect(dialog.locator("#about")).to_contain_text("tomato.jpg")
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    dialog.get_by_role("button", name="Find similar").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_text("Like garden")).to_be_visible()
    expect(page.locator(".grid button").first).to_have_accessible_name(
        "garden/with a rather long name of a tomato.jpg, score 1.000"
    )


def test_more_are_shown(desk: Page) -> None:
    find(desk, "blue")
    expect(desk.locator(".grid li")).to_have_count(30)
    desk.get_by_role("button", name="Show more").click()
    expect(desk.locator(".grid li")).to_have_count(45)
    expect(desk.get_by_role("button", name="Show more")).to_be_hidden()
    expect(desk.locator(".grid button").nth(30)).to_be_focused()


def test_a_dropped_picture_finds_its_like(desk: Page, folder: Path) -> None:
    desk.evaluate(
        """async (bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "leaf.png", { type: "image/png" }));
          document.body.dispatchEvent(
            new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list((folder / "grass.png").read_bytes()),
    )
    expect(desk.get_by_text("Like leaf.png")).to_be_visible()
    expect(desk.locator("#sample")).to_be_visible()
    expect(desk.locator(".grid button").first).to_have_accessible_name(
        re.compile(r"grass.*\.png, score 1\.000")
    )


def test_near_duplicates_are_groups(desk: Page) -> None:
    desk.get_by_role("button", name="Near duplicates").click()
    expect(desk.get_by_role("heading", name="40 near duplicates")).to_be_visible()
    desk.get_by_role("button", name="grass copy.png, score 1.000").click()
    expect(desk.get_by_role("dialog").get_by_role("img", name="grass copy.png")).to_be_visible()


def test_the_keyboard_is_enough(desk: Page) -> None:
    expect(desk.get_by_label("Words to look for")).to_be_focused()
    desk.keyboard.type("red")
    desk.keyboard.press("Enter")
    expect(desk.get_by_role("status")).to_have_text("30 pictures were found.")
    names = [desk.get_by_role("button", name=name) for name in ("Search", "Find by a picture…")]
    for expected in (*names, desk.get_by_role("button", name="Near duplicates")):
        desk.keyboard.press("Tab")
        expect(expected).to_be_focused()
    desk.keyboard.press("Tab")
    desk.keyboard.press("Enter")
    dialog = desk.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Find similar")).to_be_focused()
    desk.keyboard.press("ArrowRight")
    desk.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(desk.locator(".grid button").nth(1)).to_be_focused()
    desk.keyboard.press("/")
    expect(desk.get_by_label("Words to look for")).to_be_focused()


def test_the_pages_lead_to_one_another(desk: Page, served: Served) -> None:
    desk.get_by_role("link", name="Ask a model").click()
    expect(desk.get_by_label("Model")).to_have_value("vlm")
    desk.get_by_role("link", name="Search pictures").click()
    expect(desk.get_by_role("button", name="Near duplicates")).to_be_visible()


def test_changes_are_found_and_errors_said(desk: Page, folder: Path) -> None:
    find(desk, "blue")
    expect(desk.locator(".grid li")).to_have_count(30)
    new = solid(folder / "a bluer one.png", (0, 0, 250))
    broken = folder / "broken.png"
    broken.write_text("no picture", encoding="utf-8")
    desk.get_by_role("button", name="Look for changes").click()
    expect(desk.locator("#state")).to_have_text("album: 46 pictures · 1 cannot be read")
    expect(desk.locator(".grid button").first).to_have_accessible_name(
        "a bluer one.png, score 1.000"
    )
    new.unlink()
    desk.locator(".grid button").first.click()
    expect(desk.locator("#big")).to_contain_text("search again")
    desk.keyboard.press("Escape")
    broken.unlink()
    desk.get_by_role("button", name="Look for changes").click()
    expect(desk.locator("#state")).to_have_text("album: 45 pictures")


def test_a_server_with_a_key_asks_for_it(browser: Browser, folder: Path, tmp_path: Path) -> None:
    pool, photos = album(tmp_path, folder)
    with serving(pool, Access(key="secret"), photos=photos) as served:
        page = browser.new_page()
        page.goto(served.base)  # no model answers there: this page is the first
        expect(page.get_by_role("alert")).to_contain_text("asks for a key")
        page.get_by_label("Key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_contain_text("album: 45 pictures")
        find(page, "red")
        expect(page.locator(".grid img").first).to_be_visible()
        page.close()


def test_the_browser_lets_nothing_be_added(served: Served) -> None:
    answer = httpx.get(f"{served.base}/photos")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    for sign in ("src=", "innerHTML", "insertAdjacentHTML", "document.write", "eval(", "http"):
        assert sign not in answer.text
