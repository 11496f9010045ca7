// What a person may set for the next questions, as far as it has a meaning for what is looked at.

import { byId } from "./dom.js";

/** Shows the options that are heeded: of a "video", an "image", the "camera", or of nothing yet. */
export function offer(kind) {
  byId("num-frames").parentElement.hidden = kind === "image" || kind === "camera";
  byId("remember").parentElement.hidden = kind === "camera";
}

/** What the options say, leaving out what is the server's to decide. */
export function options() {
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
