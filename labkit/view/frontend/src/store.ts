// What a page knows of a swarm: the frames that came, decoded into columns. Between the connection (or the replay), which
// feeds it, and the panels, which read it. It trusts nothing: a malformed part of a frame is dropped, and `apply` never throws.
import { CAUSES, PERCENTILES, SERIES, SPLIT, UNCLAIMED } from "./types";
import type { Frame, Headline, Layer, Piece } from "./types";

export const NOWHERE = 0xffffffff; // `cell` of an expert whose place has not come yet
const MAX_ROWS = { experts: 1 << 20, servers: 1 << 16 };
const MAX_BINS = 1 << 15;
const MAX_MARKS = 1000;
const MAX_CURVES = 64, MAX_POINTS = 4096, MAX_SENTENCES = 16;
const MAX_LAYERS = 1 << 16;

// Columns of length n; rows keep their place for good. NaN in a Float32Array: nothing is known.
export interface ExpertTable {
  n: number;
  layer: Uint16Array; cell: Uint32Array; // NOWHERE: not known yet
  server: Int32Array; // index into `servers`; -1: not known
  state: Uint8Array; adopted: Uint8Array;
  load: Float32Array; latency: Float32Array; failures: Float32Array; staleness: Float32Array;
  calls: Uint32Array; failed: Uint32Array; updates: Uint32Array;
}

export interface ServerRow {
  label: string; address: string; word: string; // running, killed, silent …; "" until they have come
  local: number; // index in swarm.servers; -1: started elsewhere
  state: number;
  heard: number; experts: number; alive: number; calls: number; queue: number; // NaN: not known
  latency: number[][]; // [SPLIT][PERCENTILES], ms
  failed: number[]; // by CAUSES
  injected: [latency: number, loss: number]; // seconds, share
  copies: number; adopted: number; // of others' experts, and experts that it did not begin with; NaN: not known
}

// values[name] for each name of SERIES; value i is of the bin that begins at (first + i) × width seconds.
export interface SeriesTable { width: number; first: number; values: Record<string, Float32Array> }

// Something that was measured while training. NaN: it was not finite.
export interface Curve { name: string; at: number[]; value: number[] }

function sentences(lines: unknown[]): string[] {
  return lines.filter((line): line is string => typeof line === "string").slice(0, MAX_SENTENCES);
}

export class Store {
  frame: Frame | null = null; // the last one, its headline checked; its pieces are gone
  layers: Layer[] = [];
  experts: ExpertTable = expertTable(0);
  servers: ServerRow[] = [];
  series: SeriesTable = { width: 1, first: 0, values: seriesValues(0) };
  marks: [at: number, text: string][] = [];
  curves: Curve[] = [];
  waits: string[] = [];
  reach: string[] = [];
  receivedAt = 0; // performance.now()
  lost = ""; // why it is not known how things stand now: the kernel is gone
  // Counts of changes, for panels that draw only what is new: "experts", "experts.load", …, "servers", "series", "marks", "layers".
  readonly revisions: Record<string, number> = {};
  private listeners = new Set<() => void>();
  private quiet = 0;

