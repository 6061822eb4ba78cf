// What part of a grid the heat map shows, and where its keyboard cursor is. No DOM: the heat map asks, this answers.
import { cellAt, cellsOf, follow, isWhole, moved, wholeOf, zoom } from "./grid";
import type { Place, Plane, Window } from "./grid";
import { MAX_BINS } from "./binning";

const MOST_TILES = 9; // slices that are shown side by side

export class Viewpoint {
  plane: Plane = { slices: 1, rows: 1, cols: 1, cells: 0, wrapped: false };
  window: Window = wholeOf(this.plane);
  slice = 0;
  overview = false; // all slices side by side
  cursor: Place | null = null;

  // Another grid, or the same one grown: what is shown stays, as far as it can.
  adopt(plane: Plane, fresh: boolean): void {
    const same = plane.rows === this.plane.rows && plane.cols === this.plane.cols && plane.slices === this.plane.slices && plane.cells === this.plane.cells;
    if (same && !fresh) return;
    const whole = fresh || isWhole(this.plane, this.window), tiled = fresh || plane.slices !== this.plane.slices;
    this.plane = plane;
    this.slice = fresh ? 0 : Math.min(this.slice, plane.slices - 1);
    if (tiled) this.overview = this.canOverview && plane.cells <= MAX_BINS;
    const { rows, cols } = this.window;
    this.window = whole ? wholeOf(plane) : moved(plane, { ...this.window, rows: Math.min(rows, plane.rows), cols: Math.min(cols, plane.cols) });
    if (fresh || (this.cursor && cellAt(plane, this.cursor) < 0)) this.cursor = null;
  }

  get canOverview(): boolean {
    return this.plane.slices > 1 && this.plane.slices <= MOST_TILES;
  }

  get zoomed(): boolean {
    return !isWhole(this.plane, this.window);
  }

  slices(): number[] {
    return this.overview ? Array.from({ length: this.plane.slices }, (_, i) => i) : [this.slice];
  }

  // Bins that each slice may have, so that all together are at most 4,096.
  get most(): number {
    return Math.floor(MAX_BINS / (this.overview ? this.plane.slices : 1));
  }

  showSlice(slice: number): void {
    this.slice = Math.max(0, Math.min(this.plane.slices - 1, Math.round(slice) || 0));
    this.overview = false;
    if (this.cursor && cellAt(this.plane, { ...this.cursor, slice: this.slice }) >= 0) this.cursor = { ...this.cursor, slice: this.slice };
    else this.cursor = null;
  }

  showAll(all: boolean): void {
    this.overview = all && this.canOverview;
    if (!this.overview && this.cursor) this.slice = this.cursor.slice;
  }

  // Moves the cursor by so many rows and columns; in the overview, over the edge lies the next slice. The first move shows it.
  move(rows: number, cols: number): void {
    const { plane, window } = this;
    if (!this.cursor) {
      this.cursor = { slice: this.slices()[0], row: window.row, col: window.col };
      return;
    }
    let { slice, row, col } = this.cursor;
    row = Math.max(0, Math.min(plane.rows - 1, row + rows));
    col += cols;
    if (col >= plane.cols && this.overview && slice + 1 < plane.slices) [slice, col] = [slice + 1, this.zoomed ? window.col : 0];
    else if (col < 0 && this.overview && slice > 0) [slice, col] = [slice - 1, plane.cols - 1];
    col = Math.max(0, Math.min(plane.cols - 1, col));
    if (plane.layers) col = Math.min(col, cellsOf(plane.layers[row].sizes) - 1);
    while (cellAt(plane, { slice, row, col }) < 0 && col > 0) col--; // the last row of a wrapped line is shorter
    this.put({ slice, row, col });
  }

  // The cursor to a place, and the window after it.
  put(place: Place): void {
    this.cursor = place;
    if (!this.overview) this.slice = place.slice;
    this.window = follow(this.plane, this.window, place);
  }

  zoomBy(factor: number, at?: { row: number; col: number }): void {
    const middle = { row: this.window.row + (this.window.rows - 1) / 2, col: this.window.col + (this.window.cols - 1) / 2 };
    this.window = zoom(this.plane, this.window, at ?? this.cursor ?? middle, factor);
  }

  pan(rows: number, cols: number): void {
    this.window = moved(this.plane, { ...this.window, row: this.window.row + rows, col: this.window.col + cols });
  }

  reset(): void {
    this.window = wholeOf(this.plane);
  }
}
