"""The page where something is wrong: each time it says what, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from server_process import Serve, Served

from .chromium import chromium, visit

VIDEO = Path(__file__).parents[2] / "examples" / "tiny_world" / "sample.mp4"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as it:
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
    browser: Browser, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "large.mp4").write_bytes(bytes(200_000))
    with visit(browser, serve("--body-size", "100KB").url) as it:
        it.page.set_input_files("#files", tmp_path / "large.mp4")
        expect(it.page.get_by_role("alert")).to_contain_text("200 kB")
        expect(it.page.locator("#drop")).to_be_visible()
        assert it.posts == []
        it.check()


def test_a_server_that_has_gone_is_told(browser: Browser, serve: Serve) -> None:
    server = serve()
    with visit(browser, server.url) as it:
        it.page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        server.stop()
        it.page.fill("#question", "And now?")
        it.page.press("#question", "Enter")
        expect(it.page.get_by_role("alert")).to_contain_text("does not answer")
        expect(it.page.locator("#server")).to_have_text("not reachable")
        expect(it.page.locator("#question")).to_have_value("And now?")


def test_a_key_is_asked_for_until_it_is_right(
    browser: Browser, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("a-key-of-some-length/+\n")
    (tmp_path / "keys").chmod(0o600)
    server = serve("--api-keys", tmp_path / "keys", key="a-key-of-some-length/+")
    with visit(browser, server.url) as it:
        page = it.page
        dialog = page.get_by_role("dialog", name="This server wants a key")
        for key in ("wrong", "a-key-of-some-length/+"):
            expect(dialog).to_be_visible()
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
        expect(page.locator("#server")).to_have_text(server.model)
        page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        assert it.fact(0)[1].endswith("encoded")
        page.get_by_role("button", name="Other media").click()
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#live-note")).to_contain_text("4 frames sent")


def test_an_answer_can_be_stopped(browser: Browser, server: Served) -> None:
    with visit(browser, server.url) as it:
        page = it.page
        page.set_input_files("#files", VIDEO)
        # It never gets to the server: what is tested is what the page does meanwhile.
        page.route("**/v1/chat/completions", lambda _: None)
        page.fill("#question", "What is it?")
        page.press("#question", "Enter")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".turn .cut")).to_have_text("stopped")
        expect(page.get_by_role("button", name="Ask")).to_be_visible()
        page.unroute_all()
        it.ask("What is it?")


def test_the_camera_is_asked_about_and_gone_back_to(browser: Browser, server: Served) -> None:
    with visit(browser, server.url) as it:
        page = it.page
        page.get_by_role("button", name="Use the camera").click()
        expect(page.locator("#live-note")).to_contain_text("4 frames sent")
        it.ask("What is seen?")
        assert it.fact(0)[1] == "0 frames encoded"
        assert page.locator(".bar").count() >= 2
        expect(page.locator("#badge")).to_have_text("As it was")
        expect(page.get_by_role("img", name="of the camera")).to_be_visible()
        page.get_by_role("button", name="Back to live").click()
        expect(page.locator("#badge")).to_have_text("Live")
        it.ask("And now?")
        page.get_by_role("button", name="Stop the camera").click()
        expect(page.locator("#drop")).to_be_visible()
        assert page.evaluate("video.srcObject") is None
        it.check()


def test_a_camera_more_than_there_is_room_for_is_told(browser: Browser, serve: Serve) -> None:
    server = serve("--live", 1)
    with visit(browser, server.url) as one, visit(browser, server.url) as other:
        one.page.get_by_role("button", name="Use the camera").click()
        expect(one.page.locator("#live-note")).to_contain_text("frames sent")
        other.page.get_by_role("button", name="Use the camera").click()
        expect(other.page.get_by_role("alert")).to_contain_text("live sessions")
        expect(other.page.locator("#drop")).to_be_visible()
