// Questions and their answers: each a card that comes in, and that can be gone back to.

import { byId, make } from "./dom.js";
import { rescale, show, total } from "./cost.js";

/** One question and what came of it. */
export class Turn {
  /**
   * @param {string} question
   * @param {(turn: Turn) => void} onShow Called when a person wants to see where it looked.
   */
  constructor(question, onShow) {
    this.question = question;
    this.text = "";
    this.extra = null;
    this.frames = []; // what the timeline shows of it
    this.heat = []; // what the stage shows of it
    this.button = make("button.look.quiet", { type: "button", "aria-pressed": "false" }, "Where it looked");
    this.button.hidden = true;
    this.button.addEventListener("click", () => onShow(this));
    this.body = make("p.answer.pending", {}, make("span.dots", { "aria-hidden": "true" }));
    this.element = make("li.turn", {}, make("p.asked", {}, question), this.body);
  }

  /** Shows the answer as far as it came. */
  write(text) {
    this.text = text;
    this.body.classList.remove("pending");
    this.body.textContent = text;
    this.element.scrollIntoView({ block: "nearest" });
  }

  /** Shows what it cost, and that it is complete. */
  finish({ text, extra, finish }) {
    this.write(text || "(no words)");
    if (finish === "length") this.body.append(make("span.cut", {}, " … cut at the longest answer"));
    this.text = text;
    this.extra = extra;
    if (!extra) return;
    const damage = (extra.media ?? []).map((one) => one.damage).filter(Boolean);
    for (const note of damage) this.element.append(make("p.damage", {}, note));
    this.element.append(show(extra), this.button);
    this.element.scrollIntoView({ block: "nearest" });
  }

  /** Keeps what came until it was stopped. */
  stop() {
    this.body.classList.remove("pending");
    this.body.querySelector(".dots")?.remove();
    this.body.append(make("span.cut", {}, this.text ? " … stopped" : "stopped"));
  }
}

/** All of them. */
export class Turns {
  /** @param {(turn: Turn) => void} onShow See Turn. */
  constructor(onShow) {
    this.list = byId("turns");
    this.onShow = onShow;
    this.done = [];
  }

  /** A new card with a question. */
  add(question) {
    byId("hint").hidden = true;
    const turn = new Turn(question, this.onShow);
    this.list.append(turn.element);
    turn.element.scrollIntoView({ block: "nearest" });
    return turn;
  }

  keep(turn) {
    this.done.push(turn);
    const costly = this.done.filter((one) => one.extra);
    rescale(this.list, costly.map((one) => total(one.extra)));
  }

  remove(turn) {
    turn.element.remove();
    byId("hint").hidden = this.list.querySelector(".turn") !== null;
  }

  /** Marks the one whose heatmap is shown. */
  mark(turn) {
    for (const one of this.done) {
      one.element.classList.toggle("shown", one === turn);
      one.button.setAttribute("aria-pressed", String(one === turn));
    }
  }

  clear() {
    // Of the camera; files are let go of where they were chosen.
    for (const { url } of this.done.flatMap((turn) => turn.heat)) if (url) URL.revokeObjectURL(url);
    this.done = [];
    this.list.querySelectorAll(".turn").forEach((element) => element.remove());
    byId("hint").hidden = false;
  }
}
