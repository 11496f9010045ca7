// Relevance per frame, as bars: one slider, so one stop for the keyboard and each frame a step of it.

import { byId, clock, make, signed } from "./dom.js";

/** The bars under the screen. */
export class Timeline {
  /** @param {(index: number) => void} onChoose Called when a person goes to a frame. */
  constructor(onChoose) {
    this.bars = byId("bars");
    this.onChoose = onChoose;
    this.frames = [];
    this.index = 0;
    this.bars.addEventListener("keydown", (event) => this.press(event));
    this.bars.addEventListener("pointerdown", (event) => {
      this.bars.setPointerCapture(event.pointerId);
      this.point(event);
    });
    this.bars.addEventListener("pointermove", (event) => {
      if (this.bars.hasPointerCapture(event.pointerId)) this.point(event);
    });
  }

  /**
   * Shows an answer's frames; none hides the timeline.
   * @param {{time: number|null, value: number, picture?: string}[]} frames
   * @param {string} noun What each is: "frame" or "picture".
   * @param {string} guide The question that made them warm.
   */
  show(frames, noun, guide) {
    this.frames = frames;
    this.noun = noun;
    byId("timeline").hidden = frames.length === 0;
    if (!frames.length) return;
    const values = frames.map((frame) => frame.value);
    const low = Math.min(...values);
    const span = Math.max(...values) - low || 1;
    this.bars.replaceChildren(
      ...frames.map((frame) => {
        const bar = make("span.bar");
        bar.style.setProperty("--height", 0.1 + (0.9 * (frame.value - low)) / span);
        return bar;
      }),
      make("span.head"),
    );
    this.bars.classList.toggle("many", frames.length > 40);
    this.bars.setAttribute("aria-valuemin", "1");
    this.bars.setAttribute("aria-valuemax", String(frames.length));
    this.bars.setAttribute("aria-label", noun === "frame" ? "Frame" : "Picture");
    this.warmest = values.indexOf(Math.max(...values));
    byId("guide").textContent = guide && `“${guide}”`;
    const timed = frames[0].time !== null;
    byId("first").textContent = timed ? clock(frames[0].time) : "";
    byId("last").textContent = timed ? clock(frames.at(-1).time) : "";
    this.mark(Math.min(this.index, frames.length - 1));
  }

  /** Marks the frame that is seen at a time, and where between two frames that is. */
  follow(time) {
    const { frames } = this;
    if (!frames.length || frames[0].time === null) return;
    const next = frames.findIndex((frame) => frame.time > time);
    let at = next < 0 ? frames.length - 1 : 0;
    if (next > 0) {
      const before = frames[next - 1].time;
      at = next - 1 + (time - before) / (frames[next].time - before);
    }
    this.mark(Math.round(at), at);
  }

  /** Marks a frame; `at` is where the line stands, in frames. */
  mark(index, at = index) {
    const { bars, frames } = this;
    this.index = index;
    const frame = frames[index];
    [...bars.children].forEach((bar, i) => bar.classList.toggle("here", i === index));
    bars.querySelector(".head").style.setProperty("--at", (at + 0.5) / frames.length);
    bars.setAttribute("aria-valuenow", String(index + 1));
    const moment = frame.time === null ? "" : ` at ${clock(frame.time)}`;
    const warmest = index === this.warmest ? ", the most relevant" : "";
    const what = `${this.noun} ${index + 1} of ${frames.length}${moment}`;
    const text = `${what}, relevance ${signed(frame.value)}${warmest}`;
    if (bars.getAttribute("aria-valuetext") !== text) bars.setAttribute("aria-valuetext", text);
    byId("here").textContent = `${what} · ${signed(frame.value)}`;
  }

  choose(index) {
    this.mark(Math.min(Math.max(index, 0), this.frames.length - 1));
    this.onChoose(this.index);
  }

  point(event) {
    const { left, width } = this.bars.getBoundingClientRect();
    this.choose(Math.floor(((event.clientX - left) / width) * this.frames.length));
  }

  press(event) {
    const last = this.frames.length - 1;
    const leap = Math.max(1, Math.round(last / 5));
    const to = {
      ArrowLeft: this.index - 1,
      ArrowDown: this.index - 1,
      ArrowRight: this.index + 1,
      ArrowUp: this.index + 1,
      PageDown: this.index - leap,
      PageUp: this.index + leap,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.choose(to);
  }
}
