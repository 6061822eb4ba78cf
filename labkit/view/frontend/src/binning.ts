// A window of a plane as at most 4,096 bins: what the heat map draws. A bin is one cell, or a block of them when there are
// more. It costs one look at each expert, whatever the size of the grid.
import { cellAt, cellsOf, coordinates, placeOf, uidOf } from "./grid";
import type { Place, Plane, Window } from "./grid";
import type { ExpertTable } from "./store";
import { NOWHERE } from "./store";
import { ALIVE, DEAD, STARTING, SUSPECT, UNCLAIMED } from "./types";
import type { Layer, Mode } from "./types";

export const MAX_BINS = 4096;
const SUSPECT_SHARE = 0.1, DEAD_SHARE = 0.5; // of the experts of a block: in trouble, and dead

// Arrays have rows × cols entries, row by row; blocks begin at multiples of their size, so that they stay put when one pans.
export interface Bins {
  slice: number; row: number; col: number; // where the first bin begins
  blockRows: number; blockCols: number; rows: number; cols: number;
  value: Float32Array; // mean of what is known; NaN: nothing is
  state: Uint8Array; // of the block as a whole
  claimed: Uint32Array; alive: Uint32Array; suspect: Uint32Array; dead: Uint32Array; adopted: Uint32Array; // how many experts
  expert: Int32Array; // row of the last expert in it, in the table of experts; -1: none
}

export function bin(
  experts: ExpertTable, layer: number, plane: Plane, slice: number, window: Window, mode: Mode, most = MAX_BINS,
): Bins {
  const bins = emptyBins(plane, slice, window, most);
  const { row, col, rows, cols, blockRows, blockCols } = bins;
  const values = experts[mode], known = new Uint32Array(rows * cols), area = plane.rows * plane.cols;
  for (let i = 0; i < experts.n; i++) {
    const cell = experts.cell[i];
    if (cell === NOWHERE || (!plane.layers && (experts.layer[i] !== layer || cell >= plane.cells || Math.floor(cell / area) !== slice))) continue;
    const inside = cell - slice * area;
    const inRow = plane.layers ? experts.layer[i] : Math.floor(inside / plane.cols), inCol = plane.layers ? cell : inside % plane.cols;
    const r = Math.floor((inRow - row) / blockRows), c = Math.floor((inCol - col) / blockCols);
    if (r < 0 || r >= rows || c < 0 || c >= cols) continue;
    const at = r * cols + c, state = experts.state[i], value = values[i];
    if (state === UNCLAIMED) continue;
    bins.claimed[at]++;
    bins.expert[at] = i;
    bins.adopted[at] += experts.adopted[i];
    if (state === ALIVE) bins.alive[at]++;
    else if (state === SUSPECT) bins.suspect[at]++;
    else if (state === DEAD) bins.dead[at]++;
    if (!Number.isNaN(value)) {
      bins.value[at] = known[at] ? bins.value[at] + value : value;
      known[at]++;
    }
  }
  for (let at = 0; at < known.length; at++) {
    if (known[at] > 1) bins.value[at] /= known[at];
    bins.state[at] = stateOf(bins.claimed[at], bins.alive[at], bins.suspect[at], bins.dead[at]);
  }
  return bins;
}

// The worst that matters: one dead expert of a hundred does not make a block dead, nor does it go unseen when there are ten.
export function stateOf(claimed: number, alive: number, suspect: number, dead: number): number {
  if (!claimed) return UNCLAIMED;
  if (dead >= DEAD_SHARE * claimed) return DEAD;
  if (suspect + dead >= SUSPECT_SHARE * claimed) return SUSPECT;
  return alive ? ALIVE : STARTING;
}

