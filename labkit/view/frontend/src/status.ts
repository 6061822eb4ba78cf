// The one line that says how things stand: a pure function of what is known.

export interface Standing {
  first: boolean; // a frame has come
  closed: boolean; clickWaits: boolean; lost: string; // what there is to say about a kernel that is gone
  paused: boolean; answer: string; // the answer to the last command, while it is fresh
}

export const CLICK_WAITS = "a click is waiting: this kernel hears clicks between cells; train in the background with lk.fit(…)";

export function statusLine(standing: Standing): string {
  if (standing.lost) return standing.lost;
  if (standing.clickWaits) return CLICK_WAITS;
  if (standing.answer) return standing.answer;
  if (standing.closed) return "the swarm is closed, or cannot be reached";
  if (standing.paused) return "paused";
  return standing.first ? "" : "waiting for the first frame …";
}
