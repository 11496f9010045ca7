"""The page where something is wrong: each time it says what, and goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from chromium import chromium, visit
from server_process import Served, served

VIDEO = Path(__file__).parents[2] / "examples" / "tiny_world" / "sample.mp4"
KEY = "a-key-of-some-length/+"
HAS_KEY = f"sessionStorage.setItem('ppllava-key', '{KEY}')"
STORED = "sessionStorage.getItem('ppllava-key')"
SEVERAL_SENT = re.compile(r" (?!1 )\d+ frames sent")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as it:
        yield it


@pytest.fixture(scope="module")
def strict(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with little room that wants a key."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text(f"{KEY}\n")
    (folder / "keys").chmod(0o600)
    flags = ("--live", 1, "--live-rate", 10, "--body-size", "100K", "--api-keys", folder / "keys")
    with served(bundle, folder, *flags, key=KEY) as it:
        yield it


def test_a_file_that_is_no_video_is_told(browser: Browser, server: Served, tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"this is no video at all " * 40)
    with visit(browser, server.url) as it:
        page = it.page
        page.set_input_files("#files", tmp_path / "no.mp4")
        page.fill("#question", "What is it?")
        page.press("#question", "Enter")
        alert = page.get_by_role("alert")
        expect(alert).to_be_visible()
        assert len(alert.inner_text()) > 20
        # What was asked is not lost, and something else can be chosen.
        expect(page.locator("#question")).to_have_value("What is it?")
        expect(page.locator(".turn")).to_have_count(0)
        page.get_by_role("button", name="Other media").click()
        page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        expect(alert).to_be_hidden()


def test_what_cannot_be_looked_at_together_is_told(
    browser: Browser, server: Served, tmp_path: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "a.png").write_bytes(b"a picture, as far as its name says")
    with visit(browser, server.url) as it:
        page = it.page
        for files, said in (
            ([VIDEO, VIDEO], "one at a time"),
            ([VIDEO, tmp_path / "a.png"], "not both"),
            ([tmp_path / "empty.mp4"], "empty"),
        ):
            page.set_input_files("#files", files)
            expect(page.get_by_role("alert")).to_contain_text(said)
        page.fill("#question", "What?")
        page.press("#question", "Enter")
        expect(page.get_by_role("alert")).to_contain_text("first")
        assert it.posts == []
        it.check()


def test_what_is_too_large_is_told_before_it_is_sent(
    browser: Browser, strict: Served, tmp_path: Path
) -> None:
    (tmp_path / "large.mp4").write_bytes(bytes(200_000))
    with visit(browser, strict.url, HAS_KEY) as it:
        it.page.set_input_files("#files", tmp_path / "large.mp4")
        expect(it.page.get_by_role("alert")).to_contain_text("200 kB")
        expect(it.page.locator("#drop")).to_be_visible()
        assert it.posts == []
        it.check()


def test_a_server_that_cannot_be_reached_is_told(browser: Browser, server: Served) -> None:
    with visit(browser, server.url) as it:
        it.page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        it.page.context.set_offline(True)
        it.page.fill("#question", "And now?")
        it.page.press("#question", "Enter")
        expect(it.page.get_by_role("alert")).to_contain_text("does not answer")
        expect(it.page.locator("#server")).to_have_text("not reachable")
        expect(it.page.locator("#question")).to_have_value("And now?")
        it.page.context.set_offline(False)
        expect(it.page.locator("#server")).to_have_text(server.model)


def test_a_key_is_asked_for_until_it_is_right(browser: Browser, strict: Served) -> None:
    with visit(browser, strict.url) as it:
        page = it.page
        dialog = page.get_by_role("dialog", name="This server wants a key")
        for key in ("wrong", KEY):
            expect(dialog).to_be_visible()
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
        expect(page.locator("#server")).to_have_text(strict.model)
        page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        assert it.fact(0)[1].endswith("encoded")
        page.get_by_role("button", name="Other media").click()
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#live-note")).to_contain_text(SEVERAL_SENT)


@pytest.mark.parametrize("key", ["a–key–with–dashes", "a-key-with-dots…", "a key of words", "  "])
def test_a_key_that_cannot_be_sent_is_told(browser: Browser, strict: Served, key: str) -> None:
    with visit(browser, strict.url) as it:
        page = it.page
        field = page.get_by_label("API key")
        field.fill(key)
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("ASCII")
        expect(field).to_have_accessible_description(re.compile("ASCII"))
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        assert page.evaluate(STORED) is None
        field.fill(f" {KEY} ")
        page.keyboard.press("Enter")
        expect(page.locator("#server")).to_have_text(strict.model)
        assert page.evaluate(STORED) == KEY


def test_a_key_that_is_refused_is_told_and_forgotten(browser: Browser, strict: Served) -> None:
    with visit(browser, strict.url) as it:
        page = it.page
        field = page.get_by_label("API key")
        alert = page.get_by_role("dialog").get_by_role("alert")
        expect(alert).to_be_hidden()
        expect(field).to_have_attribute("aria-invalid", "false")
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(alert).to_contain_text("not one of this server's")
        expect(field).to_have_accessible_description(re.compile("not one of this server's"))
        expect(field).to_have_attribute("aria-invalid", "true")
        assert page.evaluate(STORED) is None
        page.reload()
        expect(field).to_be_focused()
        expect(alert).to_be_hidden()


def ask_nobody(page: Page) -> None:
    """Asks what never gets to the server: what is tested is what the page does meanwhile."""
    page.set_input_files("#files", VIDEO)
    page.route("**/v1/chat/completions", lambda _: None)
    page.fill("#question", "What is it?")
    page.press("#question", "Enter")


def test_an_answer_can_be_stopped(browser: Browser, server: Served) -> None:
    with visit(browser, server.url) as it:
        page = it.page
        ask_nobody(page)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".turn .cut")).to_have_text("stopped")
        expect(page.get_by_role("button", name="Ask")).to_be_visible()
        page.unroute_all()
        it.ask("What is it?")


def test_a_question_that_was_stopped_looks_busy_no_more(browser: Browser, server: Served) -> None:
    with visit(browser, server.url) as it:
        page = it.page
        ask_nobody(page)
        expect(page.locator(".turn .dots")).to_have_count(1)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".turn .cut")).to_have_text("stopped")
        expect(page.locator(".turn .dots")).to_have_count(0)


def test_the_camera_is_asked_about_and_gone_back_to(browser: Browser, server: Served) -> None:
    with visit(browser, server.url) as it:
        page = it.page
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#live-note")).to_contain_text(SEVERAL_SENT)
        it.ask("What is seen?")
        assert it.fact(0)[1] == "0 frames encoded"
        # A frame at least: more may have come at once, where only the newest is looked at.
        assert page.locator(".bar").count() == int(it.fact(0)[0].split()[0]) > 0
        expect(page.locator("#badge")).to_have_text("As it was")
        expect(page.get_by_role("img", name="of the camera")).to_be_visible()
        page.get_by_role("button", name="Back to live").click()
        expect(page.locator("#badge")).to_have_text("Live")
        it.ask("And now?")
        page.get_by_role("button", name="Stop the camera").click()
        expect(page.locator("#drop")).to_be_visible()
        assert page.evaluate("video.srcObject") is None
        it.check()


def test_a_camera_more_than_there_is_room_for_is_told(browser: Browser, strict: Served) -> None:
    with visit(browser, strict.url, HAS_KEY) as one, visit(browser, strict.url, HAS_KEY) as other:
        one.page.get_by_role("button", name="Use the camera").click()
        expect(one.page.locator("#live-note")).to_contain_text(SEVERAL_SENT)
        other.page.get_by_role("button", name="Use the camera").click()
        expect(other.page.get_by_role("alert")).to_contain_text("live sessions")
        expect(other.page.locator("#drop")).to_be_visible()
