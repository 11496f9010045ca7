// The camera: frames go to the server as they are taken, questions are about the last seconds.

import { Refusal } from "./api.js";

// A browser sends no key with a socket but among the protocols that it offers.
const PROTOCOL = "ppllava";
const WIDEST = 512; // of what is sent; a model sees less than that
const QUALITY = 0.85;
const MOST_WAITING = 1 << 20; // bytes not sent yet: beyond, frames are left out and not queued
const OPENING_SECONDS = 10;

/** A camera and the session in which the server sees it. */
export class Live {
  /**
   * @param {HTMLVideoElement} video Shows the camera.
   * @param {{onChange: () => void, onEnd: (error: Error) => void}} on
   */
  constructor(video, { onChange, onEnd }) {
    this.video = video;
    this.onChange = onChange;
    this.onEnd = onEnd;
    this.canvas = document.createElement("canvas");
    this.sent = []; // {time, blob}: what an answer's heatmaps are laid over
    this.numSent = 0;
    this.numDropped = 0; // here; the server tells with each answer how many it left out
    this.numAsked = 0;
    this.waiting = null; // the question that is being answered
    this.shape = null; // of the session, once the server has begun it
    this.isClosed = false;
  }

  /** Asks for the camera; an AbortError where it is not wanted any more when it is allowed. */
  async start() {
    if (!navigator.mediaDevices) {
      throw new Error("A browser gives its camera only to pages from https or from localhost.");
    }
    try {
      const wanted = { video: { width: { ideal: 640 }, facingMode: "environment" }, audio: false };
      this.stream = await navigator.mediaDevices.getUserMedia(wanted);
    } catch (error) {
      throw new Error(
        error.name === "NotAllowedError"
          ? "The camera was not allowed: the browser's address bar lets you change that."
          : "There is no camera that can be used: is another program using it?",
      );
    }
    if (this.isClosed) {
      this.release();
      throw aborted();
    }
    this.stream.getVideoTracks()[0].addEventListener("ended", () => {
      this.fail(new Error("The camera was switched off."));
    });
  }

  /** Opens the session; a refusal of the server is a Refusal, and an AbortError that it was left. */
  async connect(key) {
    if (this.isClosed) throw aborted();
    const url = new URL("/v1/video/chat/stream", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url, key ? [PROTOCOL, `key.${base64Url(key)}`] : [PROTOCOL]);
    this.socket = socket;
    let late;
    try {
      await new Promise((resolve, reject) => {
        late = setTimeout(() => reject(lost()), 1000 * OPENING_SECONDS);
        this.onStarted = resolve;
        this.onLeft = () => reject(aborted());
        socket.onopen = () => this.send({ type: "session.config" });
        socket.onmessage = (message) => this.receive(JSON.parse(message.data));
        socket.onclose = () => reject(this.refused ?? lost());
      });
    } finally {
      clearTimeout(late);
    }
    socket.onclose = () => this.fail(this.refused ?? lost());
    this.began = performance.now();
    this.clock = setInterval(() => this.take(), 1000 / this.shape.fps);
  }

  /**
   * The answer to a question about the window as it is now.
   * @param {string} text
   * @param {object} fields Of sampling.
   * @param {(text: string) => void} onText
   */
  ask(text, fields, onText) {
    return new Promise((resolve, reject) => {
      const id = String((this.numAsked += 1));
      this.waiting = { id, resolve, reject, onText, text: "" };
      this.send({ type: "video.query", id, text, ...fields });
    });
  }

  /** The pictures of an answer's window: those that were sent at its times. */
  window(timestamps) {
    return timestamps.map((time) => {
      const near = (a, b) => (Math.abs(a.time - time) <= Math.abs(b.time - time) ? a : b);
      return this.sent.length ? this.sent.reduce(near).blob : null;
    });
  }

  /** Leaves the answer that is coming; what still comes of it is passed over. */
  cancel() {
    if (!this.waiting) return;
    if (this.socket.readyState === WebSocket.OPEN) this.send({ type: "response.cancel" });
    this.waiting.reject(aborted());
    this.waiting = null;
  }

  /** Ends the session and switches the camera off, also one that is allowed only later. */
  close() {
    if (this.isClosed) return;
    this.isClosed = true;
    clearInterval(this.clock);
    this.release();
    this.cancel();
    this.onLeft?.();
    if (this.socket) {
      this.socket.onclose = null;
      if (this.socket.readyState === WebSocket.OPEN) this.send({ type: "video.done" });
      this.socket.close();
    }
  }

  release() {
    this.stream?.getTracks().forEach((track) => track.stop());
  }

  /** Sends the frame that is seen now. */
  take() {
    const { video, canvas, socket } = this;
    if (!video.videoWidth || socket.readyState !== WebSocket.OPEN) return;
    if (this.isTaking || socket.bufferedAmount > MOST_WAITING) {
      this.numDropped += 1;
      this.onChange();
      return;
    }
    this.isTaking = true;
    const time = (performance.now() - this.began) / 1000;
    const scale = Math.min(1, WIDEST / Math.max(video.videoWidth, video.videoHeight));
    canvas.width = Math.round(video.videoWidth * scale);
    canvas.height = Math.round(video.videoHeight * scale);
    canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => this.put(blob, time), "image/jpeg", QUALITY);
  }

  async put(blob, time) {
    const data = await base64(blob);
    this.isTaking = false;
    if (this.isClosed || this.socket.readyState !== WebSocket.OPEN) return;
    this.send({ type: "video.frame", data, timestamp: time });
    this.numSent += 1;
    this.sent.push({ time, blob });
    // Twice the window: an answer is about the window at the time of its question.
    if (this.sent.length > 2 * this.shape.num_frames + 2) this.sent.shift();
    this.onChange();
  }

  receive(event) {
    // What is about another question is about one that nobody waits for any more.
    const waiting = this.waiting?.id === event.id ? this.waiting : null;
    if (event.type === "session.started") {
      this.shape = event;
      this.onStarted();
    } else if (event.type === "response.text.delta" && waiting) {
      waiting.text += event.delta;
      waiting.onText(waiting.text);
    } else if (event.type === "response.text.done" && waiting) {
      this.waiting = null;
      const { text, usage, x_ppllava: extra, finish_reason: finish } = event;
      this.counts = extra.live;
      waiting.resolve({ text, usage, extra, finish });
      this.onChange();
    } else if (event.type === "error") {
      // A frame that could not be taken ends no question: the answers count it.
      if (event.param?.startsWith("video.frame")) return;
      const error = new Refusal(event.message, { status: 200, code: event.code });
      if (event.id === undefined) this.refused = error; // what a closing may be explained by
      // A question that could not even be read has no id.
      if (this.waiting && (waiting || event.id === undefined)) {
        this.waiting.reject(error);
        this.waiting = null;
      }
    }
  }

  fail(error) {
    this.waiting?.reject(error);
    this.waiting = null; // not cancelled: that would pass for a person's wish
    this.close();
    this.onEnd(error);
  }

  send(event) {
    this.socket.send(JSON.stringify(event));
  }
}

/** What a person does not want any more. */
function aborted() {
  return new DOMException("stopped", "AbortError");
}

/** What is known of a socket that was closed without a word. */
function lost() {
  return new Refusal("The connection to the server was lost. Is it still running?");
}

/** A key as the name of a protocol may be. */
function base64Url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** What a picture is in base64. */
function base64(blob) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(blob);
  });
}
