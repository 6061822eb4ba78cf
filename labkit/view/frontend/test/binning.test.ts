import { describe, expect, it } from "vitest";
import { MAX_BINS, bin, binAt, binName, placeOfBin, placeOfExpert, rowOf, stateOf, stateText } from "../src/binning";
import { cellAt, coordinates, follow, moved, placeOf, planeOf, planeOfLayers, sliceName, uidOf, wholeOf, zoom } from "../src/grid";
import { Store } from "../src/store";
import { ALIVE, DEAD, STARTING, SUSPECT, UNCLAIMED } from "../src/types";
import { framed, grid, piece } from "./frames";

const storeOf = (...frame: ReturnType<typeof grid>) => {
  const store = new Store();
  store.apply(...frame);
  return store;
};
const binsOf = (sizes: number[], load?: (cell: number) => number, state?: (cell: number) => number, slice = 0, most = MAX_BINS) => {
  const store = storeOf(...grid(sizes, load, state)), plane = planeOf(sizes);
  return { store, plane, bins: bin(store.experts, 0, plane, slice, wholeOf(plane), "load", most), layer: store.layers[0] };
};

describe("a grid becomes planes:", () => {
  it.each([
    [[4, 6], { slices: 1, rows: 4, cols: 6, cells: 24, wrapped: false }],
    [[3, 4, 5], { slices: 3, rows: 4, cols: 5, cells: 60, wrapped: false }],
    [[2, 3, 4, 5], { slices: 6, rows: 4, cols: 5, cells: 120, wrapped: false }],
    [[7], { slices: 1, rows: 1, cols: 7, cells: 7, wrapped: true }],
    [[1, 7], { slices: 1, rows: 1, cols: 7, cells: 7, wrapped: true }],
    [[100], { slices: 1, rows: 7, cols: 16, cells: 100, wrapped: true }],
    [[1], { slices: 1, rows: 1, cols: 1, cells: 1, wrapped: true }],
  ])("%j", (sizes, plane) => expect(planeOf(sizes)).toEqual(plane));

  it.each([[[4, 6]], [[3, 4, 5]], [[2, 3, 4, 5]], [[37]]])("each cell of %j has a place of its own", (sizes) => {
    const plane = planeOf(sizes);
    for (let cell = 0; cell < plane.cells; cell++) expect(cellAt(plane, placeOf(plane, cell))).toBe(cell);
    expect(cellAt(plane, { slice: 0, row: plane.rows - 1, col: plane.cols })).toBe(-1);
    expect(cellAt(plane, { slice: plane.slices, row: 0, col: 0 })).toBe(-1);
  });

  it("a wrapped line ends where its cells do", () => {
    expect(cellAt(planeOf([100]), { slice: 0, row: 6, col: 3 })).toBe(99);
    expect(cellAt(planeOf([100]), { slice: 0, row: 6, col: 4 })).toBe(-1);
  });

  it("cells are named as the directory names experts: row by row, the last coordinate fastest", () => {
    const layer = { name: "ffn", sizes: [3, 4, 5] };
    expect([0, 1, 5, 20, 59].map((cell) => uidOf(layer, cell))).toEqual(["ffn.0.0.0", "ffn.0.0.1", "ffn.0.1.0", "ffn.1.0.0", "ffn.2.3.4"]);
    expect(coordinates([1 << 20, 1 << 12], 2 ** 32 - 1)).toEqual([(1 << 20) - 1, (1 << 12) - 1]);
    expect(sliceName(layer, 2)).toBe("ffn.2");
    expect(sliceName({ name: "ffn", sizes: [2, 3, 4, 5] }, 4)).toBe("ffn.1.1");
  });
});

describe("windows", () => {
  const plane = planeOf([100, 200]);

  it("zoom in around a place, stay inside, and come back to the whole", () => {
    expect(zoom(plane, wholeOf(plane), { row: 50, col: 100 }, 2)).toEqual({ rows: 50, cols: 100, row: 26, col: 51 });
    expect(zoom(plane, wholeOf(plane), { row: 0, col: 199 }, 4)).toEqual({ rows: 25, cols: 50, row: 0, col: 150 });
    let window = wholeOf(plane);
    for (let i = 0; i < 20; i++) window = zoom(plane, window, { row: 99, col: 0 }, 2);
    expect(window).toEqual({ rows: 4, cols: 4, row: 96, col: 0 });
    for (let i = 0; i < 20; i++) window = zoom(plane, window, { row: 99, col: 0 }, 0.5);
    expect(window).toEqual(wholeOf(plane));
  });

  it("follow a place only as far as need be", () => {
    const window = { row: 10, col: 10, rows: 5, cols: 5 };
    expect(follow(plane, window, { row: 12, col: 14 })).toBe(window);
    expect(follow(plane, window, { row: 15, col: 9 })).toEqual({ row: 11, col: 9, rows: 5, cols: 5 });
    expect(moved(plane, { ...window, row: 400, col: -3 })).toEqual({ ...window, row: 95, col: 0 });
  });
});

