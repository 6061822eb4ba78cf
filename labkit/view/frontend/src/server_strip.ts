// Canvases of the servers' panel: all servers at a glance, and where the time of one server's calls goes.
import { attribute, h, pen } from "./dom";
import { milliseconds } from "./format";
import { nameOf, stateText } from "./server_order";
import type { ServerRow } from "./store";
import type { Theme } from "./theme";
import { ALIVE, DEAD, PERCENTILES, SUSPECT } from "./types";

const GAP = 2, HEIGHT = 18, WIDEST = 34, NARROWEST = 5;

export interface Cells { columns: number; rows: number; width: number }

// Boxes of `count` servers in a width, in as many rows as it takes.
export function layOut(count: number, width: number): Cells {
  const columns = Math.max(1, Math.min(count, Math.floor((width + GAP) / (NARROWEST + GAP))));
  const rows = Math.max(1, Math.ceil(count / columns));
  const even = Math.max(1, Math.ceil(count / rows));
  return { columns: even, rows, width: Math.min(WIDEST, (width + GAP) / even - GAP) };
}

// The strip: a box for each server in the order in which they came; the fuller, the more calls it answers.
// Suspect is a half, dead is crossed, starting is an outline: no state is told by colour alone.
export class Strip {
  readonly el: HTMLCanvasElement;
  private cells: Cells = { columns: 1, rows: 1, width: 1 };
  private rows: readonly ServerRow[] = [];

  constructor(picked: (server: number) => void) {
    this.el = h("canvas", { class: "lk-strip", role: "img", "aria-label": "no servers" });
    this.el.addEventListener("mousemove", (event) => {
      const i = this.at(event);
      attribute(this.el, "title", i < 0 ? null : `${nameOf(this.rows[i], i)}: ${stateText(this.rows[i])}`);
    });
    this.el.addEventListener("click", (event) => {
      const i = this.at(event);
      if (i >= 0) picked(i);
    });
  }

  draw(rows: readonly ServerRow[], theme: Theme): void {
    this.rows = rows;
    const width = this.el.parentElement?.clientWidth || 300;
    this.cells = layOut(rows.length, width);
    const height = this.cells.rows * (HEIGHT + GAP) - GAP;
    this.el.style.height = `${height}px`;
    this.el.style.width = `${width}px`;
    attribute(this.el, "aria-label", summary(rows));
    const ctx = pen(this.el, width, height);
    if (!ctx) return;
    const busiest = Math.max(1e-9, ...rows.map((row) => row.calls || 0));
    rows.forEach((row, i) => this.box(ctx, row, i, (row.calls || 0) / busiest, theme));
  }

  private box(ctx: CanvasRenderingContext2D, row: ServerRow, i: number, share: number, theme: Theme): void {
    const { columns, width } = this.cells;
    const x = (i % columns) * (width + GAP), y = Math.floor(i / columns) * (HEIGHT + GAP);
    const stroke = row.state === DEAD ? theme.causes.lost : row.state === SUSPECT ? theme.causes.timeout : theme.accent;
    ctx.save();
    ctx.beginPath();
    ctx.rect(x, y, width, HEIGHT);
    ctx.clip();
    if (row.state === ALIVE) {
      ctx.globalAlpha = 0.25;
      ctx.fillStyle = theme.accent;
      ctx.fillRect(x, y, width, HEIGHT);
      ctx.globalAlpha = 1;
      const tall = Math.max(share > 0 ? 2 : 0, share * HEIGHT);
      ctx.fillRect(x, y + HEIGHT - tall, width, tall);
    } else if (row.state === SUSPECT) {
      ctx.fillStyle = stroke;
      ctx.beginPath();
      ctx.moveTo(x, y + HEIGHT);
      ctx.lineTo(x + width, y + HEIGHT);
      ctx.lineTo(x + width, y);
      ctx.fill();
    } else if (row.state === DEAD) {
      ctx.strokeStyle = stroke;
      ctx.lineWidth = 1.5;
      ctx.beginPath();
      ctx.moveTo(x, y); ctx.lineTo(x + width, y + HEIGHT);
      ctx.moveTo(x + width, y); ctx.lineTo(x, y + HEIGHT);
      ctx.stroke();
    }
    ctx.restore();
    ctx.strokeStyle = row.state === ALIVE || row.state === DEAD || row.state === SUSPECT ? stroke : theme.dim;
    ctx.lineWidth = 1;
    ctx.strokeRect(x + 0.5, y + 0.5, width - 1, HEIGHT - 1);
  }

  private at(event: MouseEvent): number {
    const { columns, width, rows } = this.cells;
    const column = Math.floor(event.offsetX / (width + GAP)), line = Math.floor(event.offsetY / (HEIGHT + GAP));
    const i = line * columns + column;
    return column >= 0 && column < columns && line >= 0 && line < rows && i < this.rows.length ? i : -1;
  }
}

export function summary(rows: readonly ServerRow[]): string {
  const count = (state: number) => rows.filter((row) => row.state === state).length;
  const parts = [`${count(ALIVE)} alive`];
  if (count(SUSPECT)) parts.push(`${count(SUSPECT)} suspect`);
  if (count(DEAD)) parts.push(`${count(DEAD)} dead`);
  return `strip of ${rows.length} servers: ${parts.join(", ")}`;
}

// Queue, compute and network of p50, p95 and p99, one bar each, on one scale.
export function drawSplit(canvas: HTMLCanvasElement, latency: number[][], theme: Theme): void {
  const width = canvas.parentElement?.clientWidth || 260, tall = 14, gap = 6, left = 32, right = 46;
  const height = PERCENTILES.length * (tall + gap) - gap;
  canvas.style.height = `${height}px`;
  canvas.style.width = `${width}px`;
  const ctx = pen(canvas, width, height);
  if (!ctx) return;
  const sum = (k: number) => [1, 2, 3].reduce((total, part) => total + (latency[part][k] || 0), 0);
  const most = Math.max(1e-9, ...PERCENTILES.map((_, k) => sum(k)));
  ctx.font = `11px ${getComputedStyle(canvas).fontFamily}`;
  ctx.textBaseline = "middle";
  PERCENTILES.forEach((percentile, k) => {
    const y = k * (tall + gap);
    ctx.fillStyle = theme.dim;
    ctx.fillText(`p${percentile}`, 0, y + tall / 2 + 1);
    let x = left;
    [1, 2, 3].forEach((part) => {
      const wide = ((latency[part][k] || 0) / most) * Math.max(0, width - left - right);
      ctx.fillStyle = splitColors(theme)[part - 1];
      ctx.fillRect(x, y, Math.max(0, wide - 1), tall);
      x += wide;
    });
    ctx.fillStyle = theme.dim;
    ctx.fillText(`${milliseconds(latency[0][k])} ms`, x + 4, y + tall / 2 + 1);
  });
}

export const splitColors = (theme: Theme): [string, string, string] => [theme.causes.timeout, theme.accent, theme.causes.cancelled];
