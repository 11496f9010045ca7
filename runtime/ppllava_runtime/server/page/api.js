// The server's interface: chat completions as they stream in, its model, and how it refuses.

/** What the server said no with, in its own words. */
export class Refusal extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string}} [about] The status is 0 where nothing answered.
   */
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const UNREACHABLE = "The server does not answer. Is it still running?";

/** What the page has to know of the server before anything is asked. */
export async function readSettings() {
  return (await reach("/page/settings.json", {})).json();
}

/** Whether the server is warmed up, and its sentence where it is not. */
export async function isReady() {
  const response = await reach("/health/ready", {}, false);
  return response.ok;
}

/** The name of the model that is served. */
export async function readModel(key) {
  const response = await reach("/v1/models", { headers: headers(key) });
  return (await response.json()).data[0].id;
}

/**
 * The answer to a request, piece by piece and then whole.
 * @param {object} body Of the request, which is made a stream.
 * @param {{key: string, signal: AbortSignal, onText: (text: string) => void}} options
 * @returns {Promise<{text: string, finish: string, usage: object, extra: object}>}
 */
export async function complete(body, { key, signal, onText }) {
  const response = await reach("/v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const answer = { text: "", finish: "", usage: null, extra: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return answer;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, { status: 200, code: chunk.error.code });
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      answer.text += choice.delta.content;
      onText(answer.text);
    }
    answer.finish = choice?.finish_reason ?? answer.finish;
    answer.usage = chunk.usage ?? answer.usage;
    answer.extra = chunk.x_ppllava ?? answer.extra;
  }
  throw new Refusal("The answer broke off: the connection was closed before its end.");
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** The response, or a Refusal with the sentence the server gave for it. */
async function reach(path, options, strict = true) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(UNREACHABLE);
  }
  if (!strict || response.ok) return response;
  const body = await response.json().catch(() => null);
  let message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const wait = response.headers.get("retry-after");
  if (wait) message += ` Try again in ${wait} s.`;
  throw new Refusal(message, { status: response.status, code: body?.error?.code ?? "" });
}

/** The data of each event of a stream of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (waiting + value.replaceAll("\r", "")).split("\n\n");
      waiting = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The answer broke off: the connection to the server was lost.");
  } finally {
    reader.releaseLock();
  }
}
