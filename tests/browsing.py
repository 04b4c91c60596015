"""Chromium, driven by Playwright; whoever imports this skips where one of them is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if not BROWSER:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
pytest.importorskip("playwright", reason="pip install playwright to drive a browser")

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

__all__ = ["DESK", "PHONE", "Browser", "Page", "browsing", "expect", "opened"]

PATIENCE_MS = 60_000
PHONE, DESK = (390, 844, "dark"), (1280, 800, "light")


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser, closed at the end of the block."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        # As root, as in a container, Chromium runs without its sandbox only.
        with playwright.chromium.launch(
            executable_path=BROWSER, args=options, chromium_sandbox=False
        ) as found:
            yield found


def opened(
    browser: Browser, base: str, window: tuple[int, int, Any], path: str = "/"
) -> Iterator[Page]:
    """A page of the server at `base`, in a window of its own (width, height, colours); nothing goes
    wrong in it, and nothing is asked elsewhere.
    """
    width, height, scheme = window
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, permissions=["camera"]
    )
    context.set_default_timeout(PATIENCE_MS)
    with context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: said(message.type, message.text))
        page.on("request", lambda request: asked(request.url))

        def said(kind: str, text: str) -> None:
            # The browser's own note of an answer that is an error is none of the page's.
            if kind == "error" and not text.startswith("Failed to load resource"):
                wrong.append(text)

        def asked(address: str) -> None:
            if not address.startswith((base, "blob:", "data:")):
                wrong.append(address)

        page.goto(base + path)
        page.wait_for_selector("body[data-ready]")
        yield page
        assert not wrong
