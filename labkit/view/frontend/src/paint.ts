// Draws planes of experts on a canvas: colours by value, and shapes by state, so that a dead cell (crossed out), a suspect
// one (half), an unclaimed one (an empty outline) and an adopted one (a corner is cut off) are told apart without colour.
// Called by the heat map and its legend.
import { isFine, placeOfBin } from "./binning";
import type { Bins } from "./binning";
import { cellAt } from "./grid";
import type { Place, Plane } from "./grid";
import { MODE_INFO, colour, css, rampOf, shareOf, textOn } from "./scales";
import type { Domain, Rgb } from "./scales";
import type { Theme } from "./theme";
import { ALIVE, DEAD, STARTING, SUSPECT, UNCLAIMED } from "./types";
import type { Mode } from "./types";

export interface Tile { bins: Bins; x: number; y: number; title: string } // x, y: of the first bin's corner, in CSS pixels
export interface Layout { tiles: Tile[]; width: number; height: number; binWidth: number; binHeight: number }
export interface Look { theme: Theme; mode: Mode; domain: Domain }

const GUTTER = 34, NAMES = 96, TOP = 16, GAP = 14; // for row numbers, names of layers, column numbers, and between slices
const WIDEST = 72, HIGHEST = 44; // of one bin
const FONT = "10px system-ui, sans-serif";

// Puts the bins of one slice, or of several side by side, into a width; all slices have bins of the same size.
export function layOut(slices: Bins[], titles: string[], width: number, height: number, layers: boolean): Layout {
  const gutter = layers ? NAMES : GUTTER;
  const { rows, cols } = slices[0], count = slices.length, top = titles[0] ? TOP * 2 : TOP;
  let best = { across: 1, binWidth: 0, binHeight: 0 };
  for (let across = 1; across <= count; across++) {
    const down = Math.ceil(count / across);
    const w = Math.min(WIDEST, (width - gutter - (across - 1) * (GAP + gutter)) / across / cols);
    const h = Math.min(HIGHEST, layers ? 3 * w : w, Math.max(height / down - top, 24) / rows); // never higher than wide, but for rows of many
    if (w > 0 && Math.min(w, h) > Math.min(best.binWidth, best.binHeight) + 0.01) best = { across, binWidth: w, binHeight: h };
  }
  const crisp = (size: number) => (size >= 4 ? Math.floor(size) : size);
  const binWidth = Math.max(1, crisp(Math.min(best.binWidth, best.binHeight * 2))), binHeight = Math.max(1, crisp(best.binHeight));
  const stepX = cols * binWidth + GAP + gutter, stepY = rows * binHeight + top;
  const tiles = slices.map((bins, i) => ({
    bins, title: titles[i], x: gutter + (i % best.across) * stepX, y: top + Math.floor(i / best.across) * stepY,
  }));
  return { tiles, width, height: Math.ceil(count / best.across) * stepY + 2, binWidth, binHeight };
}

export function binUnder(layout: Layout, x: number, y: number): { tile: Tile; at: number } | null {
  for (const tile of layout.tiles) {
    const col = Math.floor((x - tile.x) / layout.binWidth), row = Math.floor((y - tile.y) / layout.binHeight);
    if (col >= 0 && col < tile.bins.cols && row >= 0 && row < tile.bins.rows) return { tile, at: row * tile.bins.cols + col };
  }
  return null;
}

export function paint(ctx: CanvasRenderingContext2D, layout: Layout, plane: Plane, look: Look): void {
  for (const tile of layout.tiles) {
    paintColours(ctx, tile, layout, look);
    paintShapes(ctx, tile, layout, plane, look.theme);
    if (layout.binWidth >= 30 && layout.binHeight >= 16) paintTexts(ctx, tile, layout, look);
    paintNumbers(ctx, tile, layout, plane, look.theme);
  }
}

let scratch: HTMLCanvasElement | null = null; // one pixel a bin

// All colours at once, as an image that is stretched: it costs the same for 16 bins and for 4,096.
function paintColours(ctx: CanvasRenderingContext2D, { bins, x, y }: Tile, { binWidth, binHeight }: Layout, look: Look): void {
  const { cols, rows } = bins, stops = rampOf(look.mode, look.theme.dark), table = Array.from({ length: 256 }, (_, i) => colour(stops, i / 255));
  const image = new ImageData(cols, rows), nothing = neutral(look.theme);
  for (let at = 0; at < rows * cols; at++) {
    const state = bins.state[at];
    if (state !== ALIVE && state !== SUSPECT) continue;
    const share = shareOf(look.domain, bins.value[at]), rgb = Number.isNaN(share) ? nothing : table[Math.round(share * 255)];
    image.data[at * 4] = rgb[0]; image.data[at * 4 + 1] = rgb[1]; image.data[at * 4 + 2] = rgb[2]; image.data[at * 4 + 3] = 255;
  }
  scratch ??= document.createElement("canvas");
  scratch.width = cols; scratch.height = rows;
  scratch.getContext("2d")?.putImageData(image, 0, 0);
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(scratch, x, y, cols * binWidth, rows * binHeight);
}