describe("bins", () => {
  it("are cells as long as there are at most 4,096", () => {
    const { bins } = binsOf([64, 64]);
    expect([bins.rows, bins.cols, bins.blockRows]).toEqual([64, 64, 1]);
    expect([...bins.value]).toEqual(Array.from({ length: 4096 }, (_, i) => i));
  });

  it("are means over blocks when there are more, and lose no expert", () => {
    const { bins } = binsOf([100, 100], (cell) => Math.floor(cell / 100));
    expect([bins.rows, bins.cols, bins.blockRows, bins.blockCols]).toEqual([50, 50, 2, 2]);
    expect([...bins.value.slice(0, 2), bins.value[49 * 50]]).toEqual([0.5, 0.5, 98.5]);
    expect(bins.claimed.reduce((a, b) => a + b)).toBe(10_000);
  });

  it("at the edge are means of what is there", () => {
    const { bins } = binsOf([65, 65]);
    expect([bins.rows, bins.blockRows]).toEqual([33, 2]);
    expect(bins.claimed[33 * 33 - 1]).toBe(1);
    expect(bins.value[33 * 33 - 1]).toBe(65 * 65 - 1);
  });

  it.each([[[1 << 20, 1 << 20]], [[2, 1 << 20]], [[1 << 20]], [[5000, 3]], [[9, 500, 500]]])("of %j are never more than 4,096", (sizes) => {
    const plane = planeOf(sizes), bins = bin(new Store().experts, 0, plane, 0, wholeOf(plane), "load");
    expect(bins.rows * bins.cols).toBeLessThanOrEqual(MAX_BINS);
    expect(bins.rows * bins.blockRows).toBeGreaterThanOrEqual(plane.rows);
    expect(bins.cols * bins.blockCols).toBeGreaterThanOrEqual(plane.cols);
  });

  it("pass over what is not known, and are NaN where nothing is", () => {
    const { bins } = binsOf([2, 4], (cell) => [1, NaN, NaN, NaN, 3, NaN, NaN, NaN][cell], undefined, 0, 2);
    expect([bins.rows, bins.cols]).toEqual([1, 2]);
    expect([...bins.value]).toEqual([2, NaN]);
    expect([...bins.claimed]).toEqual([4, 4]);
  });

  it("of one slice hold nothing of another, nor of another layer, nor of an expert whose place is not known", () => {
    const { store, plane } = binsOf([3, 2, 2]);
    const slice = (layer: number) => bin(store.experts, layer, plane, 1, wholeOf(plane), "load");
    expect([...slice(0).value]).toEqual([4, 5, 6, 7]);
    store.apply(...framed([piece("experts", "state", "u8", [1], { size: 13, start: 12 }), piece("experts", "cell", "u32", [4_000_000], { size: 14, start: 13 })]));
    expect([...slice(0).claimed]).toEqual([1, 1, 1, 1]);
    expect([...slice(1).claimed]).toEqual([0, 0, 0, 0]);
  });

  it("stay put when the window moves by less than a block", () => {
    const { store, plane } = binsOf([100, 100]);
    const at = (col: number) => bin(store.experts, 0, plane, 0, { row: 0, col, rows: 90, cols: 90 }, "load");
    expect([at(4).col, at(5).col, at(6).col]).toEqual([4, 4, 6]);
    expect(at(5).value[0]).toBe(at(4).value[0]);
  });

  it("of a wrapped line are stretches of it", () => {
    const { bins, plane, layer } = binsOf([10_000]);
    expect(bins.blockRows).toBe(1);
    expect(binName(layer, plane, bins, 0)).toBe(`ffn.0–${bins.blockCols - 1}`);
    const [first, ...rest] = Array.from(bins.state, (_, at) => binName(layer, plane, bins, at)).filter(Boolean).map((name) => name.split(/[.–]/).map(Number));
    let end = first.at(-1)!;
    for (const [, from, to] of rest) {
      expect(from).toBe(end + 1);
      end = to ?? from;
    }
    expect(end).toBe(9999);
  });

  it("of all layers at once are stretches of each, and a layer ends where its cells do", () => {
    const layers = [{ name: "ffn", sizes: [64, 64] }, { name: "olmoe.layer1", sizes: [10] }, { name: "far", sizes: [4096] }], plane = planeOfLayers(layers);
    expect([plane.slices, plane.rows, plane.cols]).toEqual([1, 3, 4096]);
    const store = storeOf(...framed([
      piece("experts", "layer", "u16", [0, 1, 2, 2]), piece("experts", "cell", "u32", [4095, 9, 0, 1]), piece("experts", "state", "u8", [1, 1, 1, 3]),
    ], { reset: true, layers }));
    const bins = bin(store.experts, 0, plane, 0, wholeOf(plane), "load"), name = (row: number, col: number) => binName(layers[0], plane, bins, row * bins.cols + col);
    expect([bins.blockRows, bins.rows, bins.rows * bins.cols <= MAX_BINS]).toEqual([1, 3, true]);
    expect(bins.blockCols).toBe(4);
    expect([name(0, 0), name(0, 1023), name(1, 2), name(1, 3)]).toEqual(["ffn.0.0 – ffn.0.3", "ffn.63.60 – ffn.63.63", "olmoe.layer1.8 – olmoe.layer1.9", ""]);
    expect([0, 1, 2].map((expert) => placeOfExpert(store.experts, plane, expert))).toEqual([
      { slice: 0, row: 0, col: 4095 }, { slice: 0, row: 1, col: 9 }, { slice: 0, row: 2, col: 0 },
    ]);
    expect([stateText(bins, 1023), stateText(bins, 1024 + 2), stateText(bins, 2048)]).toEqual(["1 alive", "1 alive", "1 alive, 1 dead"]);
  });

  it("of layers of any size and number are at most so many, and found at once", () => {
    const many = planeOfLayers(Array.from({ length: 1000 }, (_, i) => ({ name: `layer${i}`, sizes: [2 ** 20, 2 ** 20] })));
    expect(many.rows).toBe(128);
    const bins = bin(new Store().experts, 0, many, 0, wholeOf(many), "load");
    expect(bins.rows * bins.cols).toBeLessThanOrEqual(MAX_BINS);
    expect(bins.rows * bins.cols).toBeGreaterThan(MAX_BINS / 2);
  });

  it("are found by place and named by the cells in them", () => {
    const { bins, plane, layer } = binsOf([100, 100]);
    expect(binAt(bins, { slice: 0, row: 3, col: 99 })).toBe(1 * 50 + 49);
    expect(binAt(bins, { slice: 1, row: 3, col: 99 })).toBe(-1);
    expect(placeOfBin(bins, 99)).toEqual({ slice: 0, row: 2, col: 98 });
    expect(binName(layer, plane, bins, 99)).toBe("ffn.2–3.98–99");
    const fine = binsOf([4, 4]);
    expect(binName(fine.layer, fine.plane, fine.bins, 7)).toBe("ffn.1.3");
    expect(rowOf(fine.store.experts, 0, 7)).toBe(7);
    expect(rowOf(fine.store.experts, 1, 7)).toBe(-1);
  });
});

