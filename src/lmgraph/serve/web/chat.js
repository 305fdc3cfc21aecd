// The conversation: its id, asking and stopping, its turns on the page. It tells its `listener` what the graph should show.

import * as api from "./api.js";
import { find, make, percent, plural, spoken } from "./elements.js";
import { Turn, remembered } from "./turn.js";

const CURRENT = "lmgraph-conversation";

/** A conversation's own name: administrators get names with the owner's in front (KEY/NAME). */
export const nameOf = (id) => id.slice(id.lastIndexOf("/") + 1);

export class Chat {
  /** `listener`: tokenOf(node), pinned(), lit(node, options), status(sentence), changed(). */
  constructor(listener) {
    this.listener = listener;
    this.log = find("log");
    this.question = find("question");
    this.follow = true;
    for (const target of [this.log, document]) target.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.#scroller();
      this.follow = scrollHeight - scrollTop - clientHeight < 60;
    });
    new ResizeObserver(() => this.#scroll()).observe(this.log);
    find("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(this.question.value);
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.ask(this.question.value);
      } else if (event.key === "Escape") this.stop();
    });
    find("stop").addEventListener("click", () => this.stop());
    this.#clear();
  }

  /** A new, empty conversation. */
  fresh() {
    this.stop();
    sessionStorage.removeItem(CURRENT);
    this.#clear();
  }

  #clear() {
    this.id = crypto.randomUUID();
    this.log.replaceChildren(make("p", { class: "empty" }, "Ask a question. The master names the expert with one token, rewrites the question for it, and the expert answers."));
    this.listener.lit("");
    this.listener.status("No question yet.");
  }

  /** The conversation that this tab was in before it was loaded again, if any. */
  async resume() {
    const id = sessionStorage.getItem(CURRENT);
    if (!id) return;
    const known = (await api.chats().catch(() => ({ data: [] }))).data.find((row) => nameOf(row.id) === id);
    if (known) await this.open(known.id).catch(() => this.fresh());
  }

  /** Show a conversation of the history. Throws Failure. */
  async open(id) {
    const found = await api.chat(id);
    this.stop();
    this.id = nameOf(id);
    sessionStorage.setItem(CURRENT, this.id);
    const turns = [...found.data].sort((a, b) => a.created - b.created).map((kept) => remembered(kept, this.listener.tokenOf));
    this.log.replaceChildren(...turns.map((turn) => turn.element));
    this.follow = true;
    this.#scroll();
    const node = turns.at(-1)?.element.dataset.node ?? "";
    this.listener.lit(node, { path: turns.at(-1)?.path });
    this.listener.status(node ? `${spoken(node)} answered last.` : "No question yet.");
  }

  /** Break off the answer in the making. */
  stop() {
    this.controller?.abort();
  }

  async ask(question) {
    if (this.controller || !question.trim()) return;
    const node = this.listener.pinned();
    const turn = new Turn(question.trim(), this.listener.tokenOf);
    const controller = new AbortController();
    this.controller = controller;
    this.#busy(true);
    this.question.value = "";
    this.log.querySelector(".empty")?.remove();
    for (const open of this.log.querySelectorAll("details[open]")) open.open = false;
    this.log.append(turn.element);
    this.follow = true;
    turn.wait(node);
    this.#tell(turn, node ? `Pinned to ${spoken(node)}.` : "The master is deciding.", node, { flowing: true });
    let said = false;
    let status = "";
    try {
      await api.ask({ question: question.trim(), node, conversation: this.id, signal: controller.signal }, (chunk) => {
        const decision = chunk.lmgraph?.decision;
        if (decision) {
          turn.decide(decision);
          status = this.#sentence(decision);
          this.#tell(turn, status, decision.node, { alternatives: decision.alternatives, flowing: true });
        }
        if (chunk.lmgraph?.progress) {
          turn.progress(chunk.lmgraph.progress);
          const [steps, nodes] = [[...turn.working.keys()].map((hop) => hop + 1), [...turn.working.values()]];
          if (turn.path.length > 1) status = plural(turn.path.length, "step");
          const sentence = nodes.length ? `${nodes.map(spoken).join(" and ")} at work, step ${steps.join(" and ")}.` : "The master is deciding.";
          this.#tell(turn, sentence, nodes, { path: turn.path, flowing: true });
        }
        const text = chunk.choices?.[0]?.delta?.content;
        if (text) {
          if (!said) {
            said = true;
            const who = (chunk.model ?? "").replace(/^lmgraph\/?/, "");
            if (who && who !== turn.element.dataset.node) {
              turn.answering(who);
              status = [spoken(who), `token ${this.listener.tokenOf(who)}`, node ? "pinned" : "took over"].join(", ");
              this.#tell(turn, status, who, { path: turn.path, flowing: true });
            } else if (who) turn.answering(who);
          }
          turn.hear(text);
        }
        if (chunk.lmgraph?.trace) turn.trace(chunk.lmgraph.trace);
        this.#scroll();
      });
      turn.end("done");
      sessionStorage.setItem(CURRENT, this.id);
      const who = turn.element.dataset.node ?? "";
      const named = status.startsWith(`${spoken(who)},`); // not where another node took over: then it is said who answered
      this.listener.status(named ? `${status}; answered.` : `${status}${status && "; "}${spoken(who)} answered.`);
    } catch (error) {
      const stopped = error.name === "AbortError";
      turn.end(stopped ? "stopped" : "failed", stopped ? "" : error.message);
      if (this.log.contains(turn.element)) this.listener.status(stopped ? "Stopped." : "Not answered.");
    }
    this.controller = undefined;
    this.#busy(false);
    if (this.log.contains(turn.element)) this.listener.lit(turn.element.dataset.node ?? "", { path: turn.path });
    this.#scroll();
    this.listener.changed();
  }

  #sentence(decision) {
    if (decision.fallback) return `${spoken(decision.node)}, token ${this.listener.tokenOf(decision.node)}, fallback`;
    return `${spoken(decision.node)}, token ${decision.token}, ${percent(decision.probability)}${decision.stayed ? ", stayed" : ""}`;
  }

  #tell(turn, sentence, node, options) {
    if (!this.log.contains(turn.element)) return;
    this.listener.status(sentence);
    this.listener.lit(node ?? "", options);
  }

  #busy(is) {
    find("stop").hidden = !is;
    find("send").hidden = is;
    this.log.setAttribute("aria-busy", is);
  }

  #scroll() {
    if (this.follow) this.#scroller().scrollTop = this.#scroller().scrollHeight;
  }

  /** The log scrolls; on a phone the whole page does. */
  #scroller() {
    return getComputedStyle(this.log).overflowY === "visible" ? document.scrollingElement : this.log;
  }
}
