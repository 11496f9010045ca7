// Elements by their ids, and new ones: text is always text, so no answer becomes markup.

/** The element of the page with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element.
 * @param {string} name Of the tag; of a class too after a dot: "p.text".
 * @param {Object<string, string>} attributes
 * @param {...(Node|string)} children
 */
export function make(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Says something to those who listen to the page. */
export function announce(sentence) {
  byId("status").textContent = sentence;
}

/** "1 frame", "8 frames", "1,024 tokens". */
export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** A time as it is read on a clock, to the tenth: "0:01.4". */
export function clock(seconds) {
  const tenths = Math.max(0, Math.round(seconds * 10));
  const whole = Math.floor(tenths / 10);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}.${tenths % 10}`;
}

/** A number in [-1,1] to the thousandth, with a minus that is one. */
export function signed(value) {
  return value.toFixed(3).replace("-", "−");
}

/** A size as people say it: "3.2 MB". */
export function size(bytes) {
  if (bytes < 1e6) return `${Math.max(1, Math.round(bytes / 1e3))} kB`;
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

/** Milliseconds as people say them: "2.9 ms", "340 ms", "1.2 s". */
export function duration(milliseconds) {
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(1)} s`;
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
}
