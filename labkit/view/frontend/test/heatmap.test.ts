// @vitest-environment happy-dom
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { detailPanel, details } from "../src/detail";
import { heatmapPanel } from "../src/heatmap";
import { makeContext } from "../src/shell";
import { Store } from "../src/store";
import { ALL_LAYERS } from "../src/types";
import type { Mode } from "../src/types";
import { frame, framed, grid, headline, piece } from "./frames";

const ends: (() => void)[] = [];
beforeEach(() => { vi.useFakeTimers(); });
afterEach(() => { for (const end of ends.splice(0)) end(); vi.useRealTimers(); });

function panels(...first: ReturnType<typeof grid>) {
  const store = new Store(), asked: [number, Mode][] = [];
  store.apply(...first);
  const ctx = makeContext({
    view: { layer: 0, mode: "load" }, say() {}, replay: false, execute: () => Promise.resolve(""),
    setView(layer, mode) {
      asked.push([layer, mode]);
      Object.assign(ctx.view, { layer, mode });
      heat.update();
    },
  });
  const heat = heatmapPanel(store, ctx), detail = detailPanel(store, ctx);
  document.body.append(heat.el, detail.el);
  heat.update();
  ends.push(() => { for (const panel of [heat, detail]) { panel.destroy(); panel.el.remove(); } });
  const find = <T extends HTMLElement>(selector: string) => heat.el.querySelector<T>(selector)!;
  const canvas = find<HTMLCanvasElement>("canvas[tabindex]");
  return {
    store, ctx, heat, detail, asked, find, canvas,
    rows: () => [...heat.el.querySelectorAll("table[aria-label=Experts] tbody tr")].map((row) => [...row.children].map((cell) => cell.textContent)),
    press: (...keys: string[]) => { for (const key of keys) canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true })); },
  };
}

