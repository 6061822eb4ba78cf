// A small chart over time: uPlot, with our colours, a title that shows the last value (or the one under the pointer),
// and thin lines where something happened to a server.
import uPlot from "uplot";
import { attribute, h, text } from "./dom";
import { clock, figures } from "./format";
import type { SeriesTable, Store } from "./store";
import { readTheme, type Theme } from "./theme";

export interface Line {
  name: string; // as written in the title
  color: (theme: Theme) => string;
  format: (value: number | null) => string;
  dashed?: boolean;
  axis?: "right"; // has an axis of its own
}
export type Row = (number | null | undefined)[]; // null parts a line, undefined joins it

const GAP = 3; // bins without a value that a line still crosses, for what is not known in every bin

// Times of the bins' beginnings, in seconds since the start.
export function times(series: SeriesTable): number[] {
  const count = series.values.loss?.length ?? 0;
  return Array.from({ length: count }, (_, i) => (series.first + i) * series.width);
}

// NaN is null: uPlot leaves a gap there. Short gaps are bridged, so that a loss once in a while is a line.
export function row(values: ArrayLike<number>, bridge = false): Row {
  const result: Row = Array.from(values, (value) => (Number.isFinite(value) ? value : null));
  if (!bridge) return result;
  let last = -1;
  for (let i = 0; i < result.length; i++) {
    if (result[i] === null) continue;
    if (last >= 0 && i - last > 1 && i - last <= GAP + 1) {
      for (let j = last + 1; j < i; j++) result[j] = undefined;
    }
    last = i;
  }
  return result;
}

export function last(values: Row): number | null {
  for (let i = values.length - 1; i >= 0; i--) {
    const value = values[i];
    if (typeof value === "number") return value;
  }
  return null;
}

// 2.00 MB is 2 MB beside an axis.
const short = (value: string): string => value.replace(/\.0+(?=\D|$)/, "");

export interface ChartOptions {
  label: string; // of the region that screen readers name
  lines: Line[];
  sync: string;
  height: number;
  bars?: (chart: uPlot, theme: Theme) => void; // draws instead of the lines
  close?: boolean; // the scale ends where the values do, and points are seen one by one where they are few
  top?: (values: Row[]) => number; // the upper end of the left scale, from what is shown
}

export class Chart {
  readonly el: HTMLElement;
  get name(): string { return this.options.label; }
  private canvas: HTMLElement;
  private title: HTMLElement;
  private plot: uPlot | null = null;
  private data: [number[], ...Row[]];
  private theme: Theme | null = null;
  private sizes: ResizeObserver | null = null;
  private until = 0; // right end of time, if that is given
  private marks: readonly [number, string][] = [];

  constructor(private store: Store, private options: ChartOptions) {
    this.data = [[], ...options.lines.map(() => [] as Row)];
    this.title = h("figcaption", { class: "lk-chart-title" });
    this.canvas = h("div", { class: "lk-chart-canvas" });
    this.canvas.style.height = `${options.height}px`;
    this.el = h("figure", { class: "lk-chart", role: "img", "aria-label": options.label }, this.title, this.canvas);
    if (typeof ResizeObserver === "function") {
      this.sizes = new ResizeObserver(() => this.resize());
      this.sizes.observe(this.canvas);
    }
    this.say(null);
  }

  set(xs: number[], rows: Row[], until = 0): void {
    this.data = [xs, ...rows];
    this.until = until;
    this.marks = this.store.marks;
    this.say(null);
    const said = this.options.lines.map((line, i) => `${line.name} ${line.format(last(rows[i]))}`);
    attribute(this.el, "aria-label", `${this.options.label}, last: ${said.join(", ")}`);
    if (!this.plot) this.make();
    else this.plot.setData(this.data as uPlot.AlignedData);
  }

  restyle(): void {
    this.theme = null;
    if (!this.plot) return;
    this.plot.destroy();
    this.plot = null;
    this.make();
  }

  redraw(): void { this.plot?.redraw(true, true); }

  destroy(): void {
    this.sizes?.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }

  private say(at: number | null): void {
    const { lines, label } = this.options;
    const values = lines.map((line, i) => {
      const value = at === null ? last(this.data[i + 1] as Row) : ((this.data[i + 1] as Row)[at] ?? null);
      return `${line.name} ${line.format(value)}`;
    });
    const when = at === null ? "" : ` at ${clock(this.data[0][at] ?? 0)}`;
    const value = (lines.length ? values.join("  ·  ") : label) + when;
    if (this.title.childElementCount !== lines.length) {
      this.title.replaceChildren(...lines.map(() => h("span", { class: "lk-chart-line" }, h("i", { "aria-hidden": "true" }), h("span"))), h("small"));
    }
    if (!lines.length) return text(this.title, value);
    const theme = (this.theme ??= this.el.isConnected ? readTheme(this.el) : null);
    lines.forEach((line, i) => {
      const [key, words] = this.title.children[i].children;
      if (theme) (key as HTMLElement).style.borderTop = `2px ${line.dashed ? "dotted" : "solid"} ${line.color(theme)}`;
      text(words, values[i]);
    });
    text(this.title.lastElementChild!, when);
  }