// An expert of which no value is known yet: neither end of the scale.
export const neutral = (theme: Theme): Rgb => (theme.dark ? [84, 84, 88] : [214, 214, 216]);

function paintShapes(ctx: CanvasRenderingContext2D, tile: Tile, { binWidth: w, binHeight: h }: Layout, plane: Plane, theme: Theme): void {
  const { bins, x, y } = tile, crosses = new Path2D(), slashes = new Path2D(), outlines = new Path2D(), dots = new Path2D();
  const fine = isFine(bins), gap = Math.min(w, h) >= 5 ? 1 : 0, inset = Math.min(w, h) >= 10 ? 2.5 : gap + 0.5;
  ctx.fillStyle = theme.ground;
  for (let at = 0; at < bins.state.length; at++) {
    const state = bins.state[at];
    if (state === ALIVE && !bins.adopted[at]) continue;
    const row = Math.floor(at / bins.cols), col = at % bins.cols;
    if (state === UNCLAIMED && cellAt(plane, placeOfBin(bins, at)) < 0) continue;
    const left = x + col * w, top = y + row * h, right = left + w - gap, bottom = top + h - gap;
    if (bins.adopted[at]) { // a corner is cut off
      const leg = Math.min(w, h) / 3;
      ctx.beginPath();
      ctx.moveTo(left, top + leg); ctx.lineTo(left, top); ctx.lineTo(left + leg, top);
      ctx.fill();
      slashes.moveTo(left, top + leg); slashes.lineTo(left + leg, top);
      if (state === ALIVE) continue;
    }
    if (state === SUSPECT) { // half of a cell, and of a block as much as is in trouble
      const share = fine ? 0.5 : Math.min(0.5, (bins.suspect[at] + bins.dead[at]) / bins.claimed[at]), leg = Math.sqrt(2 * share);
      const fromX = right - (right - left) * leg, fromY = bottom - (bottom - top) * leg;
      ctx.beginPath(); // one by one: a single path of thousands takes ten times as long to fill
      ctx.moveTo(right, fromY); ctx.lineTo(right, bottom); ctx.lineTo(fromX, bottom);
      ctx.fill();
      if (fine || Math.min(w, h) >= 10) { slashes.moveTo(fromX, bottom); slashes.lineTo(right, fromY); }
    } else {
      outlines.rect(left + 0.5, top + 0.5, Math.max(w - gap - 1, 1), Math.max(h - gap - 1, 1));
      if (state === DEAD) {
        crosses.moveTo(left + inset, top + inset); crosses.lineTo(right - inset, bottom - inset);
        crosses.moveTo(right - inset, top + inset); crosses.lineTo(left + inset, bottom - inset);
      } else if (state === STARTING) dots.rect((left + right) / 2 - 1.5, (top + bottom) / 2 - 1.5, 3, 3);
    }
  }
  ctx.lineWidth = 1;
  ctx.strokeStyle = theme.dim;
  ctx.globalAlpha = 0.5;
  if (Math.min(w, h) >= 4) ctx.stroke(outlines);
  ctx.globalAlpha = 1;
  if (gap) { // a line between neighbours
    for (let col = 1; col <= bins.cols; col++) ctx.fillRect(x + col * w - 1, y, 1, bins.rows * h);
    for (let row = 1; row <= bins.rows; row++) ctx.fillRect(x, y + row * h - 1, bins.cols * w, 1);
  }
  ctx.fillStyle = ctx.strokeStyle = theme.text;
  ctx.stroke(slashes);
  ctx.lineWidth = Math.min(w, h) >= 10 ? 1.5 : 1;
  ctx.stroke(crosses);
  ctx.fill(dots);
}

