import { describe, expect, it, vi } from "vitest";
import { NOWHERE, Store } from "../src/store";
import { CAUSES } from "../src/types";
import type { Frame, Piece } from "../src/types";
import { buffer, frame, framed, headline, piece, series } from "./frames";

const filled = () => {
  const store = new Store();
  store.apply(...framed([piece("experts", "state", "u8", [1, 1, 3, 1]), piece("experts", "calls", "u32", [5, 6, 7, 4_000_000_000])], { reset: true }));
  return store;
};

describe("columns", () => {
  it("are decoded from little-endian buffers at any offset", () => {
    const store = new Store();
    store.apply(...framed([
      piece("experts", "layer", "u16", [0, 513]), piece("experts", "cell", "u32", [70_000, 1]), piece("experts", "server", "i32", [-1, 199]),
      piece("experts", "load", "f32", [0.5, NaN]),
    ]));
    const { n, layer, cell, server, load } = store.experts;
    expect([n, ...layer, ...cell, ...server]).toEqual([2, 0, 513, 70_000, 1, -1, 199]);
    expect([...load]).toEqual([0.5, NaN]);
  });

  it("that are scaled come back within a step, and 65535 is NaN", () => {
    const store = new Store();
    store.apply(...framed([piece("experts", "latency", "scaled", [0, 32767, 65534, 65535], { max: 200 })]));
    expect([...store.experts.latency]).toEqual([0, 100, 200, NaN]);
  });

  it("keep what is known when a piece covers only some rows and the table grows", () => {
    const store = filled();
    store.apply(...framed([piece("experts", "state", "u8", [2, 1], { size: 6, start: 4 })]));
    expect([...store.experts.state]).toEqual([1, 1, 3, 1, 2, 1]);
    expect([...store.experts.calls]).toEqual([5, 6, 7, 4_000_000_000, 0, 0]);
    expect(store.experts.load[5]).toBeNaN();
    expect([store.experts.cell[5], store.experts.server[5]]).toEqual([NOWHERE, -1]);
  });

  it("of servers say how many copies they keep, and how many experts they adopted; else that is not known", () => {
    const store = new Store();
    store.apply(...framed([piece("servers", "state", "u8", [1, 1, 1]), piece("servers", "copies", "f32", [4, 0, 5, 2], { width: 2, size: 3 })]));
    expect(store.servers.map(({ copies, adopted }) => [copies, adopted])).toEqual([[4, 0], [5, 2], [NaN, NaN]]);
    store.apply(...framed([piece("servers", "copies", "f32", [9, 9, 9], { width: 3 })])); // of a newer kernel
    expect(store.servers[0].copies).toBe(4);
  });

  it("never shrink, when a late piece tells an older size", () => {
    const store = filled();
    store.apply(...framed([piece("experts", "state", "u8", [3])]));
    expect([...store.experts.state]).toEqual([3, 1, 3, 1]);
  });

  it("come as ArrayBuffers and typed arrays too", () => {
    const store = new Store(), [head] = framed([piece("experts", "state", "u8", [1, 2])]);
    store.apply(head, [new Uint8Array([9, 3, 1]).subarray(1) as unknown as DataView]);
    expect([...store.experts.state]).toEqual([3, 1]);
    store.apply(head, [new Uint8Array([2, 2]).buffer as unknown as DataView]);
    expect([...store.experts.state]).toEqual([2, 2]);
  });
});

