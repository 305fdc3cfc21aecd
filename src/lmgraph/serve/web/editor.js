// The panel that changes the graph: a node or edges as a form, or anything as JSON. Whatever the form, a merge patch is sent.

import * as api from "./api.js";
import { button, make, say, spoken } from "./elements.js";

const NEW = "";
const EVERY = ["embedded", "openai", "scripted"];
const lines = { show: (value) => (value ?? []).join("\n"), read: (text) => text.split("\n").map((line) => line.trim()).filter(Boolean) };
const number = { show: (value) => value ?? "", read: (text) => (Number.isFinite(Number(text)) ? Number(text) : text) }; // the server names what is wrong
const object = { show: (value) => (value ? JSON.stringify(value, null, 2) : ""), read: (text) => JSON.parse(text) };
const plain = { show: (value) => value ?? "", read: (text) => text };
const NODE = [
  { name: "token", label: "Token number", as: number, mode: "numeric" },
  { name: "threshold", label: "Threshold", as: number, mode: "decimal" },
  { name: "description", label: "Description", rows: 2 },
  { name: "rewrite", label: "Rewrite the question", options: ["", "auto", "always", "never"] },
  { name: "fallback", label: "Fallback", options: "nodes" },
];
const WORKER = [
  { name: "kind", label: "Worker", options: EVERY },
  { name: "model", label: "Model", kinds: ["embedded", "openai"] },
  { name: "urls", label: "Servers, one a line", as: lines, rows: 2, kinds: ["openai"] },
  { name: "dialect", label: "Server (for adapters)", options: ["", "vllm", "lorax", "llamacpp"], kinds: ["openai"] },
  { name: "adapter", label: "Adapter on the model", kinds: ["openai"] },
  { name: "adapter_path", label: "Load the adapter from (vllm)", kinds: ["openai"] },
  { name: "adapter_source", label: "Adapter's source (lorax)", options: ["", "hub", "local", "s3", "pbase"], kinds: ["openai"] },
  { name: "system", label: "System prompt", rows: 2, kinds: ["embedded", "openai"] },
  { name: "answers", label: "Answers (JSON: request to answer, * for any)", as: object, rows: 2, kinds: ["scripted"] },
  { name: "key_env", label: "Key's variable", kinds: ["openai"] },
  { name: "max_tokens", label: "Most tokens", as: number, mode: "numeric" },
  { name: "temperature", label: "Temperature", as: number, mode: "decimal" },
  { name: "timeout_s", label: "Time limit in seconds", as: number, mode: "decimal" },
  { name: "start_timeout_s", label: "Wait for a start, in seconds", as: number, mode: "decimal" },
  { name: "retries", label: "Retries", as: number, mode: "numeric" },
];

/** One labelled field. `changed()` is undefined where it was left alone, null where it was emptied. Throws SyntaxError for bad JSON. */
class Field {
  constructor({ name, label, as = plain, rows, options, kinds, mode }, value, prefix, names) {
    this.name = name;
    this.kinds = kinds ?? EVERY;
    this.as = as;
    this.before = String(as.show(value));
    const id = `edit-${prefix}-${name}`;
    const choices = options === "nodes" ? ["", ...names] : options;
    this.input = choices ? make("select", { id }, choices.map((choice) => make("option", { value: choice }, choice ? spoken(choice) : "default")))
      : make(rows ? "textarea" : "input", { id, rows, inputmode: mode, autocomplete: "off", spellcheck: rows ? null : "false" });
    this.input.value = this.before;
    this.element = make("div", { class: rows ? "field wide" : "field" }, make("label", { for: id }, label), this.input);
  }

  changed() {
    const text = this.element.hidden ? "" : this.input.value.trim();
    if (text === this.before.trim()) return undefined;
    return text ? this.as.read(text) : null;
  }
}

