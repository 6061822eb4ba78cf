// The page of an exported recording: the same panels, a slider of time instead of a kernel.
import type { Panel } from "./context";
import { attribute, h, text } from "./dom";
import { clock } from "./format";
import { Replay, SPEEDS, type Recorded } from "./replay";
import { makeContext, shell } from "./shell";
import type { Frame } from "./types";

interface Coded { header: Frame; buffers: string[] }
interface Recording { static: Coded; keyframes: Coded[]; swarm: string; seconds: number }

// `data`: base64 of gzip of JSON.
export async function readRecording(data: string): Promise<Recording> {
  const stream = new Blob([bytesOf(data.trim()) as BlobPart]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text()) as Recording;
}

function bytesOf(base64: string): Uint8Array {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const decoded = ({ header, buffers }: Coded): Recorded => ({ header, buffers: buffers.map((one) => new DataView(bytesOf(one).buffer as ArrayBuffer)) });

function player(replay: Replay, moved: () => void, redraw: () => void): Panel {
  const play = h("button", { type: "button", class: "lk-button", onclick: () => {
    if (replay.playing) replay.pause();
    else replay.play();
    update();
    run();
  } }, "Play");
  const slider = h("input", { type: "range", min: 0, max: replay.duration, step: "any", value: replay.duration, "aria-label": "Time", class: "lk-time" });
  slider.addEventListener("input", () => {
    replay.pause();
    replay.seek(Number(slider.value));
    moved();
    redraw();
  });
  // "any" would make an arrow key move by a hundredth of the range: a second is what one expects, and ten with PageUp.
  slider.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (!step) return;
    event.preventDefault();
    replay.pause();
    replay.seek(replay.cursor + step);
    moved();
    redraw();
  });
  const speed = h("select", { "aria-label": "Speed", onchange: () => { replay.speed = Number(speed.value); } },
    ...SPEEDS.map((one) => h("option", { value: one, selected: one === replay.speed }, `${one}×`)));
  const time = h("output", { class: "lk-clock" });

  let before = 0, frame = 0;
  const run = () => {
    cancelAnimationFrame(frame);
    before = performance.now();
    const step = (now: number) => {
      if (!replay.playing) return redraw();
      replay.advance(Math.min(1, (now - before) / 1000));
      before = now;
      moved();
      frame = requestAnimationFrame(step);
    };
    frame = requestAnimationFrame(step);
  };
  const update = () => {
    text(play, replay.playing ? "Pause" : "Play");
    if (Number(slider.value) !== replay.cursor) slider.value = String(replay.cursor);
    const words = `${clock(replay.cursor)} of ${clock(replay.duration)}`;
    attribute(slider, "aria-valuetext", words);
    text(time, words);
  };
  update();
  return { el: h("div", { class: "lk-controls lk-player", role: "group", "aria-label": "Recording" }, play, slider, time, speed), update, destroy() { cancelAnimationFrame(frame); } };
}

export function showReplay(place: HTMLElement, recording: Recording): () => void {
  const replay = new Replay(decoded(recording.static), recording.keyframes.map(decoded), recording.seconds);
  const ctx = makeContext({
    view: { layer: 0, mode: "load" },
    setView(layer, mode) {
      Object.assign(ctx.view, { layer, mode });
      view.draw();
    },
    say() {},
    replay: true,
    execute: () => Promise.reject(new Error("this is a recording")),
  });
  const moved = () => { ctx.cursor = replay.cursor; };
  ctx.duration = replay.duration;
  moved();
  const wall = replay.store.frame?.wall;
  const view = shell(place, replay.store, ctx, {
    scrolls: false, seen() {}, frozen: () => false,
    status: () => (wall ? `recorded ${new Date(wall * 1000).toLocaleString()}` : "a recording"),
    controls: (redraw) => player(replay, moved, redraw),
  });
  return () => view.destroy();
}

async function main(): Promise<void> {
  const script = document.getElementById("labkit-recording");
  if (!script) return;
  const place = document.getElementById("labkit-replay") ?? document.body.appendChild(h("main", { id: "labkit-replay" }));
  place.classList.add("lk-page");
  try {
    showReplay(place, await readRecording(script.textContent ?? ""));
  } catch (error) {
    console.error(error);
    place.append(h("p", { role: "alert" }, "This recording cannot be read: the file may be cut off, or the browser too old."));
  }
}

void main();