  private make(): void {
    const width = this.canvas.clientWidth;
    if (!width || !this.el.isConnected) return;
    const theme = (this.theme = readTheme(this.el));
    const { lines, bars, height, sync, top, close } = this.options;
    const font = `11px ${getComputedStyle(this.el).fontFamily}`;
    const grid = { stroke: theme.line, width: 1 };
    const quiet = { stroke: theme.dim, font, grid, ticks: { show: false }, gap: 4 };
    const axis = (scale: string, line: Line | undefined, side: number): uPlot.Axis => ({
      ...quiet, scale, side, size: side === 1 ? 50 : 44, space: 26, grid: side === 1 ? { show: false } : grid,
      values: (_, ticks) => ticks.map((tick) => short((line ? line.format : figures)(tick))),
    });
    const right = lines.find((line) => line.axis === "right");
    const from = (values: Row[]): number => Math.max(0, ...values.flatMap((one) => one.map((value) => value ?? 0)));
    const range = (side: "left" | "right"): uPlot.Range.Function => () => {
      const rows = this.data.slice(1).filter((_, i) => (lines[i].axis === "right") === (side === "right")) as Row[];
      const known = rows.flat().filter((value) => typeof value === "number");
      const low = Math.min(...known), high = Math.max(...known), room = 0.08 * (high - low);
      if (close && known.length) return [low - room, high + (room || Math.abs(high) || 1)];
      return [Math.min(0, low * 1.08), (top && side === "left" ? top(rows) : from(rows)) * 1.08 || 1];
    };
    this.plot = new uPlot({
      width, height, legend: { show: false }, padding: [6, right ? 0 : 16, 0, 0],
      cursor: { sync: { key: sync }, points: { size: 5 }, drag: { x: false, y: false }, y: false },
      scales: {
        x: { time: false, range: () => this.span() },
        y: { range: range("left") },
        ...(right ? { right: { range: range("right") } } : {}),
      },
      axes: [
        { ...quiet, size: 20, space: 60, values: (_, ticks) => ticks.map(clock), incrs: [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400] },
        axis("y", lines.find((line) => line.axis !== "right"), 3),
        ...(right ? [axis("right", right, 1)] : []),
      ],
      series: [{}, ...lines.map((line): uPlot.Series => ({
        label: line.name, scale: line.axis === "right" ? "right" : "y", stroke: line.color(theme), width: 1.5,
        dash: line.dashed ? [2, 3] : undefined, points: { show: false },
        ...(bars ? { paths: () => null } : {}),
      }))],
      hooks: {
        drawAxes: [(plot) => this.drawMarks(plot, theme)],
        draw: bars ? [(plot) => bars(plot, theme)] : close ? [(plot) => drawDots(plot, theme)] : [],
        setCursor: [(plot) => this.say(plot.cursor.idx ?? null)],
      },
    }, this.data as uPlot.AlignedData, this.canvas);
    this.say(null);
  }

  private span(): [number, number] {
    const xs = this.data[0], width = this.store.series.width || 1;
    const first = xs.length ? xs[0] : 0;
    const end = this.until || (xs.length ? xs[xs.length - 1] + width : 1);
    return [first, Math.max(end, first + 10 * width)];
  }

  private drawMarks(plot: uPlot, theme: Theme): void {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = theme.dim;
    ctx.globalAlpha = 0.6;
    ctx.lineWidth = Math.max(1, Math.round(devicePixelRatio || 1));
    ctx.setLineDash([3 * ctx.lineWidth, 3 * ctx.lineWidth]);
    ctx.beginPath();
    for (const [at] of this.marks.slice(-200)) {
      const x = Math.round(plot.valToPos(at, "x", true)) + 0.5;
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
    }
    ctx.stroke();
    ctx.restore();
  }

  private resize(): void {
    const width = this.canvas.clientWidth;
    if (!width) return;
    if (!this.plot) this.make();
    else if (Math.abs(this.plot.width - width) >= 1) this.plot.setSize({ width, height: this.options.height });
  }
}

const MOST_DOTS = 60;

function drawDots({ ctx, data, valToPos }: uPlot, theme: Theme): void {
  const size = 4 * (window.devicePixelRatio || 1);
  ctx.fillStyle = theme.accent;
  if (data[0].length <= MOST_DOTS) data[0].forEach((at, i) => {
    const value = data[1][i];
    if (typeof value === "number") ctx.fillRect(valToPos(at, "x", true) - size / 2, valToPos(value, "y", true) - size / 2, size, size);
  });
}
