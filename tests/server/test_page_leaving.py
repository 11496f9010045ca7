"""The page where a person does something else before something has come to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from chromium import Visit, chromium, visit
from server_process import Served

VIDEO = Path(__file__).parents[2] / "examples" / "tiny_world" / "sample.mp4"

# What takes time in a browser waits until a test lets it go on. `sent` counts what went through
# sockets; `before` is sent before the next question, `came` is what the server said.
GATES = """
  const gate = () => {
    const it = { waiting: [], shut: false };
    it.pass = () => it.shut ? new Promise((go) => it.waiting.push(go)) : null;
    it.open = () => { it.shut = false; it.waiting.splice(0).forEach((go) => go()); };
    return it;
  };
  Object.assign(window, {
    camera: gate(), drawing: gate(), news: gate(), streams: [], sockets: 0, sent: {}, came: [],
    before: null, drawn: 0, tracks: () => streams.map((it) => it.getTracks()[0].readyState).join(),
  });
  const grant = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (wanted) => {
    await camera.pass();
    streams.push(await grant(wanted));
    return streams.at(-1);
  };
  const decode = HTMLImageElement.prototype.decode;
  HTMLImageElement.prototype.decode = async function () {
    await drawing.pass();
    await decode.call(this);
    drawn += 1;
  };
  window.WebSocket = class extends WebSocket {
    constructor(...given) { super(...given); sockets += 1; }
    send(data) {
      const { type } = JSON.parse(data);
      sent[type] = (sent[type] ?? 0) + 1;
      if (type === "video.query" && before) super.send(before);
      super.send(data);
    }
    set onmessage(take) {
      super.onmessage = async (message) => {
        came.push(JSON.parse(message.data));
        await news.pass();
        take(message);
      };
    }
  };
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as it:
        yield it


@pytest.fixture
def opened(browser: Browser, server: Served) -> Iterator[Visit]:
    # Without its policy, as conditions that are waited for are evaluated in the page.
    with visit(browser, server.url, GATES, bypass_csp=True) as it:
        yield it
        it.check()


def ask(page: Page, question: str) -> None:
    """Asks, and waits for nothing."""
    page.fill("#question", question)
    page.press("#question", "Enter")


def start_camera(page: Page) -> None:
    page.evaluate("delete sent['video.frame']")
    page.get_by_role("button", name="Use the camera").click()
    page.wait_for_function("sent['video.frame'] > 1")


def test_a_camera_that_is_allowed_too_late_is_switched_off(opened: Visit) -> None:
    page = opened.page
    page.evaluate("camera.shut = true")
    page.get_by_role("button", name="Use the camera").click()
    page.wait_for_function("camera.waiting.length === 1")
    ask(page, "What is it?")
    expect(page.get_by_role("alert")).to_contain_text("not on yet")
    page.set_input_files("#files", VIDEO)
    page.evaluate("camera.open()")
    page.wait_for_function("tracks() === 'ended'")
    expect(page.locator("#stage")).to_have_attribute("data-mode", "video")
    expect(page.locator("#badge")).to_be_hidden()
    opened.ask("What is it?")
    assert page.evaluate("sockets") == 0


def test_a_double_click_starts_one_camera(opened: Visit) -> None:
    page = opened.page
    page.evaluate("camera.shut = true")
    page.get_by_role("button", name="Use the camera").dblclick()
    page.evaluate("camera.open()")
    page.wait_for_function("sent['video.frame'] > 1")
    assert page.evaluate("[tracks(), sockets]") == ["live", 1]


def test_a_camera_that_is_left_is_off(opened: Visit) -> None:
    page = opened.page
    start_camera(page)
    page.get_by_role("button", name="Stop the camera").click()
    assert page.evaluate("tracks()") == "ended"
    start_camera(page)
    assert page.evaluate("tracks()") == "ended,live"
    page.set_input_files("#files", VIDEO)
    assert page.evaluate("tracks()") == "ended,ended"
    assert page.evaluate("sent['video.done']") == 2


