// @vitest-environment happy-dom
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Connection, type Looker, type Model } from "../src/connection";
import type { Say } from "../src/types";
import { frame } from "./frames";

class FakeModel implements Model {
  said: Say[] = [];
  private listeners: ((...args: never[]) => void)[] = [];
  on(_: string, callback: (...args: never[]) => void) { this.listeners.push(callback); }
  off(_: string, callback?: ((...args: never[]) => void) | null) { this.listeners = this.listeners.filter((one) => one !== callback); }
  send(content: unknown) { this.said.push(content as Say); }
  give(content: unknown, buffers: DataView[] = []) { for (const one of this.listeners) one(content as never, buffers as never); }
  take(): Say[] { return this.said.splice(0); }
  get deaf() { return this.listeners.length === 0; }
}

let model: FakeModel, connection: Connection, looker: Looker;
const give = (changes: object = {}) => model.give({ ...frame(changes), page: connection.page });

beforeEach(() => {
  vi.useFakeTimers();
  model = new FakeModel();
  connection = new Connection(model);
  looker = { looking: true };
});
afterEach(() => {
  connection.close();
  vi.useRealTimers();
});

describe("looking", () => {
  it("begins with a wish for everything, and is repeated every five seconds", () => {
    connection.attach(looker);
    const { page } = connection;
    expect(model.take()).toEqual([{ type: "look", page, looking: true, fresh: true, layer: 0, mode: "load" }]);
    give({ reset: true });
    vi.advanceTimersByTime(4000);
    give();
    vi.advanceTimersByTime(900);
    model.take();
    vi.advanceTimersByTime(100);
    expect(model.take()).toEqual([{ type: "look", page, looking: true, fresh: false, layer: 0, mode: "load" }]);
  });

  it("costs no message when nobody looks", () => {
    vi.advanceTimersByTime(60_000);
    expect(model.take()).toEqual([]);
  });

  it("ends with one message when the last view is out of sight", () => {
    const other = { looking: true };
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
    expect(connection.silent).toBe(false);
    vi.advanceTimersByTime(5200);
    expect(connection.silent).toBe(true);
    expect(model.take().at(-1)).toMatchObject({ type: "look", fresh: true });
    give();
    expect(connection.silent).toBe(false);
  });

  it("goes on looking once the swarm is closed, without asking for everything anew: one seen from afar may come back", () => {
    connection.attach(looker);
    give({ reset: true, open: false });
    vi.advanceTimersByTime(100);
    model.take();
    vi.advanceTimersByTime(5_000);
    expect(connection.silent).toBe(false);
    expect(model.take()).toMatchObject([{ type: "look", looking: true, fresh: false }]);
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
