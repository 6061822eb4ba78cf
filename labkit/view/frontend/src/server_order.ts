// Which servers come first, and what may be done to them: the thinking of the servers' table.
import type { ServerRow } from "./store";
import { ALIVE, DEAD, STARTING, SUSPECT, type Frame } from "./types";

export const STATE_WORDS: Record<number, string> = { [ALIVE]: "alive", [SUSPECT]: "suspect", [DEAD]: "dead", [STARTING]: "starting" };
export const STATE_SIGNS: Record<number, string> = { [ALIVE]: "●", [SUSPECT]: "◐", [DEAD]: "✕", [STARTING]: "◌" };
const RANK: Record<number, number> = { [DEAD]: 0, [SUSPECT]: 1, [STARTING]: 2, [ALIVE]: 3 };

export const stateWord = (row: ServerRow): string => STATE_WORDS[row.state] ?? "unknown";
export const failedCalls = (row: ServerRow): number => row.failed.reduce((sum, n) => sum + (n || 0), 0);
export const nameOf = (row: ServerRow, index: number): string => row.label || row.address || `server ${index}`;

// Dead, suspect, starting, alive; then by failures; then by p95, in steps of a half, so that rows do not dance.
export function worstFirst(rows: readonly ServerRow[]): number[] {
  const key = rows.map((row) => [RANK[row.state] ?? 4, -failedCalls(row), -slowness(row.latency[0][1])]);
  return rows.map((_, i) => i).sort((a, b) => {
    for (let k = 0; k < 3; k++) if (key[a][k] !== key[b][k]) return key[a][k] - key[b][k];
    return a - b;
  });
}

const slowness = (p95: number): number => (p95 > 0 ? Math.round(Math.log(p95) / Math.log(1.5)) : -100);

export const ORDER_STAYS_FOR = 5; // seconds

// Keeps the order while a click may be coming: rows move only when nothing in the table was touched for a while.
export class SteadyOrder {
  private order: number[] = [];
  private touchedAt = -Infinity;
  touch(now: number): void { this.touchedAt = now; }
  next(rows: readonly ServerRow[], now: number): number[] {
    const held = now - this.touchedAt < ORDER_STAYS_FOR && this.order.length > 0 && this.order.every((i) => i < rows.length);
    if (!held) return (this.order = worstFirst(rows));
    for (let i = this.order.length; i < rows.length; i++) this.order.push(i); // new ones at the end
    return this.order;
  }
}

// Why nothing may be done to a server from here; "" if something may.
export function whyNoControl(frame: Frame | null, replay: boolean): string {
  if (replay) return "this is a recording";
  if (!frame) return "nothing is known yet";
  if (frame.lost) return frame.lost;
  if (!frame.open) return "the swarm is closed";
  return frame.can.control ? "" : "this page may look, but not touch";
}

const ENDED = new Set(["killed", "stopped", "failed"]);
export type Deed = "kill" | "stop" | "restart";

export function whyNot(deed: Deed, row: ServerRow, frame: Frame | null, replay: boolean): string {
  const why = whyNoControl(frame, replay);
  if (why) return why;
  if (row.local < 0) return "it was started elsewhere";
  return deed !== "restart" && ENDED.has(row.word) ? `it is ${row.word} already` : "";
}

// A restart of a server that has ended does no harm.
export const mustAsk = (deed: Deed, row: ServerRow): boolean => deed !== "restart" || !ENDED.has(row.word);

// dead (killed), alive: the word of who started it is added where it says more.
export function stateText(row: ServerRow): string {
  const state = stateWord(row);
  return row.word && !["running", "remote", "starting", state].includes(row.word) ? `${state} (${row.word})` : state;
}