@pytest.mark.parametrize("goes", ["to another file", "away"])
def test_what_is_left_while_its_heatmaps_come_is_not_shown(opened: Visit, goes: str) -> None:
    page = opened.page
    page.set_input_files("#files", VIDEO)
    page.evaluate("drawing.shut = true")
    ask(page, "What is it?")
    page.wait_for_function("drawing.waiting.length > 0")
    if goes == "away":
        page.get_by_role("button", name="Other media").click()
    else:
        page.set_input_files("#files", VIDEO)
    waiting = page.evaluate("drawing.waiting.length")
    page.evaluate("drawing.open()")
    page.wait_for_function(f"drawn === {waiting}")
    page.evaluate("new Promise((done) => setTimeout(done))")  # what waited for that has gone on
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#timeline")).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(0)
    if goes == "away":
        page.set_input_files("#files", VIDEO)
    opened.ask("And now?")
    expect(page.locator("#guide")).to_contain_text("And now?")


def test_another_file_ends_the_answer_that_comes(opened: Visit) -> None:
    page = opened.page
    page.set_input_files("#files", VIDEO)
    page.route("**/v1/chat/completions", lambda _: None)
    ask(page, "What is it?")
    page.get_by_role("button", name="Stop").wait_for()
    page.set_input_files("#files", VIDEO)
    expect(page.get_by_role("button", name="Ask")).to_be_visible()
    page.unroute_all()
    opened.ask("And now?")
    expect(page.locator(".turn .asked")).to_have_text("And now?")


def test_a_frame_that_fails_ends_no_question_and_a_bad_question_is_told(opened: Visit) -> None:
    page = opened.page
    start_camera(page)
    page.evaluate("before = JSON.stringify({ type: 'video.frame', data: '###' })")
    opened.ask("What is it?")
    params = page.evaluate("came.filter((one) => one.type === 'error').map((one) => one.param)")
    assert params == ["video.frame.data"]
    page.evaluate("before = null")
    page.locator("#options summary").click()
    page.fill("#temperature", "9")
    ask(page, "And now?")
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    expect(page.locator("#question")).to_have_value("And now?")
    page.fill("#temperature", "0")
    opened.ask("And now?")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_answer_that_was_stopped_is_not_part_of_the_next(opened: Visit) -> None:
    page = opened.page
    start_camera(page)
    page.evaluate("news.shut = true")
    ask(page, "What is it?")
    page.wait_for_function("came.some((one) => one.type === 'response.text.done')")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".turn .cut")).to_have_text("stopped")
    ask(page, "And now?")
    page.wait_for_function("came.filter((one) => one.type === 'response.text.done').length === 2")
    page.evaluate("news.open()")
    page.locator(".turn .cost").wait_for()
    shown = page.locator(".answer").nth(1).evaluate("one => one.firstChild.data")
    last = page.evaluate("came.findLast((one) => one.type === 'response.text.done').text")
    assert shown == (last or "(no words)")
    expect(page.locator(".turn").nth(0).locator(".answer")).to_have_text("stopped")
    expect(page.locator(".turn .cost")).to_have_count(1)


def test_options_without_a_meaning_are_not_offered(opened: Visit, tmp_path: Path) -> None:
    from PIL import Image

    page = opened.page
    Image.new("RGB", (80, 60), "red").save(tmp_path / "a.png")
    page.locator("#options summary").click()
    frames, earlier = page.get_by_label("Frames to look at"), page.get_by_label("Each question")
    page.set_input_files("#files", VIDEO)
    expect(frames).to_be_visible()
    expect(earlier).to_be_visible()
    page.set_input_files("#files", tmp_path / "a.png")
    expect(frames).to_be_hidden()
    expect(earlier).to_be_visible()
    page.get_by_role("button", name="Other media").click()
    start_camera(page)
    expect(frames).to_be_hidden()
    expect(earlier).to_be_hidden()
    page.get_by_role("button", name="Stop the camera").click()
    expect(frames).to_be_visible()
