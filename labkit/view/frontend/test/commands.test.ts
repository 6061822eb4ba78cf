import { describe, expect, it } from "vitest";
import { Commands, WAITING_AFTER, type File } from "../src/commands";
import { safeName } from "../src/download";
import { CLICK_WAITS, statusLine, type Standing } from "../src/status";
import type { ButtonCommand, Reply } from "../src/types";

const kill: ButtonCommand = { do: "kill", server: 2 }, png: ButtonCommand = { do: "export", format: "png" };
const heard = (id: number): Reply => ({ type: "heard", page: "p", id });
const done = (id: number, text = "done"): Reply => ({ type: "done", page: "p", id, text });
const chunk = (id: number, index: number, total: number): Reply =>
  ({ type: "chunk", page: "p", id, seq: index + 1, index, total, name: "swarm.png", mime: "image/png" });
const part = (...bytes: number[]) => new DataView(new Uint8Array(bytes).buffer);

function fresh(): { commands: Commands; saved: File[] } {
  const saved: File[] = [];
  return { commands: new Commands((file) => saved.push(file)), saved };
}

describe("a command", () => {
  it("is answered with what was done", async () => {
    const { commands } = fresh();
    const { id, answer } = commands.begin(kill, 0);
    commands.take(heard(id), []);
    commands.take(done(id, "servers[2] killed"), []);
    expect(await answer).toBe("servers[2] killed");
  });

  it("is rejected with the reason", async () => {
    const { commands } = fresh();
    const { id, answer } = commands.begin(kill, 0);
    commands.take({ type: "failed", page: "p", id, text: "busy" }, []);
    await expect(answer).rejects.toThrow("busy");
  });

  it("waits when nobody has heard it for a second, and no longer once it is heard", () => {
    const { commands } = fresh();
    const { id, answer } = commands.begin(kill, 10);
    answer.catch(() => {});
    expect(commands.waiting(10 + WAITING_AFTER - 0.01)).toBe(false);
    expect(commands.waiting(10 + WAITING_AFTER)).toBe(true);
    commands.take(heard(id), []);
    expect(commands.waiting(100)).toBe(false);
  });

  it("that nobody gave is not answered", () => {
    const { commands, saved } = fresh();
    commands.take(done(7), []);
    commands.take(chunk(7, 0, 1), [part(1)]);
    expect(saved).toEqual([]);
  });

  it("is refused when too many wait", async () => {
    const { commands } = fresh();
    const answers = Array.from({ length: 33 }, () => commands.begin(kill, 0));
    for (const { answer } of answers.slice(0, 32)) answer.catch(() => {});
    expect(answers[32].id).toBe(0);
    await expect(answers[32].answer).rejects.toThrow("too many");
  });

  it("is dropped with the dashboard", async () => {
    const { commands } = fresh();
    const { answer } = commands.begin(kill, 0);
    commands.drop("closed");
    await expect(answer).rejects.toThrow("closed");
    expect(commands.waiting(100)).toBe(false);
  });
});

describe("an export", () => {
  it("is put together from its pieces, in their order", async () => {
    const { commands, saved } = fresh();
    const { id, answer } = commands.begin(png, 0);
    expect(commands.exporting).toBe(true);
    commands.take(chunk(id, 1, 2), [part(3)]);
    commands.take(chunk(id, 0, 2), [part(1, 2)]);
    commands.take(done(id), []);
    await answer;
    expect(saved).toHaveLength(1);
    const [{ name, mime, size, parts }] = saved;
    expect([name, mime, size]).toEqual(["swarm.png", "image/png", 3]);
    expect(parts.map((one) => one.getUint8(0))).toEqual([1, 3]);
    expect(commands.exporting).toBe(false);
  });

  it("of which a piece is missing is not saved", async () => {
    const { commands, saved } = fresh();
    const { id, answer } = commands.begin(png, 0);
    commands.take(chunk(id, 1, 2), [part(3)]);
    commands.take(done(id), []);
    await expect(answer).rejects.toThrow("incomplete");
    expect(saved).toEqual([]);
  });

  it("takes no piece that makes no sense", async () => {
    const { commands, saved } = fresh();
    const { id, answer } = commands.begin(png, 0);
    for (const [index, total] of [[-1, 2], [2, 2], [0.5, 2], [0, 1e9]]) commands.take(chunk(id, index, total), [part(1)]);
    commands.take(chunk(id, 0, 1), []);
    commands.take(done(id), []);
    await expect(answer).rejects.toThrow("incomplete");
    expect(saved).toEqual([]);
  });

  it("gets a file name that stays in the folder of downloads", () => {
    expect(safeName("labkit-default.html")).toBe("labkit-default.html");
    expect(safeName("../../x\u202e.png")).toBe("_.._x_.png");
    expect(safeName("")).toBe("labkit-export");
  });
});

describe("the status line", () => {
  const calm: Standing = { first: true, closed: false, clickWaits: false, lost: "", paused: false, answer: "" };
  it("says what matters most", () => {
    expect(statusLine(calm)).toBe("");
    expect(statusLine({ ...calm, first: false })).toBe("waiting for the first frame …");
    expect(statusLine({ ...calm, lost: "no sign of life", clickWaits: true, closed: true, answer: "x", first: false })).toBe("no sign of life");
    expect(statusLine({ ...calm, paused: true })).toBe("paused");
    expect(statusLine({ ...calm, closed: true, paused: true })).toBe("the swarm is closed, or cannot be reached");
    expect(statusLine({ ...calm, answer: "servers[2] killed", closed: true })).toBe("servers[2] killed");
    expect(statusLine({ ...calm, clickWaits: true, answer: "servers[2] killed" })).toBe(CLICK_WAITS);
  });
});
