// The card of one node: description, token, worker, replicas, last requests, pin.

import * as api from "./api.js";
import { button, find, make, plural, say, spoken, token, when } from "./elements.js";
import { down } from "./live.js";
import { questionOf } from "./turn.js";

export class Card {
  /** `pin(name or "")`, `pinned()`, `edit(name)`, `closed(name)` are called by the card's buttons. */
  constructor(actions) {
    this.actions = actions;
    this.element = find("node");
    this.name = "";
    this.element.addEventListener("keydown", (event) => event.key === "Escape" && this.close());
  }

  /** Show a node; its last requests are asked for. */
  open(name, node, state) {
    this.name = name;
    const worker = node.worker ?? {};
    const facts = [["Token", make("code", {}, token(node.token))], ["Worker", worker.kind], ["Model", worker.model], ["Adapter", worker.adapter && `${worker.adapter} (${worker.dialect})`], ["Servers", (worker.urls ?? []).map((url) => make("div", {}, url))],
      ["Key from", worker.key_env], ["System prompt", worker.system], ["Fallback", node.fallback && spoken(node.fallback)]];
    this.pinning = button("", () => this.actions.pin(this.actions.pinned() === name ? "" : name), { id: "node-pin" });
    this.replicas = make("dd");
    this.figures = make("dd");
    this.last = make("ul", { class: "last" });
    this.problem = make("p", { class: "problem", role: "alert", hidden: true });
    this.element.replaceChildren(
      make("div", { class: "head" }, make("h2", { id: "node-name" }, spoken(name)), button("Close", () => this.close())),
      make("p", {}, node.description),
      make("div", { class: "row" }, this.pinning, button("Edit", () => this.actions.edit(name), { "aria-label": `Edit ${spoken(name)}` })),
      make("dl", {}, facts.filter(([, value]) => value && value.length !== 0).map(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]),
        make("dt", {}, "Replicas"), this.replicas, make("dt", {}, "Answers"), this.figures),
      make("h3", {}, "Last requests"), this.last, this.problem);
    this.element.hidden = false;
    this.live(state);
    this.showPin();
    this.element.focus({ preventScroll: true });
    if (this.element.getBoundingClientRect().top > innerHeight * 0.7) this.element.scrollIntoView({ block: "center" });
    return this.requests();
  }

  close() {
    if (this.element.hidden) return;
    this.element.hidden = true;
    const name = this.name;
    this.name = "";
    this.actions.closed(name);
  }

  /** Load and health of this node, when the card is open. */
  live(state) {
    if (!this.name || !this.replicas) return;
    const found = state.nodes?.[this.name] ?? {};
    const rows = (found.replicas ?? []).map((replica) => {
      const { url, outstanding, failures } = replica;
      return [url, down(replica) ? "down" : "healthy", outstanding > 0 && `${outstanding} under way`, failures > 0 && `${plural(failures, "failure")} in a row`].filter(Boolean).join(", ");
    });
    this.replicas.replaceChildren(...(rows.length ? rows.map((row) => make("div", {}, row)) : ["not asked yet"]));
    this.figures.textContent = `${found.answers ?? 0} given, ${found.active ?? 0} under way, ${found.failures ?? 0} failed`;
  }

  showPin() {
    if (!this.name) return;
    const pinned = this.actions.pinned() === this.name;
    this.pinning.textContent = pinned ? "Pinned: every question goes here" : "Pin";
    this.pinning.setAttribute("aria-pressed", pinned);
  }

  /** Ask for the last requests again. */
  async requests() {
    const name = this.name;
    if (!name) return;
    try {
      const { data } = await api.chatsOf(name);
      if (name !== this.name) return;
      say(this.problem, "");
      this.last.replaceChildren(...data.slice(0, 8).map((turn) => make("li", {}, make("span", {}, questionOf(turn)), make("span", { class: "quiet" }, when(turn.created)))));
      if (!data.length) this.last.append(make("li", { class: "quiet" }, "None yet."));
    } catch (error) {
      if (name === this.name) say(this.problem, error.message);
    }
  }
}