describe("a malformed piece is dropped, and those around it are not:", () => {
  const good = piece("experts", "state", "u8", [2, 2, 2, 2]);
  const bad: [string, Partial<Piece> | null][] = [
    ["null", null], ["another table", { table: "people" as never }], ["an unknown column", { column: "mood" }], ["a column of objects", { column: "__proto__" }],
    ["the number of rows as a column", { column: "n" }], ["an unknown type", { dtype: "f64" as never }], ["an inherited type", { dtype: "toString" as never }],
    ["rows behind the end", { start: 2 }], ["a negative start", { start: -1 }], ["half a row", { start: 0.5 }], ["more rows than bytes", { count: 5, size: 5 }],
    ["no buffer", { buffer: 7 }], ["a buffer that is a word", { buffer: "length" as never }], ["too many rows", { size: 2 ** 30 }], ["a width", { width: 2 }],
    ["a scale without an end", { dtype: "scaled", count: 2 }], ["text for numbers", { size: "4" as never }],
  ];
  it.each(bad)("%s", (_, changes) => {
    const store = filled(), before = store.experts.n;
    const one = changes === null ? null : { ...piece("experts", "calls", "u8", [9, 9, 9, 9])[0], ...changes };
    const [, mine] = piece("experts", "calls", "u8", [9, 9, 9, 9]);
    store.apply(frame({ pieces: [one as Piece, { ...good[0], buffer: 1 }] }), [mine, good[1]]);
    expect([...store.experts.state]).toEqual([2, 2, 2, 2]);
    expect([...store.experts.calls]).toEqual([5, 6, 7, 4_000_000_000]);
    expect([store.experts.n, Object.getPrototypeOf(store.experts)]).toEqual([before, Object.prototype]);
  });
});

describe("what is not a frame changes nothing and throws nothing:", () => {
  it.each([null, undefined, 7, "frame", [], {}, { type: "done" }])("%j", (thing) => {
    const store = filled(), heard = vi.fn();
    store.subscribe(heard);
    store.apply(thing as unknown as Frame, []);
    expect(heard).not.toHaveBeenCalled();
    expect(store.experts.n).toBe(4);
  });

  it("a frame of which every part is wrong still is one", () => {
    const store = filled();
    const wrong = { type: "frame", headline: 3, layers: "x", server_text: { start: 0, rows: 3 }, marks: {}, series: [], pieces: { length: 2 }, can: null };
    store.apply(wrong as unknown as Frame, null as never);
    expect(store.frame?.headline.steps).toBe(120);
    expect(store.experts.n).toBe(4);
  });
});

describe("the headline", () => {
  it("has numbers or null where the contract says so, whatever came", () => {
    const store = new Store();
    store.apply(frame({ headline: { ...headline({ loss: null }), steps: "many" as never, calls: NaN, failed: { timeout: 2, lost: "x" as never, other: 3 } as never } }), []);
    expect(store.frame?.headline).toMatchObject({ loss: null, steps: 0, calls: null, samples: 1234, failed: { timeout: 2 } });
    expect(Object.keys(store.frame!.headline.failed)).toEqual(["timeout"]);
  });
});

describe("servers", () => {
  const numbers = (local: number) => [0.3, 4, 3, 22, 1, ...Array.from({ length: 12 }, (_, i) => i), 0, 0, 0, 2, 0, 0, 1, 0.25, 0.5, local];

  it("have their numbers by name", () => {
    const store = new Store();
    store.apply(...framed([piece("servers", "numbers", "f32", [...numbers(0), ...numbers(-1)], { width: 27 }), piece("servers", "state", "u8", [1, 3])]));
    const [one, two] = store.servers;
    expect(one).toMatchObject({ experts: 4, alive: 3, calls: 22, queue: 1, local: 0, state: 1, injected: [0.25, 0.5] });
    expect(one.latency).toEqual([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]);
    expect(one.failed[CAUSES.indexOf("lost")]).toBe(2);
    expect([two.local, two.state]).toEqual([-1, 3]);
  });

  it("keep their rows when texts come late, early or broken", () => {
    const store = new Store();
    store.apply(frame({ server_text: { start: 1, rows: [["servers[1]", "tcp://b", "running"]] } }), []);
    store.apply(frame({ server_text: { start: 0, rows: [["servers[0]", 7, "running"] as never, null as never] } }), []);
    expect(store.servers.map(({ label }) => label)).toEqual(["", "servers[1]"]);
    store.apply(frame({ server_text: { start: 1 << 20, rows: [["far", "", ""]] } }), []);
    expect(store.servers.length).toBe(2);
  });
});

