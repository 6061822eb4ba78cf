import { describe, expect, it } from "vitest";
import { planeOf, wholeOf } from "../src/grid";
import { Viewpoint } from "../src/viewpoint";

const over = (...sizes: number[]) => {
  const view = new Viewpoint();
  view.adopt(planeOf(sizes), true);
  return view;
};

describe("the cursor", () => {
  it("appears in the corner, moves, and stops at the edges", () => {
    const view = over(4, 6);
    view.move(1, 0);
    expect(view.cursor).toEqual({ slice: 0, row: 0, col: 0 });
    view.move(1, 2);
    view.move(9, 9);
    expect(view.cursor).toEqual({ slice: 0, row: 3, col: 5 });
    view.move(-9, -9);
    expect(view.cursor).toEqual({ slice: 0, row: 0, col: 0 });
  });

  it("keeps to the cells of a wrapped line", () => {
    const view = over(100); // 7 rows of 16, the last one of 4
    view.put({ slice: 0, row: 5, col: 15 });
    view.move(1, 0);
    expect(view.cursor).toEqual({ slice: 0, row: 6, col: 3 });
  });

  it("takes the window along", () => {
    const view = over(100, 100);
    view.zoomBy(10, { row: 0, col: 0 });
    view.put({ slice: 0, row: 9, col: 9 });
    view.move(1, 5);
    expect(view.window).toEqual({ row: 1, col: 5, rows: 10, cols: 10 });
  });

  it("goes from slice to slice when they lie side by side, and not when there is one", () => {
    const view = over(3, 2, 2);
    expect(view.slices()).toEqual([0, 1, 2]);
    view.put({ slice: 0, row: 1, col: 1 });
    view.move(0, 1);
    expect(view.cursor).toEqual({ slice: 1, row: 1, col: 0 });
    view.move(0, -1);
    expect(view.cursor).toEqual({ slice: 0, row: 1, col: 1 });
    view.showSlice(0);
    view.move(0, 1);
    expect(view.cursor).toEqual({ slice: 0, row: 1, col: 1 });
  });
});

describe("slices", () => {
  it("are shown side by side when they are few and small, else one at a time", () => {
    expect(over(9, 4, 4).overview).toBe(true);
    expect(over(10, 4, 4).canOverview).toBe(false);
    expect(over(8, 64, 64)).toMatchObject({ overview: false, canOverview: true });
    expect(over(4, 4).slices()).toEqual([0]);
  });

  it("together have no more bins than one grid", () => {
    const view = over(8, 64, 64);
    view.showAll(true);
    expect(view.most * view.slices().length).toBeLessThanOrEqual(4096);
  });

  it("are chosen within bounds, with the cursor", () => {
    const view = over(3, 2, 2);
    view.put({ slice: 0, row: 1, col: 0 });
    view.showSlice(2);
    expect([view.slices(), view.cursor]).toEqual([[2], { slice: 2, row: 1, col: 0 }]);
    view.showSlice(99);
    expect(view.slice).toBe(2);
    view.showSlice(NaN);
    expect(view.slice).toBe(0);
  });
});

describe("a window", () => {
  it("is zoomed around the cursor, and Escape's reset shows everything", () => {
    const view = over(100, 100);
    view.put({ slice: 0, row: 90, col: 10 });
    view.zoomBy(4);
    expect(view.zoomed).toBe(true);
    expect(view.window).toEqual({ row: 75, col: 0, rows: 25, cols: 25 });
    view.pan(-1000, 3);
    expect(view.window).toMatchObject({ row: 0, col: 3 });
    view.reset();
    expect(view.window).toEqual(wholeOf(view.plane));
  });

  it("stays where it is when the grid grows, and the whole stays the whole", () => {
    const near = over(100, 100), far = over(100, 100);
    near.zoomBy(4, { row: 99, col: 99 });
    for (const view of [near, far]) view.adopt(planeOf([200, 100]), false);
    expect(near.window).toEqual({ row: 75, col: 75, rows: 25, cols: 25 });
    expect(far.window.rows).toBe(200);
    near.adopt(planeOf([10, 10]), false);
    expect(near.window).toEqual(wholeOf(near.plane));
  });

  it("begins anew with another grid", () => {
    const view = over(100, 100);
    view.put({ slice: 0, row: 50, col: 50 });
    view.zoomBy(4);
    view.adopt(planeOf([100, 100]), true);
    expect([view.zoomed, view.cursor]).toEqual([false, null]);
  });
});
