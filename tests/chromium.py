"""Debian's Chromium, and a page in it that remembers what must not happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
_PATIENCE = 60_000  # ms, of whoever waits for something: a machine may be busy with other tests
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A camera that shows a clock, and a person who allows it.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


@dataclass
class Visit:
    """The page of one server, open.

    Attributes:
        page: It.
        url: Of the server.
        told: What was written to the console, and exceptions that nobody caught.
        requests: All that left the page.
    """

    page: Page
    url: str
    told: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    @property
    def posts(self) -> list[dict[str, Any]]:
        """The bodies of all questions."""
        return [dict(one.post_data_json or {}) for one in self.requests if one.method == "POST"]

    def ask(self, question: str) -> None:
        """Asks and waits for the answer, with its heatmaps."""
        cards, idle = self.page.locator(".turn .cost"), self.page.locator("#send")
        idle.wait_for()
        before = cards.count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        cards.nth(before).wait_for()
        idle.wait_for()  # which is there again when all is

    def fact(self, turn: int) -> list[str]:
        """What the page says an answer cost."""
        return self.page.locator(".turn").nth(turn).locator(".facts li").all_inner_texts()

    def check(self) -> None:
        """Nothing went elsewhere, and nothing was complained of."""
        ours = (self.url, self.url.replace("http", "ws"), "blob:", "data:")
        assert [one.url for one in self.requests if not one.url.startswith(ours)] == []
        assert self.told == []


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, running."""
    if not CHROMIUM.exists():
        pytest.skip(f"NOT RUN: the page in a browser: there is no {CHROMIUM}")
    expect.set_options(timeout=_PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, script: str = "", **options: Any) -> Iterator[Visit]:
    """The page of a server, open and ready unless it asks for a key first.

    Args:
        browser: It.
        url: Of the server.
        script: Run in the page before any of its own.
        options: Of Playwright's context.
    """
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)
        page.add_init_script(script)
        it = Visit(page, url)
        page.on("console", lambda message: it.told.append(message.text))
        page.on("pageerror", lambda error: it.told.append(str(error)))
        page.on("request", lambda request: it.requests.append(request))
        page.goto(url)
        page.locator("#server[data-state=ready], #key-dialog[open]").first.wait_for()
        yield it
