// @vitest-environment happy-dom
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Connection, type Looker, type Model } from "../src/connection";
import type { Say } from "../src/types";
import { frame } from "./frames";

class FakeModel implements Model {
  said: Say[] = [];
  cut = false; // sending fails, as it does when the comm is gone
  private listeners: [string, (...args: never[]) => void][] = [];
  on(event: string, callback: (...args: never[]) => void) { this.listeners.push([event, callback]); }
  off(_: string, callback?: ((...args: never[]) => void) | null) { this.listeners = this.listeners.filter(([, one]) => one !== callback); }
  send(content: unknown) {
    if (this.cut) throw new Error("Cannot send");
    this.said.push(content as Say);
  }
  give(content: unknown, buffers: DataView[] = []) { this.fire("msg:custom", content, buffers); }
  fire(event: string, ...args: unknown[]) { for (const [name, one] of this.listeners) if (name === event) one(...(args as never[])); }
  take(): Say[] { return this.said.splice(0); }
  get deaf() { return this.listeners.length === 0; }
}

let model: FakeModel, connection: Connection, looker: Looker;
const give = (changes: object = {}) => model.give({ ...frame(changes), page: connection.page });

beforeEach(() => {
  vi.useFakeTimers();
  model = new FakeModel();
  connection = new Connection(model);
  looker = { looking: true, paused: false };
});
afterEach(() => {
  connection.close();
  vi.useRealTimers();
});

describe("looking", () => {
  it("begins with a wish for everything, and is repeated every five seconds", () => {
    connection.attach(looker);
    const { page } = connection;
    expect(model.take()).toEqual([{ type: "look", page, looking: true, paused: false, fresh: true, layer: 0, mode: "load" }]);
    give({ reset: true });
    vi.advanceTimersByTime(4000);
    give();
    vi.advanceTimersByTime(900);
    model.take();
    vi.advanceTimersByTime(100);
    expect(model.take()).toEqual([{ type: "look", page, looking: true, paused: false, fresh: false, layer: 0, mode: "load" }]);
  });

  it("costs no message when nobody looks", () => {
    vi.advanceTimersByTime(60_000);
    expect(model.take()).toEqual([]);
  });

  it("ends with one message when the last view is out of sight", () => {
    const other = { looking: true, paused: false };
    connection.attach(looker);
    connection.attach(other);
    model.take();
    looker.looking = false;
    connection.changed();
    expect(model.take()).toEqual([]);
    other.looking = false;
    connection.changed();
    expect(model.take()).toMatchObject([{ type: "look", looking: false }]);
    vi.advanceTimersByTime(60_000);
    expect(model.take()).toEqual([]);
  });

  it("tells at once what else is looked at", () => {
    connection.attach(looker);
    model.take();
    connection.setView(1, "latency");
    connection.setView(1, "latency");
    expect(model.take()).toMatchObject([{ type: "look", layer: 1, mode: "latency" }]);
  });

  it("asks for everything again after a silence, in case something was lost", () => {
    connection.attach(looker);
    give({ reset: true });
    vi.advanceTimersByTime(4900);
    expect(connection.lost).toBe("");
    vi.advanceTimersByTime(5200);
    expect(connection.lost).toMatch(/^no sign of life for 10 s/);
    expect(model.take().at(-1)).toMatchObject({ type: "look", fresh: true });
    give();
    expect(connection.lost).toBe("");
  });

  it("goes on looking once the swarm is closed, without asking for everything anew: one seen from afar may come back", () => {
    connection.attach(looker);
    give({ reset: true, open: false });
    vi.advanceTimersByTime(100);
    model.take();
    vi.advanceTimersByTime(5_000);
    expect(connection.lost).toBe("");
    expect(model.take()).toMatchObject([{ type: "look", looking: true, fresh: false }]);
  });
});

describe("the kernel is gone", () => {
  it("when nothing came for seven seconds, and back when something comes", () => {
    connection.attach(looker);
    give({ reset: true });
    vi.advanceTimersByTime(6_000);
    expect(connection.store.frame?.lost).toBeFalsy();
    vi.advanceTimersByTime(1_000);
    expect(connection.lost).toBe("no sign of life for 7 s: the kernel was restarted, has ended, or is not connected");
    expect(connection.store.frame?.lost).toBe("the kernel does not answer");
    vi.advanceTimersByTime(5_000);
    expect(connection.lost).toMatch(/^no sign of life for 12 s/);
    model.give({ type: "beat" });
    expect([connection.lost, connection.store.frame?.lost]).toEqual(["", ""]);
  });

  it("but not while it says now and then that it is there, however long a cell keeps it from hearing us", () => {
    connection.attach(looker);
    give({ reset: true });
    for (let i = 0; i < 100; i++) {
      vi.advanceTimersByTime(2_500);
      model.give({ type: "beat" });
      expect(connection.lost).toBe("");
    }
  });

  it("also when the view is paused, but not when it is out of sight", () => {
    connection.attach(looker);
    give({ reset: true });
    Object.assign(looker, { looking: false, paused: true });
    connection.changed();
    expect(model.take().at(-1)).toMatchObject({ type: "look", looking: false, paused: true });
    vi.advanceTimersByTime(7_000);
    expect(connection.lost).toMatch(/^no sign of life/);
    Object.assign(looker, { paused: false });
    connection.changed();
    expect(connection.lost).toBe("");
  });

  it("soon after its link was cut, and at once when nothing can be sent", () => {
    connection.attach(looker);
    give({ reset: true });
    model.take();
    model.fire("comm_live_update");
    expect(model.take()).toMatchObject([{ type: "look" }]);
    vi.advanceTimersByTime(2_000);
    expect(connection.lost).toMatch(/^no sign of life/);
    give();
    expect(connection.lost).toBe("");
    model.cut = true;
    vi.advanceTimersByTime(5_000);
    expect(connection.lost).toBe("the kernel is gone: it was restarted, or has ended; run the cell again");
  });

  it("and then nothing is asked of it, and what was is given up", async () => {
    connection.attach(looker);
    give({ reset: true });
    const before = connection.execute({ do: "kill", server: 1 });
    before.catch(() => {});
    vi.advanceTimersByTime(7_000);
    await expect(before).rejects.toThrow("the kernel does not answer");
    expect(connection.clickWaits).toBe(false);
    model.take();
    await expect(connection.execute({ do: "kill", server: 1 })).rejects.toThrow("the kernel does not answer");
    expect(model.take()).toEqual([]);
  });
});

