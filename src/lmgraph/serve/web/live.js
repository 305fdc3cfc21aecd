// How each node does, by polling: only while the page is visible, slower while nobody answers.

import * as api from "./api.js";

const EVERY_MS = 2000;
const FAILURES = 3; // in a row: from then on a replica is left alone (workers/replicas.py)

/** Whether a replica is left alone after failures. */
export const down = (replica) => replica.failures >= FAILURES;

/** "good", "bad" (every replica is down), "weak" (some are), or "" when nothing is known yet. */
export function health(state) {
  const replicas = state?.replicas ?? [];
  if (!replicas.length) return "";
  const bad = replicas.filter(down).length;
  return !bad ? "good" : bad < replicas.length ? "weak" : "bad";
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