describe("series", () => {
  const losses = (store: Store) => [store.series.first, ...store.series.values.loss];
  const take = (store: Store, ...[table, data]: ReturnType<typeof series>) => store.apply(frame({ series: table }), [data]);

  it("grow at their end, and bins that come again replace what was", () => {
    const store = new Store();
    take(store, ...series(3, 2));
    take(store, ...series(4, 3));
    expect(losses(store)).toEqual([3, 3, 4, 5, 6]);
  });

  it("grow at their beginning, and gaps are NaN", () => {
    const store = new Store();
    take(store, ...series(6, 1));
    take(store, ...series(2, 2));
    expect(losses(store)).toEqual([2, 2, 3, NaN, NaN, 6]);
  });

  it("begin anew when told so, when bins got wider, and after a leap that nobody could draw", () => {
    const store = new Store();
    for (const next of [series(2, 1, { reset: true }), series(1, 2, { width: 2 }), series(1e9, 1, { width: 2 })]) {
      take(store, ...series(0, 5, { reset: true }));
      take(store, ...next);
      expect(losses(store)).toHaveLength(1 + next[0]!.count);
    }
  });

  it.each([{ count: 9 }, { width: 0 }, { width: NaN }, { first: -1 }, { buffer: 3 }, { count: 1e9 }])("are as before when malformed: %j", (changes) => {
    const store = new Store();
    take(store, ...series(0, 2));
    take(store, ...series(2, 2, changes));
    expect(losses(store)).toEqual([0, 0, 1]);
  });
});

describe("a store", () => {
  it("forgets everything when a frame says reset", () => {
    const store = filled();
    store.apply(frame({ reset: true, marks: [[3, "servers[1] was lost"]] }), []);
    expect([store.experts.n, store.servers.length, store.marks.length]).toEqual([0, 0, 1]);
  });

  it("keeps a bounded number of marks, the last ones, and only such as can be drawn", () => {
    const store = new Store();
    for (let i = 0; i < 30; i++) store.apply(frame({ marks: Array.from({ length: 50 }, (_, j): [number, string] => [i * 50 + j, "lost"]) }), []);
    store.apply(frame({ marks: [[NaN, "never"], ["soon", "x"] as never, [1500, "back"]] }), []);
    expect(store.marks.length).toBe(1000);
    expect(store.marks.at(-1)).toEqual([1500, "back"]);
  });

  it("counts changes of what did change, so that a headline alone redraws nothing", () => {
    const store = filled(), before = { ...store.revisions };
    store.apply(frame({ headline: headline({ steps: 121 }) }), []);
    expect(store.revisions).toEqual(before);
    store.apply(...framed([piece("experts", "load", "f32", [1, 2, 3, 4])]));
    expect(store.revision("experts.load")).toBe(1);
    expect(store.revision("experts.state")).toBe(before["experts.state"]);
  });

  it("tells its listeners once a frame, once a batch, and goes on when one of them fails", () => {
    const store = new Store(), heard = vi.fn(), error = vi.spyOn(console, "error").mockImplementation(() => {});
    store.subscribe(() => { throw new Error("mine"); });
    const stop = store.subscribe(heard);
    store.apply(frame(), []);
    store.batch(() => { store.apply(frame(), []); store.apply(frame(), []); });
    expect(heard).toHaveBeenCalledTimes(2);
    expect(error).toHaveBeenCalledTimes(2);
    stop();
    store.apply(frame(), []);
    expect(heard).toHaveBeenCalledTimes(2);
  });

  it("takes layers as a whole or not at all, since experts number them", () => {
    const store = new Store(), good = [{ name: "ffn", sizes: [4, 4] }];
    store.apply(frame({ layers: good }), []);
    for (const bad of [{ name: "x", sizes: [] }, { name: "x", sizes: [0] }, { name: 3, sizes: [2] }, null]) {
      store.apply(frame({ layers: [...good, bad as never] }), []);
      expect(store.layers).toEqual(good);
    }
  });

  it("is not moved by a buffer that is shorter than it says", () => {
    const store = filled();
    store.apply(frame({ pieces: [{ ...piece("experts", "load", "f32", [1, 2, 3, 4])[0] }] }), [buffer("f32", [1, 2, 3])]);
    expect([...store.experts.load]).toEqual([NaN, NaN, NaN, NaN]);
  });
});