describe("the state of a block is the worst that matters:", () => {
  it.each([
    [0, 0, 0, 0, UNCLAIMED], [4, 4, 0, 0, ALIVE], [4, 3, 0, 1, SUSPECT], [4, 3, 1, 0, SUSPECT], [4, 2, 0, 2, DEAD], [1, 0, 0, 1, DEAD],
    [100, 99, 0, 1, ALIVE], [100, 90, 5, 5, SUSPECT], [2, 0, 0, 0, STARTING],
  ])("%i experts, %i alive, %i suspect, %i dead", (claimed, alive, suspect, dead, state) => {
    expect(stateOf(claimed, alive, suspect, dead)).toBe(state);
  });

  it("and in words it is counted out", () => {
    const { bins } = binsOf([2, 4], undefined, (cell) => [1, 1, 3, 0, 1, 4, 2, 0][cell], 0, 2);
    expect([stateText(bins, 0), stateText(bins, 1)]).toEqual(["3 alive, 1 starting", "1 suspect, 1 dead"]);
    const fine = binsOf([1, 2], undefined, (cell) => [0, 3][cell]).bins;
    expect([stateText(fine, 0), stateText(fine, 1)]).toEqual(["unclaimed", "dead"]);
  });

  it("and experts that came from another server are counted, and called adopted", () => {
    const store = storeOf(...grid([2, 4])), plane = planeOf([2, 4]);
    store.apply(...framed([piece("experts", "adopted", "u8", [0, 1, 1, 0, 0, 0, 0, 1])]));
    const blocks = bin(store.experts, 0, plane, 0, wholeOf(plane), "load", 2), fine = bin(store.experts, 0, plane, 0, wholeOf(plane), "load");
    expect([...blocks.adopted]).toEqual([1, 2]);
    expect([stateText(blocks, 0), stateText(fine, 0), stateText(fine, 1)]).toEqual(["4 alive, 1 adopted", "alive", "alive, adopted"]);
  });
});
