// A recording, moment by moment: puts a store into the state of any second of a run. Below the replay page, which plays it.
import { Store, seriesValues } from "./store";
import type { Curve, SeriesTable } from "./store";
import { SERIES } from "./types";
import type { Frame } from "./types";

export interface Recorded { header: Frame; buffers: DataView[] }

export const SPEEDS = [1, 2, 5, 10, 30, 60];
const PLAYS_FOR = 60; // seconds that a whole run takes at the speed that is suggested, or less

// `still`: a reset frame with the layers, the servers' texts, the columns that do not change, all bins and all marks.
// `keyframes`: whole columns of some moments, in any order. Experts and servers that a keyframe lacks were not there yet.
export class Replay {
  readonly store = new Store();
  readonly duration: number; // seconds
  cursor = 0; // seconds since the start
  playing = false;
  speed: number;
  private readonly keyframes: Recorded[];
  private readonly times: number[];
  private readonly series: SeriesTable;
  private readonly curves: Curve[];
  private readonly marks: [at: number, text: string][];
  private shown = -2; // index of the keyframe in the store
  private moment: Frame | null = null; // its frame

  constructor(private readonly still: Recorded, keyframes: readonly Recorded[], seconds = 0) {
    this.keyframes = keyframes.filter(({ header }) => Number.isFinite(header?.at)).sort((a, b) => a.header.at - b.header.at);
    this.times = this.keyframes.map(({ header }) => header.at);
    this.store.apply({ ...still.header, reset: true }, still.buffers);
    this.series = this.store.series;
    this.curves = this.store.curves;
    this.marks = [...this.store.marks].sort((a, b) => a[0] - b[0]);
    const end = this.series.values[SERIES[0]].length ? (this.series.first + this.series.values[SERIES[0]].length) * this.series.width : 0;
    this.duration = Math.max(Number.isFinite(seconds) ? seconds : 0, this.times.at(-1) ?? end, 0);
    this.speed = SPEEDS.find((speed) => this.duration / speed <= PLAYS_FOR) ?? SPEEDS[SPEEDS.length - 1];
    this.seek(this.duration);
  }

  // Shows the last keyframe before `seconds`, and the bins and marks up to then. Before the first keyframe it shows that.
  seek(seconds: number): void {
    const at = Math.max(0, Math.min(this.duration, seconds || 0));
    this.cursor = at;
    this.store.batch(() => {
      const index = Math.max(0, after(this.times, at) - 1);
      if (index !== this.shown) this.show(index);
      const store = this.store, { width, first, values } = this.series;
      const bins = Math.max(0, Math.min(values[SERIES[0]].length, Math.floor(at / width + 1e-6) - first));
      store.series = bins ? { width, first, values: Object.fromEntries(SERIES.map((name) => [name, values[name].subarray(0, bins)])) }
        : { width, first, values: seriesValues(0) };
      store.marks = this.marks.slice(0, after(this.marks.map(([time]) => time), at));
      store.curves = this.curves.map(({ name, at: times, value }) => {
        const points = after(times, at);
        return { name, at: times.slice(0, points), value: value.slice(0, points) };
      });
      for (const name of ["series", "curves"]) store.touch(name);
      store.touch("marks");
      if (this.moment) store.frame = { ...this.moment, wall: this.moment.wall + at - this.moment.at, at };
    });
  }

  // Playing, after so many seconds of the viewer's. From the end it begins again.
  advance(elapsed: number): void {
    if (!this.playing) return;
    const to = this.cursor + Math.max(0, elapsed) * this.speed;
    this.seek(to);
    if (to >= this.duration) this.playing = false;
  }

  play(): void {
    if (this.cursor >= this.duration) this.seek(0);
    this.playing = this.duration > 0;
  }

  pause(): void {
    this.playing = false;
  }

  private show(index: number): void {
    const { header, buffers } = this.still, key = this.keyframes[index];
    this.store.apply({ ...header, reset: true, series: undefined, marks: undefined, curves: undefined }, buffers);
    this.shown = index;
    this.moment = this.store.frame;
    if (!key) return;
    const there = key.header.pieces?.filter((piece) => piece?.table === "servers").map((piece) => piece.size) ?? [];
    if (there.length) this.store.servers.length = Math.min(this.store.servers.length, Math.max(...there));
    this.store.apply({ ...key.header, type: "frame", reset: false, series: undefined, marks: undefined, curves: undefined }, key.buffers);
    this.moment = this.store.frame;
  }
}

// How many of these sorted times are at most `at`.
function after(times: readonly number[], at: number): number {
  let low = 0, high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] <= at) low = middle + 1;
    else high = middle;
  }
  return low;
}