  apply(frame: Frame, buffers: readonly DataView[]): void {
    if (!isObject(frame) || frame.type !== "frame") return;
    const views = Array.isArray(buffers) ? buffers.map(view) : [];
    if (frame.reset) this.clear();
    this.frame = cleanFrame(frame, this.frame);
    this.receivedAt = performance.now();
    if (Array.isArray(frame.layers)) this.takeLayers(frame.layers);
    if (isObject(frame.server_text)) this.takeText(frame.server_text);
    if (Array.isArray(frame.marks)) this.takeMarks(frame.marks);
    if (isObject(frame.series)) this.takeSeries(frame.series, views);
    if (Array.isArray(frame.curves)) for (const one of frame.curves) this.takeCurve(one, views);
    if (Array.isArray(frame.waits)) this.waits = sentences(frame.waits);
    if (Array.isArray(frame.reach)) this.reach = sentences(frame.reach);
    if (Array.isArray(frame.pieces)) for (const piece of frame.pieces) this.takePiece(piece, views);
    this.notify();
  }

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => void this.listeners.delete(listener);
  }

  // The kernel is gone, or back: the last frame is marked as such, and so are those that it still sent.
  lose(why: string): void {
    this.lost = why;
    if (this.frame) this.frame = { ...this.frame, lost: why };
    for (const name of ["experts", "experts.state", "servers"]) this.touch(name);
    this.notify();
  }

  // Several changes, of which listeners hear once.
  batch(changes: () => void): void {
    this.quiet++;
    try { changes(); } finally { this.quiet--; }
    this.notify();
  }

  // How often something has changed; compare with what you drew.
  revision(...names: string[]): number {
    return names.reduce((sum, name) => sum + (this.revisions[name] ?? 0), 0);
  }

  touch(name: string): void {
    this.revisions[name] = (this.revisions[name] ?? 0) + 1;
  }

  private clear(): void {
    this.frame = null;
    this.layers = [];
    this.experts = expertTable(0);
    this.servers = [];
    this.series = { width: 1, first: 0, values: seriesValues(0) };
    this.marks = [];
    this.curves = [];
    this.waits = [];
    this.reach = [];
    for (const name of ["experts", "servers", "series", "marks", "layers", "curves"]) this.touch(name);
  }

  private notify(): void {
    if (this.quiet) return;
    for (const listener of [...this.listeners]) {
      try { listener(); } catch (error) { console.error(error); }
    }
  }

  private takeLayers(layers: Layer[]): void {
    const good = layers.length <= MAX_LAYERS && layers.every((layer) => isObject(layer) && typeof layer.name === "string"
      && Array.isArray(layer.sizes) && layer.sizes.length > 0 && layer.sizes.every((size) => isCount(size, 1, 2 ** 20)));
    if (!good) return; // experts name layers by index, so that it is all or none
    this.layers = layers.map(({ name, sizes }) => ({ name, sizes: [...sizes] }));
    this.touch("layers");
  }

  private takeText({ start, rows }: NonNullable<Frame["server_text"]>): void {
    if (!Array.isArray(rows) || !isCount(start, 0, MAX_ROWS.servers - rows.length)) return;
    this.growServers(start + rows.length);
    rows.forEach((row, i) => {
      if (!Array.isArray(row) || !row.every((text) => typeof text === "string")) return;
      const server = this.servers[start + i];
      [server.label = "", server.address = "", server.word = ""] = row;
    });
    this.touch("servers");
  }

  private takeMarks(marks: [number, string][]): void {
    const good = marks.filter((mark) => Array.isArray(mark) && Number.isFinite(mark[0]) && typeof mark[1] === "string");
    if (!good.length) return;
    this.marks = [...this.marks, ...good].slice(-MAX_MARKS);
    this.touch("marks");
  }

  private takeSeries({ width, first, count, reset, buffer }: NonNullable<Frame["series"]>, buffers: DataView[]): void {
    const data = isCount(buffer, 0, buffers.length) ? buffers[buffer] : undefined;
    if (!(width > 0 && Number.isFinite(width)) || !isCount(first, 0, 2 ** 52) || !isCount(count, 0, MAX_BINS)) return;
    if (count && (!data || data.byteLength < count * SERIES.length * 4)) return;
    const old = this.series, have = old.values[SERIES[0]].length;
    let from = first, to = first + count;
    if (!reset && have && width === old.width) {
      from = Math.min(old.first, first);
      to = Math.max(old.first + have, to);
    }
    const keep = to - from <= MAX_BINS; // else it is a leap, and what was is of no use
    if (!keep) [from, to] = [first, first + count];
    const values = seriesValues(to - from);
    SERIES.forEach((name, column) => {
      if (keep && !reset && width === old.width) values[name].set(old.values[name], have ? old.first - from : 0);
      for (let bin = 0; bin < count; bin++)
        values[name][first - from + bin] = data!.getFloat32((bin * SERIES.length + column) * 4, true);
    });
    this.series = { width, first: from, values };
    this.touch("series");
  }

  private takeCurve(raw: NonNullable<Frame["curves"]>[number], buffers: DataView[]): void {
    if (!isObject(raw) || typeof raw.name !== "string") return;
    const { curve, name, start, count, buffer } = raw;
    const data = isCount(buffer, 0, buffers.length) ? buffers[buffer] : undefined;
    if (!data || !isCount(curve, 0, Math.min(this.curves.length, MAX_CURVES - 1)) || !isCount(start, 0, MAX_POINTS)) return;
    const known = this.curves[curve] ?? { name, at: [], value: [] };
    if (start > known.at.length || !isCount(count, 0, MAX_POINTS - start) || data.byteLength < count * 8) return;
    const read = (k: number) => Array.from({ length: count }, (_, i) => data.getFloat32(i * 8 + k, true));
    this.curves[curve] = { name, at: [...known.at.slice(0, start), ...read(0)], value: [...known.value.slice(0, start), ...read(4)] };
    this.touch("curves");
  }

  private takePiece(piece: Piece, buffers: DataView[]): void {
    if (!isObject(piece) || !(piece.table === "experts" || piece.table === "servers")) return;
    const { table, column, size, start, count, width, dtype, max, buffer } = piece;
    const data = isCount(buffer, 0, buffers.length) ? buffers[buffer] : undefined;
    const bytes = Object.hasOwn(SIZES, dtype) ? SIZES[dtype] : 0;
    if (!bytes || !data || !isCount(size, 0, MAX_ROWS[table]) || !isCount(start, 0, size)) return;
    if (!isCount(count, 0, size - start) || !isCount(width, 1, 1024) || data.byteLength < count * width * bytes) return;
    if (dtype === "scaled" && !Number.isFinite(max)) return;
    const read = reader(data, dtype, max ?? 0);
    if (table === "servers") this.takeServers(column, size, start, count, width, read);
    else if (width === 1) this.takeExperts(column, size, start, count, read);
  }

  private takeExperts(column: string, size: number, start: number, count: number, read: (i: number) => number): void {
    if (size > this.experts.n) this.experts = grown(this.experts, size);
    if (column === "n" || !Object.hasOwn(this.experts, column)) return; // a newer kernel's
    const values = this.experts[column as Exclude<keyof ExpertTable, "n">];
    for (let i = 0; i < count; i++) values[start + i] = read(i);
    this.touch("experts");
    this.touch(`experts.${column}`);
  }

  private takeServers(column: string, size: number, start: number, count: number, width: number, read: (i: number) => number): void {
    this.growServers(size);
    if (column === "state" && width === 1) {
      for (let i = 0; i < count; i++) this.servers[start + i].state = read(i);
    } else if (column === "numbers" && width === SERVER_NUMBERS) {
      for (let i = 0; i < count; i++) fillServer(this.servers[start + i], (k) => read(i * width + k));
    } else if (column === "copies" && width === 2) {
      for (let i = 0; i < count; i++) [this.servers[start + i].copies, this.servers[start + i].adopted] = [read(i * 2), read(i * 2 + 1)];
    } else return;
    this.touch("servers");
  }

  private growServers(size: number): void {
    while (this.servers.length < size) this.servers.push(serverRow());
  }
}

