// The graph as a drawing (Cytoscape, on a canvas) and as a list of buttons that says the same to a keyboard and a screen reader.

import cytoscape from "./cytoscape.esm.min.mjs";
import { make, spoken } from "./elements.js";
import { health } from "./live.js";

const HEALTH = { good: "healthy", weak: "some replicas are down", bad: "down", "": "" };
const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const END = "end";

/** What is drawn of the edges, [[source, targets], ...]: where a node leads to every other one ('*'), only the lines that a walk takes are. */
const drawn = (edges) => Object.entries(edges ?? {}).map(([source, targets]) => [source, source === "start" || !targets.includes("*") ? targets : targets.filter((name) => name !== "*" && name !== END)]);

/** Nodes by distance from start, [[names at distance 1], ...]; those that cannot be reached (and the end) come last. */
function layers({ nodes, edges }) {
  const all = Object.keys(nodes);
  const next = (at) => (edges?.[at] ?? []).flatMap((name) => (name === "*" ? all.filter((other) => other !== at) : [name]));
  const seen = new Set(["start"]);
  const out = [];
  let layer = ["start"];
  while ((layer = [...new Set(layer.flatMap(next))].filter((name) => !seen.has(name) && (name in nodes || name === END))).length) {
    layer.forEach((name) => seen.add(name));
    if (layer.some((name) => name in nodes)) out.push(layer.filter((name) => name in nodes));
  }
  const ends = drawn(edges).some(([, targets]) => targets.includes(END)) ? [END] : [];
  const lost = [...all.filter((name) => !seen.has(name)), ...ends];
  if (!lost.length) return out;
  return [...out.slice(0, -1), [...(out.at(-1) ?? []), ...lost]];
}

/** The angle after `share` of an ellipse's way round, from its top: equal ways apart, where equal angles would crowd its flat ends. */
function along(share, x, y) {
  const pieces = 720;
  const lengths = Array.from({ length: pieces }, (_, i) => Math.hypot(x * Math.cos((2 * Math.PI * i) / pieces), y * Math.sin((2 * Math.PI * i) / pieces)));
  let left = (share % 1) * lengths.reduce((sum, length) => sum + length, 0);
  const piece = lengths.findIndex((length) => (left -= length) < 0);
  return (2 * Math.PI * Math.max(piece, 0)) / pieces - Math.PI / 2;
}

/** Where each node lies in a box of w x h pixels: start in the middle, ellipses around it; a crowded one becomes a zigzag. */
function positions(graph, w, h) {
  const [x, y] = [Math.max(w / 2 - 58, 60), Math.max(h / 2 - 40, 60)];
  const out = { start: { x: w / 2, y: h / 2 - 6 } };
  const rings = layers(graph);
  rings.forEach((names, ring) => {
    const size = (ring + 1) / rings.length;
    const round = Math.PI * (3 * (x + y) - Math.sqrt((3 * x + y) * (x + 3 * y))) * size;
    const tracks = Math.min(3, Math.ceil((names.length * 64) / round));
    names.forEach((name, i) => {
      const angle = along((i + ring / 2) / names.length, x, y);
      const share = size * (1 - 0.38 * ((i % tracks) / Math.max(tracks - 1, 1)));
      out[name] = { x: w / 2 + x * share * Math.cos(angle), y: h / 2 - 6 + y * share * Math.sin(angle) };
    });
  });
  return out;
}

const line = (source, target, kind, more = "") => ({ group: "edges", data: { id: `${source} ${target} ${kind}`, source, target, share: 0 }, classes: `${kind} ${more}` });

function elements({ nodes, edges }) {
  const out = [{ data: { id: "start", label: "start" }, classes: "start" }];
  for (const name of Object.keys(nodes)) out.push({ data: { id: name, label: spoken(name), active: 0 } });
  for (const [source, targets] of drawn(edges)) {
    const unfolded = targets.flatMap((name) => (name === "*" ? Object.keys(nodes).filter((other) => other !== source) : [name]));
    if (unfolded.includes(END) && !out.some((element) => element.data.id === END)) out.push({ data: { id: END, label: END }, classes: "start" });
    for (const target of new Set(unfolded))
      if ((target in nodes || target === END) && (source in nodes || source === "start")) out.push(line(source, target, source === "start" ? "first" : "next"));
  }
  for (const [name, node] of Object.entries(nodes)) if (node.fallback in nodes) out.push(line(name, node.fallback, "fallback"));
  return out;
}

