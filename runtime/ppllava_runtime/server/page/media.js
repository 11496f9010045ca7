// What a person chose to look at, and how it is sent: once whole, and from then on by its name.

import { size } from "./dom.js";

/** One video, or pictures, that the server may have seen already. */
export class Media {
  /**
   * @param {File[]} files One video, or one or several pictures.
   * @throws {Error} Several videos, or both kinds, or nothing that can be looked at.
   */
  constructor(files) {
    const pictures = files.filter((file) => file.type.startsWith("image/"));
    if (files.some((file) => file.size === 0)) {
      throw new Error("A file is empty: choose a video, or pictures.");
    }
    if (pictures.length && pictures.length < files.length) {
      throw new Error("Choose one video or several pictures, not both.");
    }
    if (!pictures.length && files.length > 1) {
      throw new Error("Choose one video: a question is asked about one at a time.");
    }
    this.kind = pictures.length ? "image" : "video";
    this.files = files;
    this.uuids = files.map(name);
    this.urls = files.map((file) => URL.createObjectURL(file));
    this.isKnown = false;
  }

  /** How many bytes a request is that brings all of it. */
  get weight() {
    return this.files.reduce((sum, file) => sum + 4 * Math.ceil(file.size / 3) + 200, 4096);
  }

  /**
   * Refuses what the server would refuse, before anything is sent.
   * @param {{body_bytes: number, media_bytes: number}} limits
   * @throws {Error}
   */
  check(limits) {
    const largest = Math.max(...this.files.map((file) => file.size));
    const all = this.files.reduce((sum, file) => sum + file.size, 0);
    // Base64 makes four letters of three bytes.
    const most = Math.min(limits.media_bytes, Math.floor((limits.body_bytes - 4096) * 0.75));
    if (this.weight > limits.body_bytes || largest > limits.media_bytes) {
      throw new Error(
        `This is ${size(all)}, and the server takes ${size(most)} at most: choose something ` +
          "shorter or smaller, or let whoever runs the server raise its limit.",
      );
    }
  }

  /**
   * The parts of a message: with all bytes, or by name where the server has seen them.
   * @returns {Promise<object[]>}
   */
  async parts() {
    // Whether a picture moves is seen by the server alone, and in one that is given as a video.
    const type = this.files.length === 1 ? "video_url" : "image_url";
    const urls = await Promise.all(this.files.map((f) => (this.isKnown ? null : dataUrl(f))));
    return urls.map((url, i) => ({ type, [type]: { url }, uuid: this.uuids[i] }));
  }

  /** Lets go of the memory that the browser holds for it. */
  close() {
    this.urls.forEach((url) => URL.revokeObjectURL(url));
  }
}

/** A name that no other has, also where the page is not served as securely as randomUUID wants. */
function name() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A file as a data: URL. */
function dataUrl(file) {
  // A browser does not know every container by its suffix; the server looks into the file anyway.
  const isSaid = /^(video|image)\//.test(file.type);
  const typed = isSaid ? file : new Blob([file], { type: "video/mp4" });
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: was it moved?`));
    reader.readAsDataURL(typed);
  });
}