describe("the heat map", () => {
  it("has a table behind it, with a row a cell", () => {
    const { rows } = panels(...grid([2, 2], (cell) => [10, 20, NaN, 40][cell], (cell) => [1, 2, 1, 0][cell]));
    expect(rows()).toEqual([
      ["ffn.0.0", "alive", "10 rows/s"], ["ffn.0.1", "suspect", "20 rows/s"], ["ffn.1.0", "alive", "no value yet"], ["ffn.1.1", "unclaimed", "–"],
    ]);
  });

  it("updates that table at most once a second, and does not forget the last state", () => {
    const { store, heat, rows } = panels(...grid([1, 2]));
    for (const state of [2, 3]) {
      store.apply(...framed([piece("experts", "state", "u8", [state, state])]));
      heat.update();
    }
    expect(rows()[0][1]).toBe("alive");
    vi.advanceTimersByTime(1100);
    expect(rows()[0][1]).toBe("dead");
  });

  it("says in its label what is to be seen", () => {
    const { canvas } = panels(...grid([2, 4], undefined, (cell) => [1, 1, 1, 2, 3, 3, 0, 1][cell]));
    expect(canvas.getAttribute("aria-label")).toBe("Experts of ffn, 2 × 4, by load: 7 seen, 4 alive, 1 suspect, 2 dead");
  });

  it("is not drawn again for a headline", () => {
    const { store, heat, canvas } = panels(...grid([2, 2])), draw = vi.spyOn(canvas, "setAttribute"), resize = vi.spyOn(canvas, "getContext");
    store.apply(frame({ headline: headline({ steps: 121 }) }), []);
    heat.update();
    store.apply(...framed([piece("experts", "latency", "f32", [1, 2, 3, 4])])); // another mode's
    heat.update();
    expect([draw.mock.calls.length, resize.mock.calls.length]).toEqual([0, 0]);
    store.apply(...framed([piece("experts", "load", "f32", [1, 2, 3, 4])]));
    heat.update();
    expect(resize).toHaveBeenCalled();
  });

  it("asks for another mode and another layer", () => {
    const { store, heat, asked, find } = panels(...grid([2, 2]));
    expect(find("select").hidden).toBe(true);
    find<HTMLInputElement>("input[value=failures]").click();
    store.apply(frame({ layers: [{ name: "ffn", sizes: [2, 2] }, { name: "attn", sizes: [8] }] }), []);
    heat.update();
    const select = find<HTMLSelectElement>("select");
    expect([select.hidden, [...select.options].map((option) => option.text)]).toEqual([false, ["ffn (2 × 2)", "attn (8)", "all layers"]]);
    select.selectedIndex = 1;
    select.dispatchEvent(new Event("change"));
    expect(asked).toEqual([[0, "failures"], [1, "failures"]]);
    vi.advanceTimersByTime(1100);
    expect(find("th:last-child").textContent).toBe("failures, % of calls");
  });

  it("shows all layers at once, a row each, and selects an expert of any of them", () => {
    const { store, ctx, heat, asked, find, canvas, rows, press } = panels(...framed([
      piece("experts", "layer", "u16", [0, 0, 0, 1, 1]), piece("experts", "cell", "u32", [0, 1, 3, 0, 1]), piece("experts", "server", "i32", [0, 0, 0, 0, 0]),
      piece("experts", "state", "u8", [1, 1, 3, 1, 2]), piece("experts", "load", "f32", [1, 2, 3, 4, 5]),
    ], { reset: true, layers: [{ name: "ffn", sizes: [2, 2] }, { name: "olmoe.layer1", sizes: [2] }] }));
    const select = find<HTMLSelectElement>("select");
    select.selectedIndex = 2;
    select.dispatchEvent(new Event("change"));
    expect(asked).toEqual([[ALL_LAYERS, "load"]]);
    vi.advanceTimersByTime(1100);
    expect(rows().map(([name, state]) => `${name} ${state}`)).toEqual([
      "ffn.0.0 alive", "ffn.0.1 alive", "ffn.1.0 unclaimed", "ffn.1.1 dead", "olmoe.layer1.0 alive", "olmoe.layer1.1 suspect",
    ]);
    expect(canvas.getAttribute("aria-label")).toBe("Experts of all layers, 2 × 4, by load: 5 seen, 3 alive, 1 suspect, 1 dead");
    press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "Enter"); // the second row is shorter
    expect([find("[aria-live]").textContent, ctx.selected]).toEqual(["olmoe.layer1.1 · suspect · 5.0 rows/s", 4]);
    store.apply(frame({ layers: [{ name: "ffn", sizes: [2, 2] }, { name: "olmoe.layer1", sizes: [2] }, { name: "olmoe.layer2", sizes: [1] }] }), []);
    heat.update();
    expect(select.selectedIndex).toBe(3);
    vi.advanceTimersByTime(1100);
    expect(rows().length).toBe(7);
  });

  it("goes back to one layer when all that is left is one", () => {
    const { ctx, heat, canvas } = panels(...grid([2, 2]));
    ctx.view.layer = ALL_LAYERS;
    heat.update();
    expect(canvas.getAttribute("aria-label")).toContain("Experts of ffn, 2 × 2");
  });

  it("is walked with the arrow keys, and Enter selects", () => {
    const { ctx, press, find } = panels(...grid([4, 4]));
    press("ArrowRight", "ArrowRight", "ArrowDown");
    expect(find("[aria-live]").textContent).toBe("ffn.1.1 · alive · 5.0 rows/s");
    press("Enter");
    expect(ctx.selected).toBe(5);
  });

  it("opens a block where there are more experts than it can show, and Escape goes back", () => {
    const { ctx, press, canvas } = panels(...grid([65, 65]));
    expect(canvas.getAttribute("aria-label")).toContain("in blocks of 2 × 2");
    press("ArrowRight", "ArrowDown", "Enter");
    expect(canvas.getAttribute("aria-label")).toContain("zoomed in");
    press("Enter");
    expect(ctx.selected).toBe(2 * 65);
    press("Escape");
    expect(canvas.getAttribute("aria-label")).toContain("in blocks of 2 × 2");
  });

  it("leaves keys alone that are not its own", () => {
    const { canvas } = panels(...grid([4, 4]));
    for (const init of [{ key: "a" }, { key: "Tab" }, { key: "Escape" }, { key: "ArrowUp", ctrlKey: true }]) {
      const event = new KeyboardEvent("keydown", { ...init, cancelable: true });
      canvas.dispatchEvent(event);
      expect(event.defaultPrevented).toBe(false);
    }
  });

  it("shows a grid of three dimensions as slices", () => {
    const { find, rows } = panels(...grid([12, 2, 2])), slider = find<HTMLInputElement>("input[aria-label=Slice]");
    expect([slider.max, rows().length]).toEqual(["11", 4]);
    slider.value = "3";
    slider.dispatchEvent(new Event("input"));
    expect(slider.getAttribute("aria-valuetext")).toBe("ffn.3");
    expect(find("canvas").getAttribute("aria-label")).toContain("4 seen");
  });

  it("says so when there are no experts", () => {
    const { store, heat, rows, find } = panels(frame({ reset: true }), []);
    expect([find(".lk-empty").hidden, rows()]).toEqual([false, []]);
    expect(find("canvas").closest("[hidden]")).not.toBeNull();
    store.apply(...grid([2, 2]));
    heat.update();
    expect(find(".lk-empty").hidden).toBe(true);
  });
});

describe("the selected expert", () => {
  it("is described, and says what is not known", () => {
    const { store, ctx, detail } = panels(...grid([2, 2], () => 7));
    store.apply(...framed([piece("experts", "calls", "u32", [0, 1234, 0, 0]), piece("experts", "latency", "f32", [NaN, 3.4, NaN, NaN])],
      { server_text: { start: 0, rows: [["servers[0]", "tcp://a", "running"]] } }));
    ctx.select(1);
    const said = detail.el.textContent;
    for (const part of ["ffn.0.1", "servers[0]", "alive", "1,234", "3.4 ms", "7.0 rows/s", "no value yet"]) expect(said).toContain(part);
    expect(details(store, 4)).toBeNull();
    expect(details(store, -1)).toBeNull();
  });
});