function style(narrow) {
  const read = getComputedStyle(document.documentElement);
  const colour = (name) => read.getPropertyValue(`--${name}`).trim();
  const [ink, quiet, line, paper, accent, bad] = ["ink", "quiet", "line", "paper", "accent", "bad"].map(colour);
  const slow = still.matches ? 0 : 250;
  return [
    { selector: "node", style: {
      width: "mapData(active, 0, 8, 22, 38)", height: "mapData(active, 0, 8, 22, 38)", "background-color": paper, "border-width": 2, "border-color": quiet,
      label: "data(label)", color: ink, "font-size": narrow ? 10 : 12, "font-family": "system-ui, sans-serif", "text-valign": "bottom", "text-margin-y": 5,
      "text-wrap": "wrap", "text-max-width": narrow ? 66 : 84, "text-background-color": paper, "text-background-opacity": 0.8, "text-background-padding": 1,
      "overlay-opacity": 0, "transition-property": "background-color, border-color, border-width", "transition-duration": slow } },
    { selector: "node.start", style: { width: 12, height: 12, "background-color": quiet, "border-width": 0, color: quiet } },
    { selector: "node.busy", style: { "border-color": accent } },
    { selector: "node.weak", style: { "border-style": "dashed" } },
    { selector: "node.bad", style: { "border-style": "dashed", "border-color": bad, color: bad } },
    { selector: "node.picked", style: { "border-width": 5, "border-color": ink } },
    { selector: "edge", style: {
      width: 1, "line-color": line, "target-arrow-color": line, "curve-style": "straight", "target-arrow-shape": "none", "overlay-opacity": 0, events: "no" } },
    { selector: "edge.next", style: { "curve-style": "bezier", "target-arrow-shape": "triangle", "arrow-scale": 0.8, "line-color": quiet, "target-arrow-color": quiet } },
    { selector: "edge.fallback", style: { "curve-style": "bezier", "line-style": "dotted", "target-arrow-shape": "vee", "arrow-scale": 0.7, "line-color": quiet, "target-arrow-color": quiet } },
    { selector: "edge.first[share > 0.01]", style: { width: "mapData(share, 0, 1, 1, 6)", "line-color": quiet } },
    { selector: "node.lit", style: { "background-color": accent, "border-color": accent, color: accent, "font-weight": "bold" } },
    { selector: "edge.lit", style: { width: 3, "line-color": accent, "target-arrow-color": accent, "z-index": 2 } },
    { selector: "edge.flowing", style: { "line-style": "dashed", "line-dash-pattern": [8, 6] } },
  ];
}

