// The page: something is chosen, asked about, answered, and looked at again.

import { Refusal, complete, isReady, readModel, readSettings } from "./api.js";
import { sentence } from "./cost.js";
import { announce, byId, clock, counted } from "./dom.js";
import { Live } from "./live.js";
import { Media } from "./media.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";
import { Turns } from "./turns.js";

const KEY = "ppllava-key";
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
  complain(null);
  leave();
  const live = new Live(stage.video, state.settings, {
    onChange: showLive,
    onEnd: (error) => {
      if (state.live === live) {
        leave();
        complain(error);
      }
    },
  });
  state.live = live;
  try {
    await live.start();
    await stage.showCamera(live.stream);
    // A browser is not told why a socket was refused: whether the key is good is asked before.
    await withKey(async (key) => {
      state.model = await readModel(key);
      await live.connect(key);
    });
  } catch (error) {
    if (state.live === live) leave();
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
  state.media = state.live = state.shown = null;
  complain(null);
  turns.clear();
  timeline.show([], "frame", "");
  stage.clear();
  arrange();
}

// Questions

async function ask(question) {
  if (state.running || !question) return;
  if (!state.media && !state.live) {
    complain(new Error("Choose a video or pictures first, or start the camera."));
    return;
  }
  complain(null);
  const turn = turns.add(question);
  const running = new AbortController();
  state.running = running;
  byId("question").value = "";
  grow();
  arrange();
  announce("Looking…");
  try {
    const answer = await (state.live ? askLive : askMedia)(turn, running.signal);
    turn.finish(answer);
    turns.keep(turn);
    await understand(turn, answer.extra);
    turn.button.hidden = turn.heat.length === 0;
    announce(`${answer.text}. ${answer.extra ? sentence(answer.extra) : ""}`);
    if (turn.heat.length) showTurn(turn);
  } catch (error) {
    if (error.name === "AbortError") turn.stop();
    else {
      turns.remove(turn);
      byId("question").value ||= question;
      complain(error);
    }
  } finally {
    if (state.running === running) state.running = null;
    arrange();
  }
}

function askLive(turn, signal) {
  signal.addEventListener("abort", () => state.live?.cancel());
  const fields = { ...options().asked, x_ppllava: { relevance: "heatmaps" } };
  return state.live.ask(turn.question, fields, (text) => turn.write(text));
}

async function askMedia(turn, signal) {
  const { media } = state;
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

/** What the options say, leaving out what is the server's to decide. */
function options() {
  const read = (id) => (byId(id).value === "" ? undefined : byId(id).valueAsNumber);
  const numTokens = read("num-tokens");
  const numFrames = read("num-frames");
  return {
    asked: {
      temperature: read("temperature") ?? 0,
      max_completion_tokens: read("max-tokens"),
      mm_processor_kwargs: numTokens === undefined ? undefined : { num_tokens: numTokens },
    },
    seen: {
      media_io_kwargs: numFrames === undefined ? undefined : { video: { num_frames: numFrames } },
    },
    remember: byId("remember").checked,
  };
}

/** Makes of an answer's relevance what the timeline and the stage show. */
async function understand(turn, extra) {
  const relevance = extra?.relevance;
  if (!relevance?.heatmaps) return;
  const times = relevance.timestamps ?? extra.media[0]?.timestamps ?? [];
  const images = await Promise.all(relevance.heatmaps.map(picture));
  const isVideo = state.live !== null || state.media.kind === "video";
  const pictures = state.live ? state.live.window(times) : [];
  turn.frames = relevance.curve.map((value, i) => ({ value, time: isVideo ? times[i] : null }));
  turn.heat = images.map((image, i) => ({ image, time: times[i] ?? i, url: pictures[i]?.url }));
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
    stage.showStill(media.urls[index], index, `Picture ${index + 1} of ${media.files.length}`);
  } else {
    stage.video.pause();
    stage.seek(shown.frames[index].time);
  }
  timeline.mark(index);
  arrange();
}

// What the page shows of all that

function arrange() {
  const { media, live, running } = state;
  const isVideo = media?.kind === "video";
  byId("tools").hidden = !media && !live;
  byId("play").hidden = byId("clock").hidden = !isVideo;
  byId("back").hidden = !live || stage.mode === "camera";
  byId("other").textContent = live ? "Stop the camera" : "Other media";
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("badge").hidden = !live;
  if (live) byId("badge").textContent = stage.mode === "camera" ? "Live" : "As it was";
  byId("badge").dataset.live = String(stage.mode === "camera");
  byId("live-note").hidden = !live;
}

function showClock() {
  const { video } = stage;
  const length = Number.isFinite(video.duration) ? ` / ${clock(video.duration)}` : "";
  byId("clock").textContent = `${clock(stage.time)}${length}`;
  byId("play").setAttribute("aria-label", video.paused ? "Play" : "Pause");
  byId("play").dataset.playing = String(!video.paused);
}

function showLive() {
  const { live, settings } = state;
  if (!live) return;
  const seconds = live.shape?.seconds ?? settings.live_seconds;
  const numDropped = live.numDropped + (live.counts?.dropped ?? 0);
  const dropped = numDropped ? `, ${numDropped} left out` : "";
  byId("live-note").textContent =
    `Questions are about the last ${seconds} s, at ${live.shape?.fps ?? settings.live_fps} frames ` +
    `a second. ${counted(live.numSent, "frame")} sent${dropped}.`;
}

function complain(error) {
  byId("error").hidden = error === null;
  byId("error-text").textContent = error === null ? "" : error.message;
  if (error instanceof Refusal && error.status === 0) watchServer();
}

// The server

/** Runs something that may want a key, and asks for one as long as it is refused. */
async function withKey(run) {
  for (;;) {
    try {
      return await run(sessionStorage.getItem(KEY) ?? "");
    } catch (error) {
      if (error.status !== 401 || !(await askForKey())) throw error;
    }
  }
}

/** Whether a person gave a key. */
function askForKey() {
  const dialog = byId("key-dialog");
  dialog.returnValue = "";
  byId("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "given";
        if (given) sessionStorage.setItem(KEY, byId("key").value.trim());
        resolve(given);
      },
      { once: true },
    );
  });
}

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
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key-dialog").close("given");
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));

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