describe("a frame", () => {
  it("is acknowledged after the animation frame in which it is drawn", () => {
    connection.attach(looker);
    model.take();
    const order: string[] = [];
    connection.store.subscribe(() => requestAnimationFrame(() => order.push(`drawn, ${model.said.length} acknowledged`)));
    give({ reset: true, seq: 7 });
    expect(model.take()).toEqual([]);
    vi.advanceTimersByTime(50);
    expect(order).toEqual(["drawn, 0 acknowledged"]);
    expect(model.take()).toEqual([{ type: "ack", page: connection.page, seq: 7 }]);
  });

  it("is not acknowledged when that is left to the next one", () => {
    connection.attach(looker);
    model.take();
    give({ reset: true, seq: 1, ack: false });
    vi.advanceTimersByTime(1000);
    give({ seq: 2, ack: true });
    vi.advanceTimersByTime(1000);
    expect(model.take()).toEqual([{ type: "ack", page: connection.page, seq: 2 }]);
  });

  it("is acknowledged once, and at once when nothing of it is seen", () => {
    const detach = connection.attach(looker);
    give({ reset: true, seq: 1 });
    detach();
    give({ seq: 2 });
    vi.advanceTimersByTime(2000);
    expect(model.take().filter(({ type }) => type === "ack").map((one) => "seq" in one && one.seq)).toEqual([1, 2]);
  });

  it("for another page is none of ours", () => {
    connection.attach(looker);
    model.take();
    model.give({ ...frame({ reset: true }), page: "another" });
    vi.advanceTimersByTime(1000);
    expect(connection.store.frame).toBeNull();
    expect(model.take()).toEqual([]);
  });

  it("that continues what we never saw begin is passed over", () => {
    connection.attach(looker);
    give({ reset: false, seq: 9 });
    expect(connection.store.frame).toBeNull();
    expect(model.take().at(-1)).toMatchObject({ type: "ack", seq: 9 });
  });

  it("of nonsense breaks nothing", () => {
    connection.attach(looker);
    for (const nonsense of [null, 3, "frame", [], {}, { type: "frame" }, { type: "chunk" }, { type: "done", id: "x" }]) model.give(nonsense);
    give({ reset: true });
    expect(connection.store.frame?.swarm).toBe("test");
  });
});

describe("a command", () => {
  it("goes out with a number, and its answer comes back", async () => {
    const answer = connection.execute({ do: "kill", server: 2 });
    const [said] = model.take();
    expect(said).toMatchObject({ type: "command", page: connection.page, command: { do: "kill", server: 2 } });
    vi.advanceTimersByTime(1500);
    expect(connection.clickWaits).toBe(true);
    model.give({ type: "heard", page: connection.page, id: (said as { id: number }).id });
    expect(connection.clickWaits).toBe(false);
    model.give({ type: "done", page: connection.page, id: (said as { id: number }).id, text: "servers[2] killed" });
    expect(await answer).toBe("servers[2] killed");
  });

  it("for a file keeps us looking until it is here, and each piece is acknowledged at once", async () => {
    const saved = vi.fn();
    connection.saved = saved;
    const answer = connection.execute({ do: "export", format: "json" });
    const id = (model.take()[0] as { id: number }).id, { page } = connection;
    vi.advanceTimersByTime(5000);
    expect(model.take()).toMatchObject([{ type: "look", looking: true }]);
    model.give({ type: "chunk", page, id, seq: 1, index: 0, total: 1, name: "a.json", mime: "application/json" }, [new DataView(new ArrayBuffer(2))]);
    expect(model.take()).toEqual([{ type: "ack", page, seq: 1 }]);
    model.give({ type: "done", page, id, text: "exported" });
    expect(await answer).toBe("exported");
    expect(saved).toHaveBeenCalledOnce();
    await vi.advanceTimersByTimeAsync(1);
    expect(model.take()).toMatchObject([{ type: "look", looking: false }]);
  });
});

it("a closed connection says that it no longer looks, and then nothing", () => {
  connection.attach(looker);
  model.take();
  connection.close();
  expect(model.take()).toMatchObject([{ type: "look", looking: false }]);
  expect(model.deaf).toBe(true);
  connection.changed();
  vi.advanceTimersByTime(60_000);
  expect(model.take()).toEqual([]);
});