function paintTexts(ctx: CanvasRenderingContext2D, { bins, x, y }: Tile, { binWidth: w, binHeight: h }: Layout, look: Look): void {
  const stops = rampOf(look.mode, look.theme.dark), { text } = MODE_INFO[look.mode];
  ctx.font = FONT;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  for (let at = 0; at < bins.state.length; at++) {
    const value = bins.value[at];
    if (bins.state[at] !== ALIVE || Number.isNaN(value)) continue;
    ctx.fillStyle = textOn(colour(stops, shareOf(look.domain, value)));
    ctx.fillText(text(value), x + (at % bins.cols) * w + (w - 1) / 2, y + Math.floor(at / bins.cols) * h + h / 2, w - 4);
  }
}

// The coordinates along the left and the top, and the name of a slice above it.
function paintNumbers(ctx: CanvasRenderingContext2D, { bins, x, y, title }: Tile, { binWidth, binHeight }: Layout, plane: Plane, theme: Theme): void {
  ctx.font = FONT;
  ctx.fillStyle = theme.dim;
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  for (let row = 0, step = every(binHeight, 12); row < bins.rows; row += step) {
    const coordinate = (bins.row + row * bins.blockRows) * (plane.wrapped ? plane.cols : 1);
    if (!plane.wrapped || plane.rows > 1) ctx.fillText(plane.layers?.[coordinate].name ?? String(coordinate), x - 5, y + (row + 0.5) * binHeight, NAMES - 8);
  }
  ctx.textAlign = "center";
  ctx.textBaseline = "alphabetic";
  for (let col = 0, step = every(binWidth, 26); col < bins.cols; col += step) {
    const coordinate = bins.col + col * bins.blockCols;
    ctx.fillText(plane.wrapped && plane.rows > 1 ? `+${coordinate}` : String(coordinate), x + (col + 0.5) * binWidth, y - 4);
  }
  if (!title) return;
  ctx.textAlign = "left";
  ctx.fillStyle = theme.text;
  ctx.fillText(title, x, y - TOP - 2);
}

// Numbers stand so many bins apart: 1, 2, 4, 8 …
function every(size: number, room: number): number {
  let step = 1;
  while (step * size < room) step *= 2;
  return step;
}

// A frame around the bin over a place. `dashed`: where the keyboard is; else what is selected.
export function frame(ctx: CanvasRenderingContext2D, layout: Layout, place: Place, theme: Theme, kind: "selected" | "cursor" | "hover"): void {
  for (const { bins, x, y } of layout.tiles) {
    const row = Math.floor((place.row - bins.row) / bins.blockRows), col = Math.floor((place.col - bins.col) / bins.blockCols);
    if (bins.slice !== place.slice || row < 0 || row >= bins.rows || col < 0 || col >= bins.cols) continue;
    const gap = Math.min(layout.binWidth, layout.binHeight) >= 5 ? 1 : 0;
    const box = [x + col * layout.binWidth, y + row * layout.binHeight, layout.binWidth - gap, layout.binHeight - gap] as const;
    const ring = (color: string, width: number, out: number) => {
      ctx.strokeStyle = color;
      ctx.lineWidth = width;
      ctx.strokeRect(box[0] - out, box[1] - out, box[2] + 2 * out, box[3] + 2 * out);
    };
    ctx.setLineDash([]);
    if (kind === "hover") ring(theme.text, 1, 0);
    else {
      ring(theme.ground, 4, 1);
      if (kind === "cursor") ctx.setLineDash([3, 2]);
      ring(kind === "cursor" ? theme.text : theme.accent, 2, 1);
    }
    ctx.setLineDash([]);
    return;
  }
}

export const ADOPTED = 5; // of the legend alone

// What one bin looks like, for the legend.
export function sampleOf(state: number, value: number): Bins {
  const one = (n: number) => new Uint32Array([n]);
  return {
    slice: 0, row: 0, col: 0, blockRows: 1, blockCols: 1, rows: 1, cols: 1, value: new Float32Array([value]), state: new Uint8Array([state]),
    claimed: one(1), alive: one(0), suspect: one(0), dead: one(0), adopted: one(+(state === ADOPTED)), expert: new Int32Array([-1]),
  };
}

export function paintSample(ctx: CanvasRenderingContext2D, state: number, value: number, size: number, look: Look): void {
  const layout = { tiles: [], width: size, height: size, binWidth: size, binHeight: size };
  const tile = { bins: sampleOf(state, value), x: 0, y: 0, title: "" };
  paintColours(ctx, tile, layout, look);
  paintShapes(ctx, tile, layout, { slices: 1, rows: 1, cols: 1, cells: 1, wrapped: false }, look.theme);
}

// `linear-gradient(…)` of a ramp, for the legend.
export function gradient(mode: Mode, dark: boolean): string {
  return `linear-gradient(to right, ${rampOf(mode, dark).map(css).join(", ")})`;
}