export class Editor {
  /** `current()` -> {graph, version, editable}; `saved(answer)` is told the new graph; `reload()` fetches it again (a promise). */
  constructor(dialog, form, { current, saved, reload }) {
    Object.assign(this, { dialog, form, current, saved, reload });
    this.mode = "node";
    this.node = NEW;
    this.from = "start";
    this.patch = {};
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#apply();
    });
  }

  /** Show the panel; `node` is the one to edit. */
  show(node) {
    if (node !== undefined) [this.mode, this.node] = ["node", node];
    else if (!this.node) this.node = Object.keys(this.current().graph.nodes)[0] ?? NEW;
    this.#draw();
    this.dialog.showModal();
  }

  #draw() {
    const { editable, version } = this.current();
    const modes = { node: "Node", edges: "Edges", json: "JSON" };
    const tabs = make("fieldset", { class: "modes" }, make("legend", { class: "hidden" }, "What to change"), Object.entries(modes).map(([mode, text]) => {
      const radio = make("input", { type: "radio", name: "mode", id: `mode-${mode}`, onchange: () => ((this.mode = mode), this.#redraw(`mode-${mode}`)) });
      radio.checked = mode === this.mode;
      return make("label", { for: `mode-${mode}` }, radio, make("span", {}, text));
    }));
    this.problem = make("div", { class: "problem", role: "alert", hidden: true, id: "editor-problem" });
    this.done = make("p", { class: "quiet", role: "status", id: "editor-done" }, `Version ${version}${editable ? "" : ". To change it, give an administrator's key with the button Key."}`);
    this.send = make("button", { type: "submit", class: "main", id: "editor-apply" }, "Apply");
    const undo = button("Undo the last change", () => this.#try(() => api.undoGraph(this.current().version)), { id: "editor-undo" });
    const body = { node: () => this.#nodeForm(), edges: () => this.#edgeForm(), json: () => this.#jsonForm() }[this.mode]();
    this.form.replaceChildren(tabs, make("div", { class: "beside" }, make("div", { class: "fields" }, body), this.problem), make("div", { class: "row foot" }, this.done, undo, this.send));
  }

  #redraw(focus) {
    this.#draw();
    document.getElementById(focus)?.focus();
  }

  #nodeForm() {
    const { nodes, edges } = this.current().graph;
    if (!(this.node in nodes)) this.node = NEW;
    const fresh = this.node === NEW;
    const given = nodes[this.node] ?? {};
    const names = Object.keys(nodes);
    const pick = make("select", { id: "edit-node", onchange: () => ((this.node = pick.value), this.#redraw("edit-node")) },
      names.map((name) => make("option", { value: name }, spoken(name))), make("option", { value: NEW }, "a new node"));
    pick.value = this.node;
    this.name = fresh && make("input", { id: "edit-name", autocomplete: "off", spellcheck: "false" });
    const others = names.filter((name) => name !== this.node);
    this.fields = NODE.map((field) => new Field(field, given[field.name], "node", others));
    this.workers = WORKER.map((field) => new Field(field, given.worker?.[field.name] ?? (field.name === "kind" && fresh ? "openai" : undefined), "worker", others));
    const kind = this.workers[0].input;
    const suit = () => this.workers.forEach((field) => (field.element.hidden = !field.kinds.includes(kind.value)));
    kind.addEventListener("change", suit);
    suit();
    if (fresh) {
      const taken = new Set(names.map((name) => nodes[name].token));
      this.fields[0].input.value = names.length ? [...Array(names.length + 1).keys()].find((token) => !taken.has(token)) : 0;
    }
    const open = (edges?.start ?? []).includes("*");
    this.connect = fresh && !open && make("input", { type: "checkbox", id: "edit-connect", checked: true });
    const remove = !fresh && button("Remove this node", () => this.#confirm(remove), { id: "editor-remove" });
    return [
      make("div", { class: "field wide" }, make("label", { for: "edit-node" }, "Node"), pick),
      this.name && make("div", { class: "field wide" }, make("label", { for: "edit-name" }, "Name"), this.name),
      this.fields.map((field) => field.element), this.workers.map((field) => field.element),
      this.connect && make("label", { class: "check wide" }, this.connect, "It may come first (an edge from start)"),
      remove && make("div", { class: "wide" }, remove),
    ].flat().filter(Boolean);
  }

  #confirm(remove) {
    const name = this.node;
    const back = () => (asking.replaceWith(remove), remove.focus());
    const sure = button(`Remove ${spoken(name)}`, () => this.#try(() => api.patchGraph({ nodes: { [name]: null } }, this.current().version)), { class: "danger", id: "editor-sure" });
    const asking = make("span", { class: "row", role: "group", "aria-label": `Remove ${spoken(name)} and its edges?` }, sure, button("Keep it", back));
    remove.replaceWith(asking);
    sure.focus();
  }

  #edgeForm() {
    const { nodes, edges } = this.current().graph;
    const names = Object.keys(nodes);
    if (this.from !== "start" && !(this.from in nodes)) this.from = "start";
    const pick = make("select", { id: "edit-from", onchange: () => ((this.from = pick.value), this.#redraw("edit-from")) },
      ["start", ...names].map((name) => make("option", { value: name }, spoken(name))));
    pick.value = this.from;
    const now = edges?.[this.from] ?? [];
    const targets = ["*", ...names.filter((name) => name !== this.from), ...(this.from === "start" ? [] : ["end"])];
    this.boxes = targets.map((name) => {
      const box = make("input", { type: "checkbox", value: name });
      box.checked = now.includes(name);
      return box;
    });
    return [
      make("div", { class: "field wide" }, make("label", { for: "edit-from" }, "From"), pick),
      make("fieldset", { class: "wide checks" }, make("legend", {}, "To"),
        this.boxes.map((box, i) => make("label", { class: "check" }, box, targets[i] === "*" ? "every node" : spoken(targets[i])))),
    ];
  }

  #jsonForm() {
    this.json = make("textarea", { id: "edit-json", rows: 12, spellcheck: "false", class: "code" });
    this.json.value = JSON.stringify(this.patch, null, 2);
    return [
      make("div", { class: "field wide" }, make("label", { for: "edit-json" }, "Merge patch: what is named here is changed, null removes"), this.json),
      make("details", { class: "wide" }, make("summary", {}, "The graph as it is"), make("pre", { tabindex: 0, "aria-label": "The graph as JSON" }, JSON.stringify(this.current().graph, null, 2))),
    ];
  }

  /** The merge patch that the form stands for. Throws Error with a sentence where there is none. */
  #read() {
    const { nodes, edges } = this.current().graph;
    const taken = (fields) => Object.fromEntries(fields.map((field) => [field.name, this.#value(field)]).filter(([, value]) => value !== undefined));
    if (this.mode === "json") {
      try {
        return JSON.parse(this.json.value);
      } catch (error) {
        throw new Error(`This is not JSON: ${error.message}`);
      }
    }
    if (this.mode === "edges") {
      const to = this.boxes.filter((box) => box.checked).map((box) => box.value);
      return { edges: { [this.from]: to.length || this.from === "start" ? to : null } };
    }
    const name = this.name ? this.name.value.trim() : this.node;
    if (!name) throw new Error("The new node needs a name.");
    if (this.name && name in nodes) throw new Error(`There is a node ${name} already.`);
    const node = taken(this.fields);
    const worker = taken(this.workers);
    if (this.name) worker.kind = this.workers[0].input.value;
    if (Object.keys(worker).length) node.worker = worker;
    if (!Object.keys(node).length) throw new Error("Nothing was changed.");
    const patch = { nodes: { [name]: node } };
    if (this.connect?.checked) patch.edges = { start: [...(edges?.start ?? []), name] };
    return patch;
  }

  #value(field) {
    try {
      return field.changed();
    } catch (error) {
      throw new Error(`${field.name}: this is not JSON: ${error.message}`);
    }
  }

  #apply() {
    return this.#try(() => {
      this.patch = this.#read();
      return api.patchGraph(this.patch, this.current().version);
    });
  }

  async #try(work) {
    say(this.problem, "");
    this.done.textContent = "";
    this.send.disabled = true;
    try {
      const answer = await work();
      this.saved(answer);
      const added = this.name ? this.name.value.trim() : "";
      if (this.mode === "node" && added in answer.graph.nodes) this.node = added;
      this.#redraw(document.activeElement?.id || "editor-apply");
      this.done.textContent = `Saved as version ${answer.version}.`;
    } catch (error) {
      this.send.disabled = false;
      this.problem.replaceChildren(make("p", {}, error.message), error.problems?.length ? make("ul", {}, error.problems.map((problem) => make("li", {}, problem))) : "");
      this.problem.hidden = false;
      if (error.status === 412) {
        await this.reload().catch(() => {});
        this.problem.append(make("p", {}, `Version ${this.current().version} is loaded now. What you typed is still here: look it over and apply it again.`));
      }
    }
  }
}
