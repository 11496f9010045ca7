// What an answer cost: frames, tokens, and a bar of milliseconds per stage.

import { counted, duration, make } from "./dom.js";

const STAGES = {
  decode: "decode the file",
  preprocess: "resize the frames",
  vision: "vision tower",
  text: "text tower",
  pool: "pool by the question",
  prefill: "read the prompt",
  generate: "write the answer",
};

/** The stages' milliseconds, in their order; whatever else the server adds up is left out. */
function stages(milliseconds) {
  return Object.keys(STAGES).map((name) => [name, milliseconds[name] ?? 0]);
}

/** All stages together. */
export function total(extra) {
  return stages(extra.milliseconds).reduce((sum, [, spent]) => sum + spent, 0);
}

/** The cost in a sentence. */
export function sentence(extra) {
  const { frames, tokens } = extra;
  return (
    `${counted(frames.encoded, "frame")} encoded, ${counted(tokens.after, "visual token")} of ` +
    `${tokens.before.toLocaleString("en")}, ${duration(total(extra))} in all.`
  );
}

/** The cost as elements: facts, a bar, and a table behind it. */
export function show(extra) {
  const { frames, tokens } = extra;
  const spent = stages(extra.milliseconds);
  const sum = total(extra);
  const first = sum - (extra.milliseconds.generate ?? 0);
  const facts = make(
    "ul.facts",
    {},
    make("li", {}, counted(frames.sampled, "frame")),
    make(frames.encoded ? "li" : "li.kept", {}, `${counted(frames.encoded, "frame")} encoded`),
    make("li", {}, `${tokens.before.toLocaleString("en")} → ${counted(tokens.after, "token")}`),
    make("li", {}, `first token ${duration(first)}`),
  );
  const bar = make("span.bar-of-stages", { "aria-hidden": "true" });
  const rows = make("tbody");
  for (const [name, milliseconds] of spent) {
    const segment = make(`span.stage-${name}`);
    segment.style.setProperty("--share", milliseconds);
    if (milliseconds > 0) bar.append(segment);
    rows.append(
      make(
        "tr",
        {},
        make("th", { scope: "row" }, make(`i.swatch.stage-${name}`, { "aria-hidden": "true" }), STAGES[name]),
        make("td", {}, duration(milliseconds)),
      ),
    );
  }
  const table = make("table", {}, make("caption.unseen", {}, "Milliseconds per stage"), rows);
  const summary = make("summary", {}, make("span.track", {}, bar), make("span.sum", {}, duration(sum)));
  summary.setAttribute("aria-label", `${duration(sum)} in all, by stage`);
  return make("div.cost", {}, facts, make("details", {}, summary, table));
}

/** Draws all bars to one scale, so that one sees how much less a second question takes. */
export function rescale(root, totals) {
  const most = Math.max(...totals, 1e-9);
  root.querySelectorAll(".bar-of-stages").forEach((bar, i) => {
    bar.style.setProperty("--of-all", totals[i] / most);
  });
}
