// The page: something is chosen, asked about, answered, and looked at again.

import { Refusal, complete, isReady, readModel, readSettings } from "./api.js";
import { sentence } from "./cost.js";
import { announce, byId, clock, counted } from "./dom.js";
import { withKey } from "./key.js";
import { Live } from "./live.js";
import { Media } from "./media.js";
import { offer, options } from "./options.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";
import { Turns } from "./turns.js";

const POLL_MILLISECONDS = 2000;

const state = {
  settings: null,
  model: null,
  media: null,
  live: null,
  shown: null, // the turn whose heatmap is seen
  running: null, // AbortController of the request under way
};

const stage = new Stage(() => {
  if (stage.still === null) timeline.follow(stage.time);
  showClock();
});
const timeline = new Timeline(goTo);
const turns = new Turns(showTurn);

// What is looked at

function choose(files) {
  if (!files.length) return;
  let media;
  try {
    media = new Media([...files]);
    if (state.settings) media.check(state.settings);
  } catch (error) {
    media?.close();
    complain(error);
    return;
  }
  leave();
  state.media = media;
  if (media.kind === "video") stage.showVideo(media.urls[0]);
  else stage.showStill(media.urls[0], 0, `Picture 1 of ${media.files.length}`);
  byId("question").placeholder = `Ask about the ${media.kind === "video" ? "video" : "pictures"}`;
  arrange();
  announce(`${media.kind === "video" ? media.files[0].name : counted(media.files.length, "picture")} chosen.`);
  byId("question").focus();
}

async function startCamera() {
  if (state.live) return; // it is waited for
  leave();
  const live = new Live(stage.video, {
    onChange: showLive,
    onEnd: (error) => {
      if (state.live === live) {
        leave();
        complain(error);
      }
    },
  });
  state.live = live;
  arrange();
  try {
    await live.start();
    await stage.showCamera(live.stream);
    // A browser is not told why a socket was refused: whether the key is good is asked before.
    await withKey(async (key) => {
      state.model = await readModel(key);
      await live.connect(key);
    });
  } catch (error) {
    if (state.live !== live) return; // something else is looked at by now
    leave();
    complain(error);
    return;
  }
  byId("question").placeholder = "Ask about what the camera sees";
  arrange();
  announce("The camera is on.");
  byId("question").focus();
}

/** Forgets what was looked at, and all that was asked about it. */
function leave() {
  state.running?.abort();
  state.media?.close();
  state.live?.close();
  state.media = state.live = state.shown = state.running = null;
  complain(null);
  turns.clear();
  timeline.show([], "frame", "");
  stage.clear();
  arrange();
}

// Questions

async function ask(question) {
  if (state.running || !question) return;
  const { media, live } = state;
  if (!media && !live?.shape) {
    const why = live
      ? "The camera is not on yet: allow it, or choose a video or pictures."
      : "Choose a video or pictures first, or start the camera.";
    complain(new Error(why));
    return;
  }
  complain(null);
  const turn = turns.add(question);
  const running = new AbortController();
  const { signal } = running;
  state.running = running;
  byId("question").value = "";
  grow();
  arrange();
  announce("Looking…");
  try {
    const answer = await (live ? askLive(live, turn, signal) : askMedia(media, turn, signal));
    if (state.running !== running) return;
    turn.finish(answer);
    turns.keep(turn);
    const images = await Promise.all((answer.extra?.relevance?.heatmaps ?? []).map(picture));
    // Meanwhile something else may have been chosen, which this is not about.
    if (state.running !== running || signal.aborted) return;
    understand(turn, images);
    announce(`${answer.text}. ${answer.extra ? sentence(answer.extra) : ""}`);
    if (turn.heat.length) showTurn(turn);
  } catch (error) {
    if (error.name === "AbortError") turn.stop();
    else {
      turns.remove(turn);
      byId("question").value ||= question;
      if (state.running === running) complain(error);
    }
  } finally {
    if (state.running === running) state.running = null;
    arrange();
  }
}

function askLive(live, turn, signal) {
  signal.addEventListener("abort", () => live.cancel());
  const fields = { ...options().asked, x_ppllava: { relevance: "heatmaps" } };
  return live.ask(turn.question, fields, (text) => turn.write(text));
}

async function askMedia(media, turn, signal) {
  const onText = (text) => turn.write(text);
  const send = async () => {
    const body = await request(media, turn.question);
    return withKey((key) => complete(body, { key, signal, onText }));
  };
  let answer;
  try {
    answer = await send();
  } catch (error) {
    // It made room for others since, or is asked to look at other frames: all of it once more.
    if (!media.isKnown || error.code !== "media_not_found") throw error;
    media.isKnown = false;
    answer = await send();
  }
  media.isKnown = true;
  return answer;
}

async function request(media, question) {
  const { asked, seen, remember } = options();
  const earlier = remember ? turns.done.filter((turn) => turn.text) : [];
  const messages = [...earlier, null].flatMap((turn) =>
    turn
      ? [
          { role: "user", content: [{ type: "text", text: turn.question }] },
          { role: "assistant", content: turn.text },
        ]
      : [{ role: "user", content: [{ type: "text", text: question }] }],
  );
  messages[0].content.unshift(...(await media.parts()));
  return {
    model: state.model ?? (state.model = await withKey(readModel)),
    messages,
    ...asked,
    ...(media.kind === "video" ? seen : {}),
    x_ppllava: { relevance: "heatmaps" },
  };
}

