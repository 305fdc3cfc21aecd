// How each node does, by polling: only while the page is visible, slower while nobody answers.

import * as api from "./api.js";

const EVERY_MS = 2000;
const GOOD = new Set(["ok", "up", "ready", "healthy", "closed", "idle", "busy"]);

/** "good", "bad" (no replica takes calls), "weak" (some do not), or "" when nothing is known yet. */
export function health(state) {
  const replicas = state?.replicas ?? [];
  const known = replicas.filter((replica) => replica.state && replica.state !== "unknown");
  if (!known.length) return "";
  const good = known.filter((replica) => GOOD.has(replica.state)).length;
  return good === known.length ? "good" : good || known.length < replicas.length ? "weak" : "bad";
}

/** Start watching; `heard(live)` for each answer, `failed(failure)` for each miss. Returns a function that asks at once. */
export function watch(heard, failed) {
  let timer = 0;
  let misses = 0;
  let asking = false;
  async function look() {
    clearTimeout(timer);
    if (document.hidden || asking) return;
    asking = true;
    try {
      heard(await api.live());
      misses = 0;
    } catch (error) {
      misses += 1;
      failed(error);
    }
    asking = false;
    if (!document.hidden) timer = setTimeout(look, EVERY_MS * Math.min(1 + misses, 5));
  }
  document.addEventListener("visibilitychange", look);
  look();
  return look;
}