const SIZES: Record<string, number> = { u8: 1, u16: 2, u32: 4, i32: 4, f32: 4, scaled: 2 };
const SERVER_NUMBERS = 5 + SPLIT.length * PERCENTILES.length + CAUSES.length + 2 + 1;

// Values of a buffer, by index; all are little endian.
function reader(data: DataView, dtype: Piece["dtype"], max: number): (i: number) => number {
  switch (dtype) {
    case "u8": return (i) => data.getUint8(i);
    case "u16": return (i) => data.getUint16(i * 2, true);
    case "u32": return (i) => data.getUint32(i * 4, true);
    case "i32": return (i) => data.getInt32(i * 4, true);
    case "f32": return (i) => data.getFloat32(i * 4, true);
    case "scaled": return (i) => {
      const q = data.getUint16(i * 2, true);
      return q === 65535 ? NaN : (q / 65534) * max;
    };
  }
}

function fillServer(row: ServerRow, value: (k: number) => number): void {
  let k = 0;
  row.heard = value(k++); row.experts = value(k++); row.alive = value(k++); row.calls = value(k++); row.queue = value(k++);
  row.latency = SPLIT.map(() => PERCENTILES.map(() => value(k++)));
  row.failed = CAUSES.map(() => value(k++));
  row.injected = [value(k++), value(k++)];
  const local = value(k);
  row.local = Number.isInteger(local) && local >= 0 ? local : -1;
}

