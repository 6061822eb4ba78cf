import { describe, expect, it } from "vitest";
import { common, LATENCIES, latencyText, lossText, nearest } from "../src/faults";
import { ORDER_STAYS_FOR, mustAsk, SteadyOrder, stateText, whyNot, worstFirst } from "../src/server_order";
import { layOut, summary } from "../src/server_strip";
import type { ServerRow } from "../src/store";
import { ALIVE, DEAD, STARTING, SUSPECT } from "../src/types";
import { frame } from "./frames";

const server = (changes: Partial<ServerRow> & { p95?: number } = {}): ServerRow => ({
  label: "servers[0]", address: "tcp://127.0.0.1:1", word: "running", local: 0, state: ALIVE, heard: 0.1, experts: 4, alive: 4, calls: 10, queue: 0,
  latency: [[1, changes.p95 ?? 10, 20], [0, 1, 2], [1, 2, 3], [0, 1, 1]], failed: [0, 0, 0, 0, 0, 0, 0], injected: [0, 0],
  copies: 4, adopted: 0, ...changes,
});
const failed = (n: number) => [n, 0, 0, 0, 0, 0, 0];

describe("the order of servers", () => {
  it("is dead, suspect, starting, alive", () => {
    expect(worstFirst([ALIVE, STARTING, SUSPECT, DEAD].map((state) => server({ state })))).toEqual([3, 2, 1, 0]);
  });
  it("is then by failures, then by p95, with those of which nothing is known last", () => {
    expect(worstFirst([server(), server({ failed: failed(2) }), server({ failed: failed(9) })])).toEqual([2, 1, 0]);
    expect(worstFirst([server({ p95: NaN }), server({ p95: 10 }), server({ p95: 80 })])).toEqual([2, 1, 0]);
  });
  it("does not change for a little noise", () => {
    expect(worstFirst([server({ p95: 10 }), server({ p95: 10.4 }), server({ p95: 9.8 })])).toEqual([0, 1, 2]);
  });
  it("holds while the table is in use, and takes in new servers at its end", () => {
    const order = new SteadyOrder();
    const two = [server(), server()];
    expect(order.next(two, 0)).toEqual([0, 1]);
    order.touch(10);
    two[1].state = DEAD;
    expect(order.next([...two, server({ state: DEAD })], 10 + ORDER_STAYS_FOR - 0.1)).toEqual([0, 1, 2]);
    expect(order.next([...two, server()], 10 + ORDER_STAYS_FOR)).toEqual([1, 0, 2]);
  });
  it("does not name servers of a swarm that is gone", () => {
    const order = new SteadyOrder();
    order.next([server(), server(), server()], 0);
    order.touch(0);
    expect(order.next([server()], 1)).toEqual([0]);
  });
});

describe("a button", () => {
  it("can be pressed for a local server that runs", () => {
    expect(whyNot("kill", server(), frame(), false)).toBe("");
    expect(mustAsk("kill", server())).toBe(true);
    expect(mustAsk("restart", server())).toBe(true);
  });
  it("says why it cannot be pressed", () => {
    expect(whyNot("kill", server({ local: -1 }), frame(), false)).toMatch(/elsewhere/);
    expect(whyNot("kill", server(), frame({ can: { control: false } }), false)).not.toBe("");
    expect(whyNot("kill", server(), frame({ open: false }), false)).toMatch(/closed/);
    expect(whyNot("kill", server(), frame(), true)).toMatch(/recording/);
    expect(whyNot("stop", server({ word: "killed" }), frame(), false)).toMatch(/killed already/);
  });
  it("restarts what has ended without asking", () => {
    expect(whyNot("restart", server({ word: "killed", state: DEAD }), frame(), false)).toBe("");
    expect(mustAsk("restart", server({ word: "killed" }))).toBe(false);
  });
});

it("a state is a word, with why where that says more", () => {
  expect(stateText(server())).toBe("alive");
  expect(stateText(server({ state: DEAD, word: "killed" }))).toBe("dead (killed)");
  expect(stateText(server({ state: STARTING, word: "starting" }))).toBe("starting");
});

describe("sliders of faults", () => {
  it("stand at the step that is nearest to what is injected", () => {
    expect(LATENCIES.map((value) => LATENCIES[nearest(LATENCIES, value)])).toEqual(LATENCIES);
    expect(LATENCIES[nearest(LATENCIES, 0.045)]).toBe(0.05);
    expect(LATENCIES[nearest(LATENCIES, 7)]).toBe(2);
    expect(nearest(LATENCIES, NaN)).toBe(0);
  });
  it("say what they inject", () => {
    expect([0, 0.05, 2].map(latencyText)).toEqual(["none", "50 ms", "2 s"]);
    expect([0, 0.15].map(lossText)).toEqual(["none", "15 %"]);
  });
  it("for all servers show what they have in common", () => {
    expect(common([[0.1, 0], [0.1, 0.2]])).toEqual([0.1, NaN]);
    expect(common([[NaN, NaN], [0, 0]])).toEqual([0, 0]);
    expect(common([])).toEqual([0, 0]);
  });
});

describe("the strip", () => {
  it("has room for all servers at any width", () => {
    for (const [count, width] of [[4, 1000], [200, 400], [200, 1400], [1, 50], [1000, 300]]) {
      const { columns, rows, width: box } = layOut(count, width);
      expect(columns * rows).toBeGreaterThanOrEqual(count);
      expect(columns * (box + 2) - 2).toBeLessThanOrEqual(width);
      expect(box).toBeGreaterThanOrEqual(4);
    }
  });
  it("is described in words", () => {
    expect(summary([server(), server({ state: DEAD })])).toBe("strip of 2 servers: 1 alive, 1 dead");
  });
});
