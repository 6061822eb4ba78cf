// Frames as the kernel sends them, made by hand.
import { SERIES } from "../src/types";
import type { Frame, Headline, Piece } from "../src/types";

export const headline = (changes: Partial<Headline> = {}): Headline => ({
  running: true, steps: 120, total_steps: 500, loss: 0.412, samples: 1234, calls: 88, bytes: 2e6, in_flight: 8, staleness: 1.5,
  experts: 4, experts_alive: 4, servers: 2, servers_alive: 2, answered: 1000, failed: { timeout: 3 }, unanswered_rows: 0, at_risk: 0, ...changes,
});

export const frame = (changes: Partial<Frame> = {}): Frame => ({
  type: "frame", seq: 1, reset: false, at: 12, wall: 1.7e9, swarm: "test", open: true, source: "calls", can: { control: true },
  headline: headline(), pieces: [], ...changes,
});

const WRITE = {
  u8: [1, "setUint8"], u16: [2, "setUint16"], u32: [4, "setUint32"], i32: [4, "setInt32"], f32: [4, "setFloat32"], scaled: [2, "setUint16"],
} as const;

// A buffer of little-endian values, at an odd offset, as buffers of a message may be.
export function buffer(dtype: keyof typeof WRITE, values: readonly number[]): DataView {
  const [bytes, set] = WRITE[dtype], data = new DataView(new ArrayBuffer(values.length * bytes + 1), 1);
  values.forEach((value, i) => data[set](i * bytes, value, true));
  return data;
}

export function piece(table: Piece["table"], column: string, dtype: Piece["dtype"], values: readonly number[], changes: Partial<Piece> = {}): [Piece, DataView] {
  const count = values.length / (changes.width ?? 1);
  return [{ table, column, size: count, start: 0, count, dtype, width: 1, buffer: 0, ...changes }, buffer(dtype, values)];
}

// A frame of several pieces, with the buffers numbered.
export function framed(pieces: [Piece, DataView][], changes: Partial<Frame> = {}): [Frame, DataView[]] {
  return [frame({ pieces: pieces.map(([one], i) => ({ ...one, buffer: i })), ...changes }), pieces.map(([, data]) => data)];
}

// Bins in which the loss is the number of the bin, and everything else 0.
export function series(first: number, count: number, changes: Partial<NonNullable<Frame["series"]>> = {}): [Frame["series"], DataView] {
  const rows = Array.from({ length: count }, (_, i) => SERIES.map((name) => (name === "loss" ? first + i : 0)));
  return [{ width: 1, first, count, reset: false, buffer: 0, ...changes }, buffer("f32", rows.flat())];
}

// A grid of which every cell is claimed, cell i being expert i, all alive, with these loads.
export function grid(sizes: number[], load: (cell: number) => number = (cell) => cell, state: (cell: number) => number = () => 1): [Frame, DataView[]] {
  const cells = Array.from({ length: sizes.reduce((a, b) => a * b, 1) }, (_, i) => i);
  return framed([
    piece("experts", "layer", "u16", cells.map(() => 0)), piece("experts", "cell", "u32", cells), piece("experts", "server", "i32", cells.map(() => 0)),
    piece("experts", "state", "u8", cells.map(state)), piece("experts", "load", "f32", cells.map(load)),
  ], { reset: true, layers: [{ name: "ffn", sizes }] });
}
