// What is looked at, with the heatmap over it: a video, a picture, the camera, or a frame of it.

import { byId } from "./dom.js";

const SHARPEST = 960; // pixels of the canvas the warmth is drawn on: it is smooth anyway

/** The screen on the page. */
export class Stage {
  /** @param {() => void} onMove Called whenever another moment is shown. */
  constructor(onMove) {
    this.video = byId("video");
    this.picture = byId("picture");
    this.onMove = onMove;
    this.heat = []; // {time, image} per frame, or one per picture
    this.still = null; // the index of what is shown where that is a picture
    this.canvas = byId("heat");
    this.strength = byId("strength").valueAsNumber / 100;
    this.loop = 0;
    this.blindTime = 0; // what is gone to in a video that is not seen
    for (const event of ["play", "pause", "seeked", "loadeddata", "ended"]) {
      this.video.addEventListener(event, () => this.follow());
    }
    this.video.addEventListener("resize", () => this.fit());
    this.picture.addEventListener("load", () => this.fit());
    this.video.addEventListener("error", () => this.showBlind());
  }

  /** Shows nothing, and waits for something. */
  clear() {
    this.video.pause();
    this.video.srcObject = null;
    this.video.removeAttribute("src");
    this.setHeat([]);
    this.still = null;
    this.reveal("empty");
  }

  /** Shows a video that can be played. */
  showVideo(url) {
    this.still = null;
    this.blindTime = 0;
    this.video.srcObject = null;
    this.video.loop = true;
    this.video.src = url;
    this.reveal("video");
  }

  /** Shows what a camera sees. */
  showCamera(stream) {
    this.still = null;
    if (this.video.srcObject !== stream) {
      this.video.removeAttribute("src");
      this.video.srcObject = stream;
    }
    this.reveal("camera");
    return this.video.play();
  }

  /** Shows one picture, or one frame of the camera, and the warmth of that index. */
  showStill(url, index, description) {
    this.still = index;
    if (this.picture.src !== url) this.picture.src = url;
    this.picture.alt = description;
    this.reveal("still");
    this.follow();
  }

  /** Says that this browser cannot play a video which the server may well read. */
  showBlind() {
    if (!this.video.getAttribute("src")) return;
    byId("blind").textContent =
      "This browser cannot play this file. The server reads more kinds: ask anyway, and the " +
      "heatmap is shown without the picture.";
    this.reveal("blind");
    this.onMove();
  }

  /** The moment that is shown, in seconds. */
  get time() {
    return this.mode === "blind" ? this.blindTime : this.video.currentTime;
  }

  seek(time) {
    this.blindTime = time;
    if (this.mode === "video") this.video.currentTime = time;
    this.follow();
  }

  toggle() {
    if (this.video.paused) this.video.play();
    else this.video.pause();
  }

  /**
   * Lays warmth over what is shown.
   * @param {{time: number, image: ImageBitmap}[]} heat
   */
  setHeat(heat) {
    this.heat = heat;
    this.follow();
  }

  /** Draws, and goes on as long as the video plays. */
  follow() {
    cancelAnimationFrame(this.loop);
    this.draw();
    this.onMove();
    if (this.mode === "video" && !this.video.paused) {
      this.loop = requestAnimationFrame(() => this.follow());
    }
  }

  reveal(mode) {
    this.mode = mode;
    byId("stage").dataset.mode = mode;
    byId("drop").hidden = mode !== "empty";
    byId("screen").hidden = mode === "empty";
    this.video.hidden = mode === "still" || mode === "blind";
    this.picture.hidden = mode !== "still";
    this.fit();
  }

  /** Gives the screen the shape of what is on it, so that the warmth lies where it belongs. */
  fit() {
    const { mode, video, picture } = this;
    let [width, height] = mode === "still"
      ? [picture.naturalWidth, picture.naturalHeight]
      : [video.videoWidth, video.videoHeight];
    if (!width || !height) [width, height] = [16, 9];
    byId("screen").style.setProperty("--shape", width / height);
    const scale = Math.min(1, SHARPEST / Math.max(width, height));
    this.canvas.width = Math.max(320, Math.round(width * scale));
    this.canvas.height = Math.max(1, Math.round((this.canvas.width * height) / width));
    this.draw();
  }

  draw() {
    const { canvas, heat } = this;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    byId("blind").hidden = this.mode !== "blind" || heat.length > 0;
    if (!heat.length || this.mode === "camera") return;
    for (const [index, share] of this.shares()) {
      context.globalAlpha = share * this.strength;
      context.drawImage(heat[index].image, 0, 0, canvas.width, canvas.height);
    }
  }

  /** Which of the frames' warmth is seen now: between two frames, some of both. */
  shares() {
    const { heat, time } = this;
    if (this.still !== null) return heat[this.still] ? [[this.still, 1]] : [];
    const next = heat.findIndex((frame) => frame.time > time);
    if (next === 0) return [[0, 1]];
    if (next < 0) return [[heat.length - 1, 1]];
    const share = (time - heat[next - 1].time) / (heat[next].time - heat[next - 1].time);
    return [[next - 1, 1 - share], [next, share]];
  }
}