function serverRow(): ServerRow {
  return {
    label: "", address: "", word: "", local: -1, state: UNCLAIMED, heard: NaN, experts: NaN, alive: NaN, calls: NaN, queue: NaN,
    latency: SPLIT.map(() => PERCENTILES.map(() => NaN)), failed: CAUSES.map(() => 0), injected: [NaN, NaN], copies: NaN, adopted: NaN,
  };
}

function expertTable(n: number): ExpertTable {
  const unknown = () => new Float32Array(n).fill(NaN);
  return {
    n, layer: new Uint16Array(n), cell: new Uint32Array(n).fill(NOWHERE), server: new Int32Array(n).fill(-1),
    state: new Uint8Array(n), adopted: new Uint8Array(n), load: unknown(), latency: unknown(), failures: unknown(), staleness: unknown(),
    calls: new Uint32Array(n), failed: new Uint32Array(n), updates: new Uint32Array(n),
  };
}

function grown(old: ExpertTable, n: number): ExpertTable {
  const { n: _, ...columns } = expertTable(n);
  for (const [name, column] of Object.entries(columns)) column.set(old[name as keyof typeof columns]);
  return { n, ...columns };
}

export function seriesValues(bins: number): Record<string, Float32Array> {
  return Object.fromEntries(SERIES.map((name) => [name, new Float32Array(bins).fill(NaN)]));
}

function cleanFrame(frame: Frame, before: Frame | null): Frame {
  return {
    type: "frame", seq: number(frame.seq), reset: Boolean(frame.reset), at: number(frame.at), wall: number(frame.wall),
    swarm: typeof frame.swarm === "string" ? frame.swarm : (before?.swarm ?? ""), open: frame.open !== false,
    source: frame.source === "servers" ? "servers" : "calls", can: { control: isObject(frame.can) && frame.can.control === true },
    headline: isObject(frame.headline) ? cleanHeadline(frame.headline) : (before?.headline ?? cleanHeadline({})), pieces: [],
  };
}

const COUNTED = ["steps", "total_steps", "in_flight", "experts", "experts_alive", "servers", "servers_alive", "answered", "unanswered_rows"] as const;
const MEASURED = ["loss", "samples", "calls", "bytes", "staleness", "at_risk"] as const;

function cleanHeadline(raw: Partial<Headline>): Headline {
  const failed: Headline["failed"] = {}, count = isObject(raw.failed) ? raw.failed : {};
  for (const cause of CAUSES) if (number(count[cause])) failed[cause] = number(count[cause]);
  const all = { running: raw.running === true, failed } as Headline;
  for (const name of COUNTED) all[name] = number(raw[name]);
  for (const name of MEASURED) all[name] = known(raw[name]);
  return all;
}

const isObject = <T>(value: T): value is T & object => typeof value === "object" && value !== null && !Array.isArray(value);
const isCount = (value: unknown, least: number, most: number): value is number =>
  Number.isInteger(value) && (value as number) >= least && (value as number) <= most;
const known = (value: unknown): number | null => (typeof value === "number" && Number.isFinite(value) ? value : null);
const number = (value: unknown): number => known(value) ?? 0;

// ipywidgets gives DataViews; a kernel manager or a test may give an ArrayBuffer or a typed array instead.
function view(buffer: ArrayBufferView | ArrayBuffer): DataView {
  if (ArrayBuffer.isView(buffer)) return new DataView(buffer.buffer, buffer.byteOffset, buffer.byteLength);
  return new DataView(buffer instanceof ArrayBuffer ? buffer : new ArrayBuffer(0));
}
