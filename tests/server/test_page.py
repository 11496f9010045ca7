from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from chromium import Visit, chromium, visit
from ppllava_runtime.server.page import CONTENT_SECURITY_POLICY, read_assets
from server_process import Served
from tiny_videos import numbered_frames

VIDEO = Path(__file__).parents[2] / "examples" / "tiny_world" / "sample.mp4"

# Of relative luminance, as WCAG 2 has it; 4.5 is what text of this size needs.
CONTRAST = """selectors => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const read = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = read(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  return selectors.map((selector) => {
    const element = document.querySelector(selector);
    const pair = [light(read(getComputedStyle(element).color)), light(behind(element))];
    return [selector, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
  });
}"""
WARM_PIXELS = """() => {
  const canvas = document.getElementById("heat");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, i) => i % 4 === 3 && value > 40).length / (data.length / 4);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as it:
        yield it


@pytest.fixture
def open_page(browser: Browser, server: Served) -> Iterator[Visit]:
    with visit(browser, server.url) as it:
        yield it
        it.check()


def text_of(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def test_the_page_allows_nothing_from_elsewhere_and_nothing_inline(server: Served) -> None:
    response = httpx2.get(server.url)
    policy = response.headers["content-security-policy"]
    assert policy == CONTENT_SECURITY_POLICY
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "*" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=", response.text)


def test_a_browser_that_has_the_page_is_told_so(server: Served) -> None:
    first = httpx2.get(f"{server.url}/page/app.js")
    assert first.headers["content-type"].startswith("text/javascript")
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = httpx2.get(f"{server.url}/page/app.js", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
    other = httpx2.get(f"{server.url}/page/app.js", headers={"if-none-match": '"other"'})
    assert other.content == first.content


def test_nothing_but_the_files_of_the_page_is_served(server: Served) -> None:
    for path in ("/page/", "/page/index.html", "/page/../page.py", "/page/%2e%2e/page.py"):
        assert httpx2.get(server.url + path).status_code == 404


def test_every_file_that_is_named_is_there() -> None:
    assets = read_assets()
    for name, asset in assets.items():
        text = asset.body.decode()
        named = re.findall(r'from "\./([^"]+)"|(?:src|href)="/page/([^"]+)"', text)
        for one in {left or right for left, right in named}:
            assert one in assets, f"{name} names {one}"


def test_a_second_question_sends_no_video_and_encodes_no_frame(open_page: Visit) -> None:
    page = open_page.page
    page.set_input_files("#files", VIDEO)
    open_page.ask("Which way does the <b>red</b> circle move?")
    assert text_of(page, ".turn >> nth=0 >> .asked") == "Which way does the <b>red</b> circle move?"
    sampled = int(open_page.fact(0)[0].split()[0])
    assert open_page.fact(0)[1] == f"{sampled} frames encoded"
    assert page.locator(".bar").count() == sampled
    assert page.evaluate(WARM_PIXELS) > 0.001

    open_page.ask("What colour is the square?")
    assert open_page.fact(1)[1] == "0 frames encoded"
    first, second = open_page.posts
    sent, named = first["messages"][0]["content"][0], second["messages"][0]["content"][0]
    assert sent["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert named == {"type": "video_url", "video_url": {"url": None}, "uuid": sent["uuid"]}
    assert text_of(page, "#status").endswith("in all.")
    expect(page.locator(".turn.shown .asked")).to_have_text("What colour is the square?")
    page.locator(".turn >> nth=0 >> .look").click()
    expect(page.locator("#guide")).to_contain_text("red")


def test_the_heatmap_can_be_taken_away(open_page: Visit) -> None:
    page = open_page.page
    page.set_input_files("#files", VIDEO)
    open_page.ask("What is it?")
    page.locator("#strength").fill("0")
    assert page.evaluate(WARM_PIXELS) == 0
    page.get_by_role("switch", name="Heatmap").uncheck()
    expect(page.locator("#heat")).to_be_hidden()


def test_other_frames_are_asked_for_by_sending_the_video_again(open_page: Visit) -> None:
    page = open_page.page
    page.set_input_files("#files", VIDEO)
    open_page.ask("What is it?")
    page.locator("#options summary").click()
    page.fill("#num-frames", "2")
    open_page.ask("What is it?")
    assert open_page.fact(1)[:2] == ["2 frames", "2 frames encoded"]
    # The browser itself notes the 404 that led to it.
    assert [note for note in open_page.told if "404" not in note] == []
    open_page.told.clear()


def test_earlier_questions_go_along_where_a_person_wants_that(open_page: Visit) -> None:
    page = open_page.page
    page.set_input_files("#files", VIDEO)
    page.locator("#options summary").click()
    page.get_by_label("Each question knows").check()
    page.fill("#max-tokens", "3")
    open_page.ask("What is it?")
    open_page.ask("And why?")
    body = open_page.posts[1]
    assert [one["role"] for one in body["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in body["messages"][0]["content"]] == ["video_url", "text"]
    assert body["max_completion_tokens"] == 3


def test_a_keyboard_is_enough(open_page: Visit) -> None:
    page = open_page.page
    with page.expect_file_chooser() as chosen:
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Choose files")).to_be_focused()
        page.keyboard.press("Enter")
    chosen.value.set_files(VIDEO)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Which way?")
    page.keyboard.press("Enter")
    page.locator(".turn .cost").wait_for()
    bars = page.get_by_role("slider", name="Frame", exact=True)
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if bars.evaluate("bars => bars === document.activeElement"):
            break
    expect(bars).to_be_focused()
    last = int(bars.get_attribute("aria-valuemax") or 0)
    assert last > 1
    for key, frame in (("End", last), ("ArrowLeft", last - 1), ("Home", 1), ("ArrowRight", 2)):
        page.keyboard.press(key)
        expect(bars).to_have_attribute("aria-valuenow", str(frame))
        spoken = bars.get_attribute("aria-valuetext") or ""
        assert spoken.startswith(f"frame {frame} of {last} at 0:0")
    times = page.evaluate("[video.currentTime, video.paused]")
    assert times[0] > 0
    assert times[1]


def test_a_keyboard_goes_on_where_a_button_hides_itself(open_page: Visit) -> None:
    page = open_page.page
    ask, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Ask", "Stop"))
    question = page.locator("#question")
    page.set_input_files("#files", VIDEO)
    page.route("**/v1/chat/completions", lambda _: None)
    question.fill("What is it?")
    ask.press("Enter")
    expect(stop).to_be_focused()
    stop.press("Enter")
    expect(question).to_be_focused()
    page.unroute_all()
    question.fill("What is it?")
    ask.press("Enter")
    page.locator(".turn .cost").wait_for()
    expect(question).to_be_focused()
    page.set_input_files("#files", [VIDEO, VIDEO])
    page.get_by_role("button", name="Dismiss").press("Enter")
    expect(question).to_be_focused()
    page.get_by_role("button", name="Other media").click()
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#live-note")).to_contain_text("sent")
    open_page.ask("What is seen?")
    page.get_by_role("button", name="Back to live").press("Enter")
    expect(question).to_be_focused()


def test_a_click_on_the_timeline_goes_there(open_page: Visit) -> None:
    page = open_page.page
    page.set_input_files("#files", VIDEO)
    open_page.ask("What is it?")
    bars = page.locator("#bars")
    box = bars.bounding_box()
    assert box is not None
    bars.click(position={"x": box["width"] - 4, "y": box["height"] / 2})
    count = page.locator(".bar").count()
    expect(bars).to_have_attribute("aria-valuenow", str(count))
    assert page.evaluate("video.currentTime / video.duration") > 0.5


def test_pictures_are_gone_through_on_the_timeline(open_page: Visit, tmp_path: Path) -> None:
    from PIL import Image

    page = open_page.page
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (80, 60), colour).save(path)
    page.set_input_files("#files", paths)
    open_page.ask("What colour are they?")
    bars = page.get_by_role("slider", name="Picture")
    expect(bars).to_have_attribute("aria-valuemax", "2")
    bars.press("End")
    expect(page.get_by_role("img", name="Picture 2 of 2")).to_be_visible()
    open_page.ask("And now?")
    assert open_page.fact(1)[1] == "0 frames encoded"


@pytest.mark.parametrize(
    ("name", "count", "noun"),
    [("a.gif", 6, "Frame"), ("a.png", 6, "Frame"), ("a.gif", 1, "Picture")],
)
def test_a_picture_may_move(
    open_page: Visit, tmp_path: Path, name: str, count: int, noun: str
) -> None:
    from PIL import Image

    page = open_page.page
    first, *others = (Image.fromarray(frame) for frame in numbered_frames(count))
    first.save(tmp_path / name, save_all=True, append_images=others, duration=100)
    page.set_input_files("#files", tmp_path / name)
    open_page.ask("What is it?")
    bars = page.get_by_role("slider", name=noun, exact=True)
    sampled = int(open_page.fact(0)[0].split()[0])
    assert (sampled > 1) is (count > 1)
    expect(bars).to_have_attribute("aria-valuemax", str(sampled))
    for key, one in (("Home", 1), ("End", sampled)):
        bars.press(key)
        expect(bars).to_have_attribute("aria-valuenow", str(one))
        expect(page.get_by_role("img", name="Picture 1 of 1")).to_be_visible()
        assert page.evaluate("picture.naturalWidth") == 96
    open_page.ask("And now?")
    assert open_page.fact(1)[1] == "0 frames encoded"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Browser, server: Served, scheme: str) -> None:
    with visit(browser, server.url, color_scheme=scheme) as it:
        it.page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        it.ask("What is it now?")
        red, *_ = re.findall(r"\d+", it.page.evaluate("getComputedStyle(document.body).background"))
        assert (int(red) > 128) is (scheme == "light")
        texts = (".server", ".asked", ".answer", ".facts li", ".facts .kept", ".look", "#send",
                 "#clock", "#here", "#guide", "#options summary", "#other")  # fmt: skip
        for selector, contrast in it.page.evaluate(CONTRAST, list(texts)):
            assert contrast >= 4.5, selector
        it.check()


def test_a_narrow_screen_shows_all_of_it(browser: Browser, server: Served) -> None:
    with visit(browser, server.url, viewport={"width": 320, "height": 640}) as it:
        it.page.set_input_files("#files", VIDEO)
        it.ask("What is it?")
        assert it.page.evaluate("document.documentElement.scrollWidth") <= 320
        it.check()