// Bins over a window, with nothing in them. Blocks are square, but for a wrapped line and for layers, of which they are stretches.
function emptyBins(plane: Plane, slice: number, window: Window, most: number): Bins {
  const flat = plane.wrapped || plane.layers, share = (window.rows * window.cols) / most;
  let block = Math.max(1, Math.floor(flat ? share : Math.sqrt(share)));
  for (; ; block += Math.ceil(block / 64)) {
    const blockRows = flat ? 1 : block;
    const row = snap(window.row, blockRows), col = snap(window.col, block);
    const rows = Math.ceil((window.row + window.rows - row) / blockRows), cols = Math.ceil((window.col + window.cols - col) / block);
    if (rows * cols > most) continue;
    const n = rows * cols, counts = () => new Uint32Array(n);
    return {
      slice, row, col, blockRows, blockCols: block, rows, cols, value: new Float32Array(n).fill(NaN), state: new Uint8Array(n),
      claimed: counts(), alive: counts(), suspect: counts(), dead: counts(), adopted: counts(), expert: new Int32Array(n).fill(-1),
    };
  }
}

const snap = (value: number, block: number) => Math.floor(value / block) * block;

// Whether each bin is one cell.
export function isFine(bins: Bins): boolean {
  return bins.blockRows === 1 && bins.blockCols === 1;
}

// The place of a bin's first cell.
export function placeOfBin(bins: Bins, at: number): Place {
  return {
    slice: bins.slice, row: bins.row + Math.floor(at / bins.cols) * bins.blockRows, col: bins.col + (at % bins.cols) * bins.blockCols,
  };
}

// The bin over a place; -1: it is not in the window.
export function binAt(bins: Bins, { slice, row, col }: Place): number {
  const r = Math.floor((row - bins.row) / bins.blockRows), c = Math.floor((col - bins.col) / bins.blockCols);
  return slice === bins.slice && r >= 0 && r < bins.rows && c >= 0 && c < bins.cols ? r * bins.cols + c : -1;
}

// `ffn.3.17`, or `ffn.0–7.16–23` for a block; "" for a bin behind the end of a wrapped line.
export function binName(layer: Layer, plane: Plane, bins: Bins, at: number): string {
  const first = placeOfBin(bins, at), cell = cellAt(plane, first);
  if (cell < 0) return "";
  layer = plane.layers?.[first.row] ?? layer;
  if (isFine(bins)) return uidOf(layer, cell);
  if (plane.layers) return `${uidOf(layer, cell)} – ${uidOf(layer, Math.min(cell + bins.blockCols, cellsOf(layer.sizes)) - 1)}`;
  const last = {
    slice: first.slice, row: Math.min(first.row + bins.blockRows, plane.rows) - 1, col: Math.min(first.col + bins.blockCols, plane.cols) - 1,
  };
  const end = cellAt(plane, last), to = coordinates(layer.sizes, end < 0 ? plane.cells - 1 : end);
  return [layer.name, ...coordinates(layer.sizes, cell).map((from, i) => (from === to[i] ? from : `${from}–${to[i]}`))].join(".");
}

// `alive, adopted`, or `12 alive, 3 dead` for a block.
export function stateText(bins: Bins, at: number): string {
  if (isFine(bins) || !bins.claimed[at]) return STATE_WORDS[bins.state[at]] + (bins.adopted[at] ? ", adopted" : "");
  const starting = bins.claimed[at] - bins.alive[at] - bins.suspect[at] - bins.dead[at];
  const parts = [[bins.alive[at], "alive"], [bins.suspect[at], "suspect"], [bins.dead[at], "dead"], [starting, "starting"], [bins.adopted[at], "adopted"]];
  return parts.filter(([count]) => count).map(([count, word]) => `${count} ${word}`).join(", ");
}

export const STATE_WORDS = ["unclaimed", "alive", "suspect", "dead", "starting"];

export function rowOf(experts: ExpertTable, layer: number, cell: number): number {
  if (cell < 0) return -1;
  for (let i = 0; i < experts.n; i++) if (experts.layer[i] === layer && experts.cell[i] === cell) return i;
  return -1;
}

export function placeOfExpert(experts: ExpertTable, plane: Plane, expert: number): Place | null {
  const cell = expert >= 0 && expert < experts.n ? experts.cell[expert] : NOWHERE;
  if (plane.layers) return cell < plane.cols && experts.layer[expert] < plane.rows ? { slice: 0, row: experts.layer[expert], col: cell } : null;
  return cell < plane.cells ? placeOf(plane, cell) : null;
}
