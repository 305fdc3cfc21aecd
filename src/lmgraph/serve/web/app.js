// The page: fetches the graph, joins picture, chat, card and panels, and keeps what they share.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { Chats } from "./chats.js";
import { Editor } from "./editor.js";
import { find, make, plural, say, spoken } from "./elements.js";
import { Picture } from "./graph.js";
import { watch } from "./live.js";
import { Card } from "./node.js";

let known = { graph: { nodes: {}, edges: {} }, version: "", editable: false };
let state = { nodes: {} };

const tokenOf = (node) => known.graph.nodes[node]?.token;
const pinned = () => find("pin").value;

const picture = new Picture(find("drawing"), find("nodes"), find("fit"), open);
const card = new Card({
  pin,
  pinned,
  edit: (name) => editor.show(name),
  closed(name) {
    picture.pick("");
    picture.focus(name);
  },
});
const chat = new Chat({
  tokenOf,
  pinned,
  lit: (name, options) => picture.light(name, options),
  status: (sentence) => (find("status").textContent = sentence),
  changed: () => card.requests(),
});
const chats = new Chats({ open: (id) => chat.open(id), current: () => chat.id, fresh: () => chat.fresh() });
const editor = new Editor(find("editor"), find("editor-form"), { current: () => known, saved: show, reload });

function open(name) {
  picture.pick(name);
  card.open(name, known.graph.nodes[name], state);
}

function pin(name) {
  find("pin").value = name;
  card.showPin();
}

/** Take a graph as the API gives it. */
function show(answer) {
  known = answer;
  const { nodes } = known.graph;
  const names = Object.keys(nodes);
  find("summary").textContent = `${plural(names.length, "node")}, version ${known.version}`;
  const kept = pinned();
  find("pin").replaceChildren(make("option", { value: "" }, "the master's choice"), ...names.map((name) => make("option", { value: name }, spoken(name))));
  pin(kept in nodes ? kept : "");
  picture.show(known.graph);
  if (card.name && card.name in nodes) picture.pick(card.name);
  else card.close();
}

async function reload() {
  show(await api.graph());
}

function fail(error) {
  const lost = error.code === "network";
  say(find("notice"), lost ? `${error.message} Trying again.` : error.message);
}

const look = watch(
  (live) => {
    say(find("notice"), "");
    state = live;
    picture.live(state);
    card.live(state);
    if (live.version && live.version !== known.version) reload().catch(fail);
  },
  fail,
);

find("new-chat").addEventListener("click", () => {
  chat.fresh();
  find("question").focus();
});
find("open-chats").addEventListener("click", () => chats.show());
find("open-editor").addEventListener("click", () => editor.show());
find("open-key").addEventListener("click", () => {
  find("key-field").value = api.key.get();
  find("key").showModal();
});
find("pin").addEventListener("change", () => card.showPin());

function keyed(value) {
  api.key.set(value.trim());
  find("open-key").toggleAttribute("data-set", Boolean(api.key.get()));
  find("key").close();
  reload().catch(fail);
  look();
}
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keyed(find("key-field").value);
});
find("key-forget").addEventListener("click", () => keyed(""));
find("open-key").toggleAttribute("data-set", Boolean(api.key.get()));

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside the panel
}

await reload().catch(fail);
await chat.resume();
if (matchMedia("(pointer: fine)").matches) find("question").focus();
document.body.dataset.ready = "";
