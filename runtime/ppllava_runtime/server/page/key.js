// The key that a server may want: asked for when it is refused, and kept as long as the tab.

import { byId } from "./dom.js";

const KEY = "ppllava-key";
// With any other character a header is none, and the browser sends nothing at all.
const SENDABLE = /^[\x21-\x7e]+$/;

let asking = null;

/** Runs something that may want a key, and asks for one as long as it is refused. */
export async function withKey(run) {
  for (;;) {
    const key = sessionStorage.getItem(KEY) ?? "";
    try {
      return await run(key);
    } catch (error) {
      if (error.status !== 401) throw error;
      // Two may have been refused: the second finds the dialog open, or another key by now.
      if (key !== (sessionStorage.getItem(KEY) ?? "")) continue;
      sessionStorage.removeItem(KEY);
      asking ??= askForKey(key && error.message).finally(() => (asking = null));
      if (!(await asking)) throw error;
    }
  }
}

/**
 * Whether a person gave a key.
 * @param {string} wrong What is wrong with the one that was given before; "" where none was.
 */
function askForKey(wrong) {
  const dialog = byId("key-dialog");
  dialog.returnValue = "";
  byId("key").value = "";
  dialog.showModal();
  object(wrong);
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

/** Says in the dialog what is wrong with a key. */
function object(sentence) {
  byId("key-error").textContent = sentence;
  byId("key-error").hidden = !sentence;
  byId("key").setAttribute("aria-invalid", String(sentence !== ""));
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (SENDABLE.test(byId("key").value.trim())) {
    byId("key-dialog").close("given");
    return;
  }
  object(
    "This is not a key: expected letters, digits and signs of ASCII, without blanks. Copy it as " +
      "plain text: some programs change dashes and dots.",
  );
  byId("key").focus();
  byId("key").select();
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));
