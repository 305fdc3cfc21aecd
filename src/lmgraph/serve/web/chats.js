// The panel of earlier conversations: list, open, delete.

import * as api from "./api.js";
import { nameOf } from "./chat.js";
import { button, find, make, plural, say, when } from "./elements.js";

export class Chats {
  /** `open(id)` shows a conversation (it may throw Failure), `current()` is the id of the one that is shown, `fresh()` leaves it. */
  constructor({ open, current, fresh }) {
    this.open = open;
    this.current = current;
    this.fresh = fresh;
    this.list = find("chats-list");
    this.older = find("chats-older");
    this.problem = find("chats-problem");
    this.older.addEventListener("click", () => this.#fetch(this.last));
  }

  show() {
    this.list.replaceChildren();
    find("chats").showModal();
    return this.#fetch();
  }

  async #fetch(before) {
    say(this.problem, "");
    try {
      const { data } = await api.chats(before);
      this.last = data.at(-1)?.updated;
      this.older.hidden = data.length < 50;
      this.list.append(...data.map((row) => this.#row(row)));
      if (!this.list.children.length) this.list.append(make("li", { class: "quiet" }, "No conversations yet."));
    } catch (error) {
      say(this.problem, error.message);
    }
  }

  #row({ id, title, turns, updated }) {
    const opening = make("button", { type: "button", class: "plain", "aria-current": nameOf(id) === this.current(), onclick: () => this.#try(() => this.open(id).then(() => find("chats").close())) },
      make("span", {}, title || "Untitled"), make("span", { class: "quiet" }, `${plural(turns, "question")}, ${when(updated)}`));
    const row = make("li", {}, opening);
    const remove = button("Delete", () => this.#confirm(row, remove, id), { "aria-label": `Delete ${title || "untitled"}` });
    row.append(remove);
    return row;
  }

  #confirm(row, remove, id) {
    const back = () => {
      asking.replaceWith(remove);
      remove.focus();
    };
    const sure = button("Delete it", () => this.#try(async () => {
      await api.deleteChat(id);
      row.remove();
      find("chats").querySelector("button").focus();
      if (nameOf(id) === this.current()) this.fresh();
      if (!this.list.children.length) this.list.append(make("li", { class: "quiet" }, "No conversations left."));
    }), { class: "danger" });
    const asking = make("span", { class: "row", role: "group", "aria-label": "Delete this conversation for good?" }, sure, button("Keep it", back));
    remove.replaceWith(asking);
    sure.focus();
  }

  async #try(work) {
    say(this.problem, "");
    try {
      await work();
    } catch (error) {
      say(this.problem, error.message);
    }
  }
}
