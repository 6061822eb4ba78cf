// What the kernel and a page say to each other. The Python side is view/page/frame_writer.py (frames) and view/page/pages.py (the rest).

export const CAUSES = ["timeout", "refused", "overloaded", "lost", "bad_reply", "cancelled", "failed"] as const;
export const MODES = ["load", "latency", "failures", "staleness"] as const;
export const SPLIT = ["total", "queue", "compute", "network"] as const;
export const PERCENTILES = [50, 95, 99] as const;
export const SERIES = ["loss", "samples", "calls", "bytes", "in_flight", "staleness", ...CAUSES] as const;
export type Cause = (typeof CAUSES)[number];
export type Mode = (typeof MODES)[number];

export const UNCLAIMED = 0, ALIVE = 1, SUSPECT = 2, DEAD = 3, STARTING = 4; // states of an expert or a server

export const ALL_LAYERS = 65_535; // instead of a layer's number: all of them at once
export interface Layer { name: string; sizes: number[] }

export interface Headline {
  running: boolean; steps: number; total_steps: number;
  loss: number | null; samples: number | null; calls: number | null; bytes: number | null;
  in_flight: number; staleness: number | null;
  experts: number; experts_alive: number; servers: number; servers_alive: number;
  answered: number; failed: Partial<Record<Cause, number>>; unanswered_rows: number;
  at_risk: number | null; // experts without a fresh copy elsewhere; null: no server makes copies
}

// A piece of a table's column: rows start … start + count of a table that has `size` rows by now.
// dtype "scaled" is u16: value = q / 65534 * max, and 65535 is "nothing known" (NaN).
export interface Piece {
  table: "experts" | "servers"; column: string; size: number; start: number; count: number;
  dtype: "u8" | "u16" | "u32" | "i32" | "f32" | "scaled"; width: number; // values a row
  max?: number; buffer: number; // index into the message's buffers; little endian
}
// experts: layer u16, cell u32, server i32, state u8, adopted u8 (1: from another server), load|latency|failures|staleness scaled, calls|failed|updates u32
// servers: state u8, numbers f32 of width 27:
//   heard experts alive calls queue | latency (4 SPLIT × 3 PERCENTILES, ms) | failed (7 CAUSES) | injected latency s, loss
//   (that is 5 + 12 + 7 + 2 = 26) | local index, -1 for one started elsewhere; NaN: nothing known
//   copies f32 of width 2: copies of others' experts that it keeps, experts that it adopted

export interface Frame {
  type: "frame"; page?: string; // the page that it is for; a recorded frame has none
  seq: number; reset: boolean; // reset: forget all that was before
  ack?: boolean; // false: it need not be acknowledged; a later one will be, for both
  at: number; wall: number; swarm: string; open: boolean; source: "calls" | "servers";
  can: { control: boolean }; // whether kill, stop, restart, faults and stop_run are obeyed
  headline: Headline;
  layers?: Layer[]; // all of them, when one is new
  server_text?: { start: number; rows: [label: string, address: string, word: string][] }; // those that changed
  marks?: [at: number, text: string][]; // those since the last frame
  series?: { width: number; first: number; count: number; reset: boolean; buffer: number }; // f32 [count, SERIES.length]
  // points of learning curves, f32 [count, 2]: seconds since the start, and value. Start 0: all that was before is void
  curves?: { curve: number; name: string; start: number; count: number; buffer: number }[];
  waits?: string[]; // what passes wait for, in sentences; when they change
  reach?: string[]; // how safe experts are, and whether others reach this node and its servers, likewise
  pieces: Piece[];
  lost?: string; // not sent: set in the page when the kernel is gone
}

// page → kernel. `page` is a random id of a page load.
export type Say =
  // On change, and every 5 s. `paused`: in sight, but it wants no frames, only signs of life.
  | { type: "look"; page: string; looking: boolean; paused: boolean; fresh: boolean; layer: number; mode: Mode }
  | { type: "ack"; page: string; seq: number }
  | { type: "command"; page: string; id: number; command: ButtonCommand };
export type ButtonCommand =
  | { do: "kill" | "stop" | "restart"; server: number } // its local index
  | { do: "faults"; server: number | null; latency: number | null; loss: number | null } // null: all of them; leave as is
  | { do: "stop_run" }
  | { do: "export"; format: "png" | "html" | "json" };
// kernel → all pages: a sign of life, when nothing else was sent for a while.
export interface Beat { type: "beat" }
// kernel → page, beside frames. `page`: the page that it is for. An export's bytes come as chunks, each ≤ 48 KB, which are numbered
// and acknowledged like frames (`seq`), then "done".
export type Reply =
  | { type: "heard"; page: string; id: number } // at once, when the command has reached the kernel
  | { type: "done"; page: string; id: number; text: string }
  | { type: "failed"; page: string; id: number; text: string }
  | { type: "chunk"; page: string; id: number; seq: number; index: number; total: number; name: string; mime: string }; // 1 buffer