export class Picture {
  /** `picked(name)` is called when a node is clicked or chosen in the list. */
  constructor(drawing, list, fit, picked) {
    this.drawing = drawing;
    this.list = list;
    this.graph = { nodes: {}, edges: {} };
    this.state = { nodes: {} };
    this.lit = [];
    this.path = [];
    const fine = matchMedia("(pointer: fine)").matches; // a finger on the drawing scrolls the page instead
    this.cy = cytoscape({
      container: drawing, style: style(false), minZoom: 0.5, maxZoom: 4, boxSelectionEnabled: false, autoungrabify: true, autounselectify: true,
      userZoomingEnabled: fine, userPanningEnabled: fine,
    });
    this.cy.on("tap", "node", (event) => event.target.id() in this.graph.nodes && picked(event.target.id()));
    list.addEventListener("click", (event) => event.target.closest("button") && picked(event.target.closest("button").dataset.node));
    list.addEventListener("keydown", (event) => this.#move(event));
    fit.addEventListener("click", () => this.#arrange());
    new ResizeObserver(() => this.#arrange()).observe(drawing);
    for (const query of [still, dark]) query.addEventListener("change", () => this.cy.style(style(this.narrow)));
  }

  /** Draw another graph (or the same one after a change). */
  show(graph) {
    this.graph = graph;
    this.cy.elements().remove();
    this.cy.add(elements(graph));
    const rest = this.list.querySelector("[tabindex='0']")?.dataset.node;
    this.list.replaceChildren(...Object.keys(graph.nodes).map((name) => make("button", { type: "button", "data-node": name, tabindex: -1 },
      make("span", { class: "dot", "aria-hidden": "true" }), make("span", {}, spoken(name)), make("span", { class: "load", "aria-hidden": "true" }))));
    const first = this.#button(rest) ?? this.list.firstElementChild;
    if (first) first.tabIndex = 0;
    this.#arrange();
    this.live(this.state);
    this.light(this.lit, { path: this.path });
  }

  /** Load and health of every node, as GET /v1/live gives them. */
  live(state) {
    this.state = state;
    for (const [name, node] of Object.entries(this.graph.nodes)) {
      const found = state.nodes?.[name];
      const how = health(found);
      const active = found?.active ?? 0;
      this.cy.getElementById(name).data("active", Math.min(active, 8)).toggleClass("busy", active > 0).toggleClass("weak", how === "weak").toggleClass("bad", how === "bad");
      const chip = this.#button(name);
      chip.dataset.health = how;
      chip.dataset.active = active;
      chip.querySelector(".load").textContent = active || "";
      chip.setAttribute("aria-label", [spoken(name), `token ${node.token}`, HEALTH[how], active && `${active} under way`, this.lit.includes(name) && "chosen"].filter(Boolean).join(", "));
    }
  }

  /** Light up the node that answers ('': none; several at work: a list) and the way to it: `path`, the nodes of a walk, else from start.
   * `alternatives` widen their edges by probability. */
  light(names, { alternatives = [], flowing = false, path = [] } = {}) {
    const known = (list) => [list].flat().filter((name) => name in this.graph.nodes);
    this.lit = known(names);
    this.path = known(path);
    const way = ["start", ...(this.path.length ? this.path : this.lit)].filter((name, i, all) => name !== all[i - 1]); // who composes has been there
    this.cy.batch(() => {
      this.cy.elements().removeClass("lit flowing");
      this.cy.edges(".taken").remove();
      this.cy.edges().data("share", 0);
      for (const { node, probability } of alternatives) this.cy.getElementById(`start ${node} first`).data("share", probability);
      for (const name of this.lit) this.cy.getElementById(name).addClass("lit");
      way.slice(1).forEach((target, i) => this.#edge(way[i], target).addClass(flowing && this.lit.length && i === way.length - 2 ? "lit flowing" : "lit"));
    });
    for (const chip of this.list.children) {
      const lit = this.lit.includes(chip.dataset.node);
      chip.toggleAttribute("data-lit", lit);
      chip.setAttribute("aria-current", lit);
    }
    if (flowing && !still.matches) this.#flow();
    this.live(this.state);
  }

  /** The line between two nodes, drawn now where a walk takes one that is not drawn otherwise. */
  #edge(source, target) {
    const made = line(source, target, source === "start" ? "first" : "next", "taken");
    const found = this.cy.getElementById(made.data.id);
    return found.length || source === "start" ? found : this.cy.add(made);
  }

  /** Mark the node whose card is open ('': none). */
  pick(name) {
    this.cy.nodes().removeClass("picked");
    if (name) this.cy.getElementById(name).addClass("picked");
    for (const chip of this.list.children) chip.setAttribute("aria-pressed", chip.dataset.node === name);
  }

  /** Put the keyboard's focus on a node of the list. */
  focus(name) {
    this.#button(name)?.focus();
  }

  #button(name) {
    return [...this.list.children].find((chip) => chip.dataset.node === name);
  }

  #arrange() {
    const { clientWidth: w, clientHeight: h } = this.drawing;
    if (!w || !h) return;
    const at = positions(this.graph, w, h);
    if (this.narrow !== w < 460) {
      this.narrow = w < 460;
      this.cy.style(style(this.narrow));
    }
    this.cy.resize();
    this.cy.nodes().positions((node) => at[node.id()] ?? { x: w / 2, y: h / 2 });
    this.cy.viewport({ zoom: 1, pan: { x: 0, y: 0 } });
  }

  #flow() {
    const edge = this.cy.edges(".flowing");
    if (!edge.length) return;
    edge.style("line-dash-offset", 0);
    edge.animation({ style: { "line-dash-offset": -28 }, duration: 900 }).play().promise().then(() => {
      edge.removeStyle("line-dash-offset");
      if (edge.hasClass("flowing")) this.#flow();
    });
  }

  #move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const chips = [...this.list.children];
    const at = chips.indexOf(document.activeElement);
    if (at < 0 || !(step || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const to = event.key === "Home" ? 0 : event.key === "End" ? chips.length - 1 : (at + step + chips.length) % chips.length;
    chips[at].tabIndex = -1;
    chips[to].tabIndex = 0;
    chips[to].focus();
  }
}
