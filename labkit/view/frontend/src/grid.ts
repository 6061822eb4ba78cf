// Where experts lie: a grid of any dimensions, cut into planes that can be drawn, and windows into a plane.
// One dimension is wrapped into rows; of three and more, the leading ones number the slices. Binning and the heat map use it.
import type { Layer } from "./types";

export interface Plane {
  slices: number; rows: number; cols: number; cells: number; wrapped: boolean;
  layers?: readonly Layer[]; // each row is one of them, with its experts in their order
}
export interface Place { slice: number; row: number; col: number }
export interface Window { row: number; col: number; rows: number; cols: number }

const MOST_LAYERS = 128; // rows of a plane of layers
const LEAST_WINDOW = 4; // rows and columns that the deepest zoom shows

export const cellsOf = (sizes: readonly number[]) => sizes.reduce((product, size) => product * size, 1);

export function planeOf(sizes: readonly number[]): Plane {
  const cells = cellsOf(sizes);
  if (sizes.filter((size) => size > 1).length <= 1) return wrap(cells); // 1 × 7 is a row of 7
  const [rows, cols] = sizes.slice(-2);
  return { slices: cells / (rows * cols), rows, cols, cells, wrapped: false };
}

// All layers at once: a row for each, of its experts in their order.
export function planeOfLayers(all: readonly Layer[]): Plane {
  const layers = all.slice(0, MOST_LAYERS), rows = layers.length, cols = Math.max(...layers.map(({ sizes }) => cellsOf(sizes)));
  return { slices: 1, rows, cols, cells: rows * cols, wrapped: false, layers };
}

// A line of n cells as rows, about twice as wide as high, a power of two wide, and at most 64 rows.
function wrap(n: number): Plane {
  let cols = 16;
  while (cols < Math.sqrt(2 * n) || cols * 64 < n) cols *= 2;
  cols = Math.min(cols, Math.max(n, 1));
  return { slices: 1, rows: Math.max(1, Math.ceil(n / cols)), cols, cells: n, wrapped: true };
}

export function placeOf(plane: Plane, cell: number): Place {
  const slice = Math.floor(cell / (plane.rows * plane.cols));
  const inside = cell - slice * plane.rows * plane.cols;
  return { slice, row: Math.floor(inside / plane.cols), col: inside % plane.cols };
}

// The index of a cell in its grid; -1: there is none, as behind the end of a wrapped line, or of a layer.
export function cellAt(plane: Plane, { slice, row, col }: Place): number {
  if (slice < 0 || slice >= plane.slices || row < 0 || row >= plane.rows || col < 0 || col >= plane.cols) return -1;
  const { layers } = plane, cell = layers ? col : (slice * plane.rows + row) * plane.cols + col;
  return cell < (layers ? cellsOf(layers[row].sizes) : plane.cells) ? cell : -1;
}

// Row-major, the last coordinate fastest.
export function coordinates(sizes: readonly number[], cell: number): number[] {
  const found: number[] = [];
  for (let i = sizes.length - 1; i >= 0; i--) {
    found.unshift(cell % sizes[i]);
    cell = Math.floor(cell / sizes[i]);
  }
  return found;
}

export function uidOf(layer: Layer, cell: number): string {
  return [layer.name, ...coordinates(layer.sizes, cell)].join(".");
}

// `ffn.3`: what all uids of a slice begin with.
export function sliceName(layer: Layer, slice: number): string {
  return [layer.name, ...coordinates(layer.sizes.slice(0, -2), slice)].join(".");
}

export function wholeOf(plane: Plane): Window {
  return { row: 0, col: 0, rows: plane.rows, cols: plane.cols };
}

export function isWhole(plane: Plane, window: Window): boolean {
  return window.rows >= plane.rows && window.cols >= plane.cols;
}

// A window `factor` times as close, with `at` in the middle where the plane's edges allow it. factor < 1 goes back.
export function zoom(plane: Plane, window: Window, at: { row: number; col: number }, factor: number): Window {
  const rows = limit(Math.ceil(window.rows / factor), Math.min(LEAST_WINDOW, plane.rows), plane.rows);
  const cols = limit(Math.ceil(window.cols / factor), Math.min(LEAST_WINDOW, plane.cols), plane.cols);
  return moved(plane, { rows, cols, row: Math.round(at.row - (rows - 1) / 2), col: Math.round(at.col - (cols - 1) / 2) });
}

// The window, moved as little as need be to show `at`.
export function follow(plane: Plane, window: Window, at: { row: number; col: number }): Window {
  const row = limit(window.row, at.row - window.rows + 1, at.row), col = limit(window.col, at.col - window.cols + 1, at.col);
  return row === window.row && col === window.col ? window : moved(plane, { ...window, row, col });
}

// The window with its corner where it says, or as near as the plane allows.
export function moved(plane: Plane, window: Window): Window {
  const { rows, cols } = window;
  return { rows, cols, row: limit(window.row, 0, plane.rows - rows), col: limit(window.col, 0, plane.cols - cols) };
}

export function limit(value: number, least: number, most: number): number {
  return Math.max(least, Math.min(most, value));
}
