// One question and what became of it: the decision (bars, rewriting), the walk, the answer as it streams, times and tokens.

import { duration, make, percent, plural, say, spoken, token } from "./elements.js";
import { blocks, difference } from "./text.js";

export class Turn {
  /** `tokenOf(node)` is the number of a node's functional token in the graph as it is now, undefined for a node that is gone. */
  constructor(question, tokenOf) {
    this.tokenOf = tokenOf;
    this.text = "";
    this.path = []; // nodes of a walk, in the order of its hops
    this.working = new Map(); // hop -> node
    this.route = make("p", { class: "route" });
    this.how = make("details", { class: "how", hidden: true }, make("summary", {}, "How it was decided"));
    this.bars = make("ul", { class: "bars", "aria-label": "Most probable tokens" });
    this.rewriting = make("div", { class: "rewriting", hidden: true });
    this.walk = make("ol", { class: "walk", "aria-label": "Walk" });
    this.how.append(this.bars, this.rewriting, this.walk);
    this.answer = make("div", { class: "answer" });
    this.problem = make("p", { class: "problem", role: "alert", hidden: true });
    this.element = make("article", { class: "turn" }, make("p", { class: "question" }, question), this.route, this.how, this.answer, this.problem);
  }

  /** The master is at work, or the pinned node is. */
  wait(node) {
    this.route.textContent = node ? `Pinned to ${spoken(node)}` : "The master is deciding";
    this.element.dataset.state = "waiting";
  }

  /** What the master decided. */
  decide(decision) {
    this.element.dataset.node = decision.node;
    this.#name(decision.node, this.tokenOf(decision.node) ?? decision.token, decision);
    this.how.hidden = false;
    this.how.open = true;
    const rows = (decision.alternatives ?? []).filter((row, i) => i < 5 && (i < 3 || row.probability >= 0.001));
    this.bars.replaceChildren(...rows.map(({ node, probability }) => this.#bar(node, probability, node === decision.node)));
    this.#rewrite(decision);
    const ms = decision.ms ?? {};
    const whole = (ms.tokenise ?? 0) + (ms.prefill ?? 0) + (ms.decode ?? 0);
    const parts = `reading ${duration((ms.tokenise ?? 0) + (ms.prefill ?? 0))}, rewriting ${duration(ms.decode ?? 0)}, ${plural(decision.tokens?.prompt ?? 0, "token")} read`;
    this.walk.replaceChildren(this.#step("master", `decided in ${duration(whole)}`, parts));
  }

  #name(node, number, decision) {
    const notes = [];
    if (decision?.fallback) notes.push(`fallback: ${spoken(decision.chosen)} had only ${percent(decision.probability)}`);
    if (decision?.stayed) notes.push("the conversation stays here");
    const figures = [number !== undefined && `token ${number}`, decision && !decision.fallback && percent(decision.probability), ...notes];
    this.route.replaceChildren(make("strong", {}, spoken(node)), ...figures.filter(Boolean).map((text) => make("span", {}, text)));
  }

  #bar(node, probability, chosen) {
    const number = this.tokenOf(node);
    const fill = make("span", { class: "fill" });
    fill.style.width = `${probability * 100}%`; // through the object model, which the CSP allows
    return make("li", { "data-chosen": chosen, "data-node": node },
      make("code", {}, number === undefined ? "" : token(number)), make("span", { class: "who" }, spoken(node)),
      make("span", { class: "bar", "aria-hidden": "true" }, fill), make("span", { class: "share" }, percent(probability)));
  }

  #rewrite(decision) {
    const { query = "", rewritten = "" } = decision;
    const notes = [decision.rewrite_note, decision.shortened > 0 && `the master read the query without ${plural(decision.shortened, "token")} of its middle`];
    const same = !rewritten || rewritten === query;
    const { before, after } = difference(query, rewritten);
    const marked = (pieces, tag) => pieces.map((piece) => (piece.changed && piece.text.trim() ? make(tag, {}, piece.text) : piece.text));
    const note = notes.filter(Boolean).join("; ");
    this.rewriting.hidden = same && !note;
    this.rewriting.replaceChildren(...(same
      ? [make("p", { class: "quiet" }, `Passed on as it was asked: ${note}.`)]
      : [make("div", {}, make("h4", {}, "Asked"), make("p", { class: "before" }, ...marked(before, "del"))),
        make("div", {}, make("h4", {}, "Passed on"), make("p", { class: "after" }, ...marked(after, "ins"))),
        note && make("p", { class: "quiet" }, note)]).filter(Boolean));
  }

