import { describe, expect, it, vi } from "vitest";
import { Replay, SPEEDS } from "../src/replay";
import { buffer, framed, grid, headline, piece, series } from "./frames";
import type { Recorded } from "../src/replay";
import type { Frame } from "../src/types";

const recorded = ([header, buffers]: [Frame, DataView[]]): Recorded => ({ header, buffers });

// 60 seconds: experts 0 to 3 are there from the start, 2 more from 40 s on; expert 0 dies at 20 s; the loss is the second.
function recording(times = [0, 20, 40], seconds = 60): Replay {
  const [still, buffers] = grid([2, 3], () => NaN, () => 0), [bins, values] = series(0, 60, { buffer: 5 });
  const all: [Frame, DataView[]] = [{
    ...still, series: bins, marks: [[20, "servers[0] was lost"], [41, "servers[0] is back"]],
    server_text: { start: 0, rows: [["servers[0]", "tcp://a", "running"], ["servers[1]", "tcp://b", "running"]] },
    curves: [{ curve: 0, name: "accuracy", start: 0, count: 2, buffer: 6 }],
  }, [...buffers, values, buffer("f32", [10, 0.5, 30, 0.75])]];
  const keyframes = times.map((at) => recorded(framed([
    piece("experts", "state", "u8", [at >= 20 ? 3 : 1, 1, 1, 1, ...(at >= 40 ? [1, 1] : [])]),
    piece("experts", "load", "f32", [at, at, at, at, ...(at >= 40 ? [at, at] : [])]),
    piece("servers", "state", "u8", at >= 40 ? [1, 1] : [1]),
  ], { at, wall: 1000 + at, headline: headline({ steps: at * 10 }) })));
  return new Replay(recorded(all), keyframes, seconds);
}

const shown = ({ store }: Replay) => ({ states: [...store.experts.state], steps: store.frame?.headline.steps, servers: store.servers.length });

describe("a moment of a recording", () => {
  it("is the last keyframe before it, with the bins and marks up to it", () => {
    const replay = recording();
    replay.seek(25.5);
    expect(shown(replay)).toEqual({ states: [3, 1, 1, 1, 0, 0], steps: 200, servers: 1 });
    expect(replay.store.series.values.loss).toHaveLength(25);
    expect(replay.store.marks).toEqual([[20, "servers[0] was lost"]]);
    expect(replay.store.curves).toEqual([{ name: "accuracy", at: [10], value: [0.5] }]);
    expect(replay.store.frame).toMatchObject({ at: 25.5, wall: 1025.5 });
  });

  it("is the same whichever way one came there", () => {
    const there = recording(), back = recording();
    there.seek(5);
    for (const at of [59, 21, 45, 0, 19.9, 5]) back.seek(at);
    expect(shown(back)).toEqual(shown(there));
    expect([...back.store.experts.load]).toEqual([0, 0, 0, 0, NaN, NaN]);
    expect(back.store.series).toEqual(there.store.series);
    expect(back.store.marks).toEqual(there.store.marks);
    expect(back.store.frame).toEqual(there.store.frame);
  });

  it("before the first keyframe shows that keyframe, and outside the recording its ends", () => {
    const replay = recording([7, 20]);
    replay.seek(1);
    expect(shown(replay).steps).toBe(70);
    replay.seek(-4);
    expect(replay.cursor).toBe(0);
    replay.seek(1e9);
    expect([replay.cursor, shown(replay).steps]).toEqual([60, 200]);
    replay.seek(NaN);
    expect(replay.cursor).toBe(0);
  });

  it("keeps the names of servers that it lacks for later", () => {
    const replay = recording();
    replay.seek(0);
    replay.seek(50);
    expect(replay.store.servers.map(({ label }) => label)).toEqual(["servers[0]", "servers[1]"]);
  });

  it("is told to listeners once, and columns are decoded again only for another keyframe", () => {
    const replay = recording(), heard = vi.fn();
    replay.seek(21);
    replay.store.subscribe(heard);
    const before = replay.store.revision("experts.load");
    replay.seek(22);
    expect(heard).toHaveBeenCalledTimes(1);
    expect(replay.store.revision("experts.load")).toBe(before);
    replay.seek(2);
    expect(heard).toHaveBeenCalledTimes(2);
    expect(replay.store.revision("experts.load")).toBeGreaterThan(before);
  });

  it("is found among keyframes in any order, some of them broken", () => {
    const replay = recording([40, 0, NaN, 20]);
    for (const [at, steps] of [[1, 0], [20, 200], [39, 200], [40, 400]]) {
      replay.seek(at);
      expect(shown(replay).steps).toBe(steps);
    }
  });
});

describe("playing", () => {
  it("goes on at its speed, stops at the end, and begins again from there", () => {
    const replay = recording();
    replay.speed = 10;
    replay.seek(30);
    replay.play();
    replay.advance(1.5);
    expect([replay.cursor, replay.playing]).toEqual([45, true]);
    replay.advance(2);
    expect([replay.cursor, replay.playing]).toEqual([60, false]);
    replay.advance(1);
    expect(replay.cursor).toBe(60);
    replay.play();
    expect([replay.cursor, replay.playing]).toEqual([0, true]);
    replay.pause();
    replay.advance(5);
    expect(replay.cursor).toBe(0);
  });

  it.each([[30, 1], [100, 2], [1200, 30], [1e6, SPEEDS.at(-1)]])("%i seconds begins at %i×, so that a run lasts a minute", (seconds, speed) => {
    expect(recording([0], seconds).speed).toBe(speed);
  });

  it("a recording of nothing neither plays nor fails", () => {
    const replay = new Replay(recorded(framed([])), [], 0);
    replay.play();
    replay.advance(1);
    replay.seek(3);
    expect([replay.duration, replay.cursor, replay.playing]).toEqual([0, 0, false]);
  });
});
