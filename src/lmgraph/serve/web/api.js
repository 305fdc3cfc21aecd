// The gateway's API: requests, errors as sentences, a stream of server-sent events. The only place that calls fetch.

const KEY = "lmgraph-key";

export class Failure extends Error {
  /** What the server (or the network) said no with: a sentence, a code, the HTTP status (0: nobody answered), a graph's problems. */
  constructor(message, { code = "", status = 0, problems = [] } = {}) {
    super(message);
    this.code = code;
    this.status = status;
    this.problems = problems;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function failure(status, body, wait) {
  const error = body?.error ?? {};
  let message = error.message || `The server answered with status ${status}.`;
  if (status === 401) message += " Give a key with the button Key.";
  if (status === 403 && error.code === "forbidden" && !key.get()) message += " Give a key with the button Key.";
  if (status === 429 && wait) message += ` Try again in ${wait} s.`;
  const problems = Array.isArray(error.problems) ? error.problems.map(String) : [];
  return new Failure(message, { code: error.code ?? "", status, problems });
}

async function send(method, path, { body, headers = {}, signal } = {}) {
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The gateway cannot be reached.", { code: "network" });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw failure(answer.status, told, answer.headers.get("retry-after"));
}

async function json(method, path, options) {
  const answer = await send(method, path, options);
  return answer.json().catch(() => {
    throw new Failure("The gateway's answer could not be read.", { code: "network" });
  });
}

const matching = (version) => (version ? { "If-Match": `"${version}"` } : {});
const part = encodeURIComponent;

export const graph = () => json("GET", "/v1/graph");
export const live = () => json("GET", "/v1/live");
export const patchGraph = (patch, version) => json("PATCH", "/v1/graph", { body: patch, headers: matching(version) });
export const undoGraph = (version) => json("POST", "/v1/graph/undo", { headers: matching(version) });
export const chats = (before) => json("GET", `/v1/history?limit=50${before ? `&before=${part(before)}` : ""}`);
export const chatsOf = (node) => json("GET", `/v1/history?limit=20&node=${part(node)}`);
export const chat = (id) => json("GET", `/v1/history/${part(id)}`);
export const deleteChat = (id) => json("DELETE", `/v1/history/${part(id)}`);

/** Ask; calls `heard(chunk)` for each chunk of the stream. Throws Failure; AbortError when `signal` is aborted. */
export async function ask({ question, node, conversation, signal }, heard) {
  const body = {
    model: node ? `lmgraph/${node}` : "lmgraph",
    messages: [{ role: "user", content: question }],
    stream: true,
    lmgraph: { trace: true, progress: true, conversation },
  };
  const answer = await send("POST", "/v1/chat/completions", { body, signal });
  let done = false;
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") {
      done = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw failure(200, chunk);
    heard(chunk);
  }
  if (!done) throw new Failure("The connection broke off before the answer was finished.", { code: "network" });
}

/** The data of each event of a stream of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const event of parts) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The connection broke off before the answer was finished.", { code: "network" });
  } finally {
    reader.cancel().catch(() => {});
  }
}