/** Makes of an answer's relevance, and of its heatmaps, what the timeline and the stage show. */
function understand(turn, images) {
  if (!images.length) return;
  const { relevance, media: parts } = turn.extra;
  const times = relevance.timestamps ?? parts[0]?.timestamps ?? [];
  const isVideo = state.live !== null || parts[0].kind === "video";
  const pictures = state.live?.window(times) ?? [];
  turn.frames = relevance.curve.map((value, i) => ({ value, time: isVideo ? times[i] : null }));
  turn.heat = images.map((image, i) => ({
    image,
    time: times[i] ?? i,
    url: pictures[i] && URL.createObjectURL(pictures[i]),
  }));
  turn.button.hidden = false;
}

/** A heatmap, ready to be drawn. */
async function picture(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

function showTurn(turn) {
  state.shown = turn;
  turns.mark(turn);
  stage.setHeat(turn.heat);
  timeline.index = 0;
  timeline.show(turn.frames, turn.frames[0]?.time === null ? "picture" : "frame", turn.question);
  if (state.live || state.media.kind === "image") goTo(timeline.warmest);
  else timeline.follow(stage.time);
  arrange();
}

/** Shows a frame that was chosen on the timeline. */
function goTo(index) {
  const { media, live, shown } = state;
  if (live) {
    const { url } = shown.heat[index];
    if (url) stage.showStill(url, index, `Frame ${index + 1} of the camera`);
  } else if (media.kind === "image") {
    // One that moves has one file for all frames, and goes on by itself under their heatmaps.
    const at = Math.min(index, media.files.length - 1);
    stage.showStill(media.urls[at], index, `Picture ${at + 1} of ${media.files.length}`);
  } else {
    stage.video.pause();
    stage.seek(shown.frames[index].time);
  }
  timeline.mark(index);
  arrange();
}

// What the page shows of all that

function arrange() {
  showClock();
  const { media, live, running } = state;
  hide("tools", !media && !live);
  hide("back", !live || stage.mode !== "still");
  byId("other").textContent = live ? "Stop the camera" : "Other media";
  hide("stop", running === null);
  hide("send", running !== null, "stop");
  byId("badge").hidden = !live;
  if (live) byId("badge").textContent = stage.mode === "camera" ? "Live" : "As it was";
  byId("badge").dataset.live = String(stage.mode === "camera");
  byId("live-note").hidden = !live;
  offer(live ? "camera" : (media?.kind ?? ""));
}

/** Hides something or shows it; a focus in it moves on, as a keyboard would begin at the top again. */
function hide(id, isHidden, next = "question") {
  const hadFocus = byId(id).contains(document.activeElement);
  byId(id).hidden = isHidden;
  if (isHidden && hadFocus) byId(next).focus();
}

function showClock() {
  const { video } = stage;
  byId("play").hidden = byId("clock").hidden = stage.mode !== "video";
  const length = Number.isFinite(video.duration) ? ` / ${clock(video.duration)}` : "";
  byId("clock").textContent = `${clock(stage.time)}${length}`;
  byId("play").setAttribute("aria-label", video.paused ? "Play" : "Pause");
  byId("play").dataset.playing = String(!video.paused);
}

function showLive() {
  const { live } = state;
  if (!live?.shape) return;
  const { seconds, fps } = live.shape;
  const { dropped: numLate = 0, failed: numFailed = 0 } = live.counts ?? {};
  const numDropped = live.numDropped + numLate + numFailed;
  const dropped = numDropped ? `, ${numDropped} left out` : "";
  byId("live-note").textContent =
    `Questions are about the last ${seconds} s, at ${fps} frames a second. ` +
    `${counted(live.numSent, "frame")} sent${dropped}.`;
}

function complain(error) {
  hide("error", error === null);
  byId("error-text").textContent = error === null ? "" : error.message;
  if (error instanceof Refusal && error.status === 0) watchServer();
}

// The server

/** Looks until the server is ready, and says what it is. */
async function watchServer() {
  const say = (text, name) => {
    byId("server").textContent = text;
    byId("server").dataset.state = name;
  };
  for (;;) {
    try {
      state.settings ??= await readSettings();
      if (await isReady()) {
        state.model = await withKey(readModel);
        say(state.model, "ready");
        return;
      }
      say("warming up…", "waiting");
    } catch (error) {
      if (error.status) {
        say("not to be asked", "gone");
        complain(error);
        return;
      }
      say("not reachable", "gone");
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
  }
}

// Hands

function grow() {
  const field = byId("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => {
  choose(event.target.files);
  event.target.value = "";
});
byId("camera").addEventListener("click", startCamera);
byId("other").addEventListener("click", () => {
  leave();
  byId("choose").focus();
});
byId("play").addEventListener("click", () => stage.toggle());
byId("back").addEventListener("click", () => {
  stage.showCamera(state.live.stream);
  arrange();
});
byId("warm").addEventListener("change", (event) => {
  byId("heat").hidden = !event.target.checked;
  byId("strength").disabled = !event.target.checked;
});
byId("strength").addEventListener("input", (event) => {
  stage.strength = event.target.valueAsNumber / 100;
  stage.draw();
});
byId("error-close").addEventListener("click", () => complain(null));
byId("stop").addEventListener("click", () => state.running?.abort());
byId("question").addEventListener("input", grow);
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  } else if (event.key === "Escape") state.running?.abort();
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(byId("question").value.trim());
});
const target = document.documentElement;
target.addEventListener("dragover", (event) => {
  event.preventDefault();
  target.classList.add("dragging");
});
target.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) target.classList.remove("dragging");
});
target.addEventListener("drop", (event) => {
  event.preventDefault();
  target.classList.remove("dragging");
  choose(event.dataTransfer.files);
});
window.addEventListener("pagehide", () => state.live?.close());

watchServer();