  #step(name, what, more, kind, part) {
    return make("li", { "data-step": name, class: kind }, make("strong", {}, spoken(name)), ` ${what}`, more && make("span", { class: "quiet" }, ` ${more}`), part);
  }

  /** What a walk is at, as the stream tells it: its `plan`, a hop that `began` or has `ended`. */
  progress({ kind, hop, node, request, ms, error, answer, hops = [] }) {
    if (kind === "plan") {
      this.path = hops.map((planned) => planned.node);
      hops.forEach((planned, number) => this.#hop(number, planned.node, "is planned", "planned"));
    } else if (kind === "began") {
      this.path[hop] = node;
      this.working.set(hop, node);
      this.#hop(hop, node, "is working", "working");
      this.element.dataset.node = node;
      this.#name(node, this.tokenOf(node));
      this.route.append(make("span", {}, `step ${hop + 1}`));
    } else {
      this.working.delete(hop);
      this.#hop(hop, node, error ? `failed after ${duration(ms)}: ${error}` : `answered in ${duration(ms)}`, error && "failed", part(request, answer));
    }
  }

  #hop(number, node, what, kind, more) {
    const row = this.#step(node, what, "", kind, more);
    row.dataset.hop = number;
    const before = this.walk.querySelector(`[data-hop="${number}"]`);
    if (before) before.replaceWith(row);
    else this.walk.append(row);
  }

  /** A worker gives its first piece: it may be another one than the decision's. */
  answering(node) {
    if (this.element.dataset.node !== node) {
      this.element.dataset.node = node;
      this.#name(node, this.tokenOf(node));
    }
    this.element.dataset.state = "answering";
  }

  /** A piece of the answer. The page is drawn at most once a frame. */
  hear(text) {
    this.text += text;
    this.frame ??= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.frame = undefined;
    const parts = blocks(this.text);
    parts.forEach(({ code, text }, i) => {
      let child = this.answer.children[i];
      const tag = code ? "PRE" : "P";
      if (child?.tagName !== tag) {
        const made = make(tag, code ? { tabindex: 0, "aria-label": "Code" } : {});
        if (child) child.replaceWith(made);
        else this.answer.append(made);
        child = made;
      }
      if (child.textContent !== text) child.textContent = text;
    });
    while (this.answer.children.length > parts.length) this.answer.lastElementChild.remove();
  }

  /** The steps of the walk, with times and tokens. */
  trace(trace) {
    if (trace?.decision) this.decide(trace.decision);
    else this.walk.replaceChildren();
    const steps = trace?.steps ?? [];
    const walk = trace?.walk;
    this.path = walk?.hops.map((hop) => hop.node) ?? [];
    this.working.clear();
    for (const step of steps) {
      const usage = step.usage ?? {};
      const more = [step.first_ms > 0 && `first piece after ${duration(step.first_ms)}`, step.attempts > 1 && `${step.attempts} attempts`,
        usage.completion_tokens !== undefined && `${plural(usage.prompt_tokens ?? 0, "token")} in, ${usage.completion_tokens} out`];
      const what = step.error ? `failed after ${duration(step.ms)}: ${step.error}` : `answered in ${duration(step.ms)}`;
      const told = step.hop !== undefined && part(step.request, step === steps.at(-1) ? "" : step.answer); // the last one's is the answer
      this.walk.append(this.#step(step.node, what, more.filter(Boolean).join(", "), step.error && "failed", told));
    }
    this.how.hidden = !this.walk.children.length;
    const last = steps.at(-1);
    if (!last) return;
    if (!last.error) this.answering(last.node);
    const together = Math.max(0, ...steps.filter((step) => step.voter).map((step) => step.ms)); // voters begin together
    const ms = steps.reduce((sum, step) => sum + (step.voter ? 0 : step.ms), together);
    this.route.append(make("span", { class: "quiet" }, walk ? plural(walk.hops.length, "step") : duration(ms))); // a plan's run side by side
    if (walk && walk.stopped !== "end") this.route.append(make("span", { class: "quiet" }, { loop: "went round", master: "the master failed" }[walk.stopped] ?? `limit of ${walk.stopped} reached`));
    if (last.usage?.completion_tokens !== undefined) this.route.append(make("span", { class: "quiet" }, plural(last.usage.completion_tokens, "token")));
  }

  /** It is over: "done", "stopped" or "failed", with a sentence where there is something to say. */
  end(state, sentence = "") {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.#draw();
    for (const [hop, node] of this.working) this.#hop(hop, node, "was not finished", "failed");
    this.working.clear();
    if (!this.element.dataset.node) this.route.textContent = state === "done" ? "" : state === "stopped" ? "Stopped" : "Not answered";
    this.element.dataset.state = state;
    say(this.problem, sentence);
  }
}

/** What a hop was asked and what it answered, folded. */
function part(request, answer) {
  return make("details", { class: "part" }, make("summary", {}, answer ? "Request and answer" : "Request"), make("p", {}, request), answer && make("p", {}, answer));
}

/** A turn as the history keeps it. */
export function remembered(kept, tokenOf) {
  const turn = new Turn(questionOf(kept), tokenOf);
  turn.hear(kept.answer ?? "");
  turn.answering(kept.node ?? "");
  turn.trace(kept.trace);
  turn.how.open = false;
  turn.end("done");
  return turn;
}

/** The last thing that a user said in a kept turn. */
export function questionOf(kept) {
  const last = (kept.request?.messages ?? []).filter((message) => message.role === "user").at(-1)?.content ?? kept.title ?? "";
  return typeof last === "string" ? last : last.map((part) => part.text ?? `[${part.type}]`).join("\n");
}
