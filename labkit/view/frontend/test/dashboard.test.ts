// @vitest-environment happy-dom
// The whole widget in a page without pixels: what is read, pressed and said.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import widget from "../src/index";
import { CLICK_WAITS } from "../src/status";
import { ALIVE, CAUSES, DEAD, type Frame, type Say } from "../src/types";
import { buffer, frame, framed, headline, piece, series } from "./frames";

let said: Say[], listeners: ((content: unknown, buffers?: DataView[]) => void)[], el: HTMLElement, end: () => void, page: string;
const model = {
  get: () => false,
  on: (event: string, callback: (...args: never[]) => void) => void (event === "msg:custom" && listeners.push(callback as never)),
  off: (_: string, callback?: unknown) => void (listeners = listeners.filter((one) => one !== callback)),
  send: (content: unknown) => void said.push(content as Say),
};

const numbers = (local: number, failed = 0) => [0.2, 4, 4, 20, 1, ...Array(12).fill(5), failed, ...Array(CAUSES.length - 1).fill(0), 0, 0, local];

// Servers 0 and 1 are local, 2 is not.
function swarm(states = [ALIVE, ALIVE, ALIVE], words = ["running", "running", "remote"], changes: Partial<Frame> = {}): [Frame, DataView[]] {
  const [made, buffers] = framed([
    piece("experts", "layer", "u16", [0, 0, 0, 0]), piece("experts", "cell", "u32", [0, 1, 2, 3]), piece("experts", "server", "i32", [0, 0, 1, 2]),
    piece("experts", "state", "u8", [1, 1, 1, 3]), piece("experts", "load", "f32", [1, 2, 3, NaN]),
    piece("servers", "state", "u8", states), piece("servers", "numbers", "f32", [...numbers(0), ...numbers(1, 3), ...numbers(-1)], { width: 27 }),
  ], {
    reset: true, layers: [{ name: "ffn", sizes: [2, 2] }],
    server_text: { start: 0, rows: [["servers[0]", "a", words[0]], ["servers[1]", "b", words[1]], ["tcp://c", "c", words[2]]] },
    marks: [[65, "servers[1] killed"]], ...changes,
  });
  const [bins, data] = series(0, 20);
  return [{ ...made, series: { ...bins!, buffer: buffers.length } }, [...buffers, data]];
}
const give = ([made, buffers]: [Frame, DataView[]]) => {
  for (const listener of listeners) listener({ ...made, page }, buffers);
  vi.advanceTimersByTime(40);
};
const answer = (type: "heard" | "done" | "failed", text = "") => {
  const command = said.filter((one) => one.type === "command").at(-1) as { id: number };
  for (const listener of listeners) listener({ type, page, id: command.id, text });
};
const region = (name: string) => el.querySelector(`section[aria-label="${name}"]`) as HTMLElement;
const button = (name: string) => [...el.querySelectorAll("button")].find((one) => (one.getAttribute("aria-label") ?? one.textContent) === name) as HTMLButtonElement;
const status = () => el.querySelector("[role=status]")!.textContent;
const words = (node: Element) => node.textContent!.replace(/\s+/g, " ");
const commands = () => said.flatMap((one) => (one.type === "command" ? [one.command] : []));

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal("IntersectionObserver", undefined); // everything is in sight
  said = [];
  listeners = [];
  el = document.body.appendChild(document.createElement("div"));
  const made = widget();
  const stop = made.initialize({ model });
  const detach = made.render({ model, el });
  end = () => { detach(); stop(); };
  page = (said[0] as { page: string }).page;
});
afterEach(() => {
  end();
  el.remove();
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

it("waits for the first frame, and looks", () => {
  expect(status()).toBe("waiting for the first frame …");
  expect(said).toMatchObject([{ type: "look", looking: true, fresh: true }]);
});

it("shows the headline, the regions and how old the view is", () => {
  give(swarm());
  expect(el.querySelector("[role=region]")!.getAttribute("aria-label")).toBe("labkit dashboard of swarm test");
  const text = words(region("Headline"));
  for (const part of ["4 of 4 experts", "0 at risk", "2 of 2 servers", "step 120 of 500", "loss 0.412", "1,234 samples/s", "88 calls/s", "3 failed"]) expect(text).toContain(part);
  for (const name of ["Routing", "Expert", "Servers", "Training", "Failures"]) expect(region(name)).toBeTruthy();
  vi.advanceTimersByTime(2000);
  const old = el.querySelector("[data-age]")!;
  expect(Number(old.getAttribute("data-age"))).toBeGreaterThan(1.5);
  expect(old.textContent).toMatch(/^view 2\.\d s old$/);
  expect(status()).toBe("");
});

describe("the servers", () => {
  const rows = () => [...region("Servers").querySelectorAll("table[aria-label=Servers] > tbody > tr:not(.lk-details)")];
  it("are listed worst first, each state in words", () => {
    give(swarm([ALIVE, ALIVE, DEAD], ["running", "running", "silent"]));
    expect(rows().map((row) => row.querySelector("th")!.textContent!.slice(1))).toEqual(["tcp://c", "servers[1]", "servers[0]"]);
    expect(words(rows()[0])).toContain("dead (silent)");
    expect(words(rows()[1])).toContain("3 (timeout 3)");
    expect(words(rows()[2])).toContain("4 of 4");
  });

  it("are killed after one question, in place", async () => {
    give(swarm());
    const kill = button("Kill servers[1]");
    kill.focus();
    kill.click();
    expect(commands()).toEqual([]);
    expect(words(kill)).toBe("Really kill servers[1]?");
    expect(document.activeElement).toBe(kill);
    kill.click();
    expect(commands()).toEqual([{ do: "kill", server: 1 }]);
    answer("done", "servers[1] killed");
    await vi.advanceTimersByTimeAsync(300);
    expect(status()).toBe("servers[1] killed");
    expect(words(kill)).toBe("Kill servers[1]");
  });

  it("are not killed when the question is not answered", () => {
    give(swarm());
    button("Kill servers[1]").click();
    vi.advanceTimersByTime(4100);
    button("Kill servers[1]").click();
    expect(commands()).toEqual([]);
  });

  it("started elsewhere have buttons that say why they cannot be pressed", () => {
    give(swarm());
    expect([button("Kill tcp://c").disabled, button("Kill tcp://c").title]).toEqual([true, "it was started elsewhere"]);
    expect(button("Kill servers[0]").disabled).toBe(false);
    give(swarm(undefined, undefined, { can: { control: false } }));
    expect(button("Kill servers[0]").disabled).toBe(true);
  });

  it("open to show where the time goes, and take latency and loss", () => {
    give(swarm());
    button("Details of servers[0]").click();
    vi.advanceTimersByTime(40);
    expect(region("Servers").querySelector('table[aria-label="Latency split of servers[0]"]')!.textContent).toContain("compute");
    const slider = el.querySelector('input[aria-label="Latency of servers[0]"]') as HTMLInputElement;
    for (const value of ["3", "5"]) {
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
    }
    expect(commands()).toEqual([]);
    vi.advanceTimersByTime(250);
    expect(commands()).toEqual([{ do: "faults", server: 0, latency: 0.02, loss: null }]);
    expect(slider.getAttribute("aria-valuetext")).toBe("20 ms");
  });

  it("keep their rows when frames come", () => {
    give(swarm());
    const before = rows();
    give(swarm([ALIVE, ALIVE, ALIVE]));
    expect(rows().every((row, i) => row === before[i])).toBe(true);
  });
});

it("says that a click waits, when the kernel hears none", () => {
  give(swarm());
  button("Stop run").click();
  button("Really stop the run?").click();
  expect(commands()).toEqual([{ do: "stop_run" }]);
  vi.advanceTimersByTime(1300);
  expect(status()).toBe(CLICK_WAITS);
  answer("heard");
  vi.advanceTimersByTime(300);
  expect(status()).toBe("");
});

it("pauses: nothing more is asked for, nor drawn, and the view grows old", () => {
  give(swarm());
  button("Pause view").click();
  expect(said.at(-1)).toMatchObject({ type: "look", looking: false });
  give([frame({ headline: headline({ loss: 0.1 }) }), []]);
  vi.advanceTimersByTime(5000);
  expect(status()).toBe("paused");
  expect(words(region("Headline"))).toContain("loss 0.412");
  button("Resume view").click();
  expect(said.at(-1)).toMatchObject({ type: "look", looking: true });
  vi.advanceTimersByTime(40);
  expect(words(region("Headline"))).toContain("loss 0.100");
});

it("filters failures by cause, and lists them for who cannot see the bars", () => {
  give(swarm());
  const lost = button("lost connection");
  lost.click();
  expect(lost.getAttribute("aria-pressed")).toBe("false");
  lost.click();
  expect(lost.getAttribute("aria-pressed")).toBe("true");
  expect(words(region("Failures").querySelector('table[aria-label="Failures by cause"]')!)).toContain("timeout3");
  expect(region("Failures").querySelector("ol")!.textContent).toBe("1:05 servers[1] killed");
});

it("says that the swarm is closed, and lets go of its buttons", () => {
  give(swarm(undefined, undefined, { open: false }));
  vi.advanceTimersByTime(300);
  expect(status()).toBe("the swarm is closed, or cannot be reached");
  expect(button("Kill servers[0]").disabled).toBe(true);
});

describe("what was measured while training", () => {
  const curve = (number: number, name: string, start: number, points: number[]): [NonNullable<Frame["curves"]>[number], DataView] =>
    [{ curve: number, name, start, count: points.length / 2, buffer: number }, buffer("f32", points)];
  const curves = (...some: ReturnType<typeof curve>[]): [Frame, DataView[]] =>
    [frame({ curves: some.map(([one], i) => ({ ...one, buffer: i })) }), some.map(([, data]) => data)];
  const charts = () => [...region("Training").querySelectorAll("figure")].map((one) => one.getAttribute("aria-label"));

  it("has a chart for each name beside that of the loss, and points are added", () => {
    give(swarm());
    give(curves(curve(0, "validation loss", 0, [1, 0.9, 2, 0.5]), curve(1, "accuracy", 0, [1, NaN])));
    expect(charts().slice(0, 4)).toEqual(["Loss, last: loss 19.0", "validation loss, last: validation loss 0.500", "accuracy, last: accuracy –", expect.stringMatching(/^Samples/)]);
    give(curves(curve(0, "validation loss", 2, [3, 0.25])));
    give(curves(curve(1, "accuracy", 0, [1, 0.75])));
    expect(charts().slice(1, 3)).toEqual(["validation loss, last: validation loss 0.250", "accuracy, last: accuracy 0.750"]);
    give(swarm());
    expect(charts()).toHaveLength(5);
  });

  it("takes nothing that does not fit together, and names are text", () => {
    give(swarm());
    give(curves(curve(0, "<b>loss</b>", 0, [1, 2])));
    give(curves(curve(2, "left out", 0, [1, 2])));
    give(curves(curve(0, "a gap", 5, [1, 2])));
    give([frame({ curves: [{ curve: 0, name: "short", start: 0, count: 9, buffer: 0 }, null as never, { curve: 0 } as never] }), [buffer("f32", [1])]]);
    expect(charts()[1]).toBe("<b>loss</b>, last: <b>loss</b> 2.00");
    expect(el.querySelector("b")).toBeNull();
    expect(charts()).toHaveLength(6);
  });
});

it("says what a pass waits for", () => {
  give(swarm(undefined, undefined, { waits: ["a forward pass takes 0.21 s", 7 as never] }));
  expect(region("Training").querySelector(".lk-waits")!.textContent).toBe("a forward pass takes 0.21 s");
});

it("says whether others reach it", () => {
  give(swarm(undefined, undefined, { reach: ["not reachable: 203.0.113.10 could not call back", 7 as never] }));
  expect(region("Servers").querySelector(".lk-reach")!.textContent).toBe("not reachable: 203.0.113.10 could not call back");
});

it("says that its kernel is gone, and lets go of all that would need it, until it is back", () => {
  give(swarm());
  const needing = () => [...el.querySelectorAll<HTMLButtonElement | HTMLInputElement>(".lk-controls button, .lk-actions button, .lk-slider input")];
  expect(needing().filter((one) => !one.disabled).length).toBeGreaterThan(10);
  vi.advanceTimersByTime(7_300);
  expect(status()).toMatch(/^no sign of life for 7 s: the kernel was restarted/);
  expect(needing().filter((one) => !one.disabled)).toEqual([]);
  expect(button("Kill servers[0]").title).toBe("the kernel does not answer");
  expect(words(region("Servers"))).toContain("was alive");
  expect(words(region("Headline"))).toContain("? of 4 experts");
  vi.advanceTimersByTime(3_000);
  expect(words(el.querySelector("table[aria-label=Experts]")!)).toContain("was alive");
  give(swarm());
  vi.advanceTimersByTime(3_000);
  expect(status()).toBe("");
  expect(button("Kill servers[0]").disabled).toBe(false);
  expect(words(el)).not.toContain("was alive");
});

it("says so also while it is paused", () => {
  give(swarm());
  button("Pause view").click();
  vi.advanceTimersByTime(7_300);
  expect(status()).toMatch(/^no sign of life/);
  expect(button("Kill servers[0]").disabled).toBe(true);
  for (const listener of listeners) listener({ type: "beat" });
  vi.advanceTimersByTime(300);
  expect(status()).toBe("paused");
  expect(button("Kill servers[0]").disabled).toBe(false);
});

it("leaves nothing behind", () => {
  give(swarm());
  end();
  expect(el.childElementCount).toBe(0);
  expect(listeners).toEqual([]);
  expect(vi.getTimerCount()).toBe(0);
});
