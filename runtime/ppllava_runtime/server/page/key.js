// The key that a server may want: asked for when it is refused, and kept as long as the tab.

import { byId } from "./dom.js";

const KEY = "ppllava-key";

/** Runs something that may want a key, and asks for one as long as it is refused. */
export async function withKey(run) {
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

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key-dialog").close("given");
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));
