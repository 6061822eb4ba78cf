// The routing panel: a grid of experts as a heat map, with its choice of layer, mode and slice, pointer and keyboard.
// Thinking is elsewhere: viewpoint (what is shown), binning (the bins), scales (colours), paint (the drawing).
import { bin, binAt, binName, isFine, placeOfBin, placeOfExpert, rowOf, stateText } from "./binning";
import type { Bins } from "./binning";
import type { Context, Panel } from "./context";
import { attribute, h, pen, text } from "./dom";
import { makeExpertsTable } from "./experts_table";
import { cellAt, planeOf, planeOfLayers, sliceName } from "./grid";
import { makeLegend } from "./legend";
import { binUnder, frame, layOut, paint } from "./paint";
import type { Layout } from "./paint";
import { MODE_INFO, domainOf, settle, valueText } from "./scales";
import type { Domain } from "./scales";
import type { Store } from "./store";
import { readTheme } from "./theme";
import type { Theme } from "./theme";
import { ALL_LAYERS, MODES, UNCLAIMED } from "./types";
import type { Layer, Mode } from "./types";
import { Viewpoint } from "./viewpoint";

const HEIGHT = 380; // at most, pixels
const TABLE_EVERY = 1000, TABLE_ROW = 2; // ms: at most once a second, and less often when it has more than 500 rows
const DRAG_DISTANCE = 4; // pixels, from which a press is a drag
const KEYS = "Arrow keys move, Enter selects or opens a block, plus and minus zoom, Escape shows the whole grid";
let panels = 0; // radio buttons of one panel share a name that no other panel has

export function heatmapPanel(store: Store, ctx: Context): Panel {
  const view = new Viewpoint();
  let layer: Layer | undefined, slices: Bins[] = [], layout: Layout | null = null, domain: Domain | null = null;
  let hover: { bins: Bins; at: number } | null = null;
  let drawn = "", shownLayer = "", theme: Theme | null = null, width = 0, seenTable = -Infinity, timer = 0, gone = false;
  let press: { x: number; y: number; row: number; col: number; moved: boolean } | null = null;

  const name = `lk-mode-${++panels}`;
  const layers = h("select", { "aria-label": "Layer", onchange: () => {
    const chosen = layers.selectedIndex;
    ctx.setView(chosen < store.layers.length ? chosen : ALL_LAYERS, ctx.view.mode);
  } });
  const modes = MODES.map((mode) => h("input", { type: "radio", name, value: mode, onchange: () => ctx.setView(ctx.view.layer, mode) }));
  const radios = h("div", { role: "radiogroup", "aria-label": "Mode", class: "lk-modes" },
    ...modes.map((radio, i) => h("label", {}, radio, h("span", {}, MODE_INFO[MODES[i]].title))));
  const slider = h("input", { type: "range", min: 0, step: 1, "aria-label": "Slice", oninput: () => look(() => view.showSlice(Number(slider.value))) });
  const sliceText = h("span", { class: "lk-slice-name" });
  const all = h("input", { type: "checkbox", onchange: () => look(() => view.showAll(all.checked)) });
  const allLabel = h("label", { class: "lk-all" }, all, "all slices");
  const sliceRow = h("div", { class: "lk-slices" }, h("span", {}, "Slice"), slider, sliceText, allLabel);
  const button = (label: string, sign: string, act: () => void) =>
    h("button", { type: "button", class: "lk-button lk-zoom", "aria-label": label, title: label, onclick: () => look(act) }, sign);
  const nearer = button("Zoom in", "+", () => view.zoomBy(2)), further = button("Zoom out", "−", () => view.zoomBy(0.5));
  const whole = button("Whole grid", "⤢", () => view.reset()), zooms = h("div", { class: "lk-zooms" }, nearer, further, whole);
  const canvas = h("canvas", { tabindex: 0, role: "img", class: "lk-heat", "aria-label": "Experts", "aria-description": KEYS });
  const over = h("canvas", { class: "lk-heat-over", "aria-hidden": "true" });
  const stage = h("div", { class: "lk-stage" }, canvas, over);
  const empty = h("p", { class: "lk-empty" }, "No experts have been seen yet.");
  const readout = h("p", { class: "lk-readout", "aria-hidden": "true" }), live = h("p", { class: "lk-hidden", "aria-live": "polite" });
  const legend = makeLegend(), table = makeExpertsTable();
  const el = h("section", { "aria-label": "Routing", class: "lk-panel lk-routing" },
    h("div", { class: "lk-panel-head" }, h("h3", {}, "Routing"), layers, radios, zooms),
    sliceRow, empty, stage, readout, legend.el, live, table.el);

  const observer = typeof ResizeObserver === "function" ? new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) >= 1) {
      width = entry.contentRect.width;
      requestAnimationFrame(() => gone || update());
    }
  }) : null;
  observer?.observe(stage);

  // The user looks elsewhere: change the viewpoint, then draw at once, paused or not.
  function look(change: () => void): void {
    change();
    update();
  }

  function update(): void {
    theme ??= readTheme(el);
    const { length } = store.layers, { mode } = ctx.view, all = ctx.view.layer === ALL_LAYERS && length > 1;
    const index = all ? length : Math.min(ctx.view.layer, length - 1), plane = all ? planeOfLayers(store.layers) : null;
    layer = plane ? { name: "all layers", sizes: [plane.rows, plane.cols] } : store.layers[index];
    if (layer) {
      const id = `${store.frame?.swarm} ${plane ? "" : index} ${layer.name}`;
      view.adopt(plane ?? planeOf(layer.sizes), id !== shownLayer);
      if (id !== shownLayer) domain = hover = null;
      shownLayer = id;
    }
    const key = JSON.stringify([store.revision("layers", "experts.layer", "experts.cell", "experts.state", "experts.adopted", `experts.${mode}`), index, mode,
      view.window, view.slices(), width, theme, window.devicePixelRatio]);
    if (key !== drawn) draw(index, mode, theme);
    drawn = key;
    decorate();
  }

  function draw(index: number, mode: Mode, theme: Theme): void {
    controls(index, mode);
    if (!layer) {
      slices = [];
      return;
    }
    slices = view.slices().map((slice) => bin(store.experts, index, view.plane, slice, view.window, mode, view.most));
    const fresh = domainOf(mode, known(slices));
    domain = settle(ctx.replay || drawnMode !== mode ? null : domain, fresh);
    drawnMode = mode;
    const tiled = slices.length > 1;
    layout = layOut(slices, slices.map((bins) => (tiled ? sliceName(layer!, bins.slice) : "")), width || stage.clientWidth || 480, HEIGHT, Boolean(view.plane.layers));
    for (const one of [canvas, over]) [one.style.width, one.style.height] = [`${layout.width}px`, `${layout.height}px`];
    const context = pen(canvas, layout.width, layout.height);
    if (context) paint(context, layout, view.plane, { theme, mode, domain });
    legend.show({ theme, mode, domain });
    attribute(canvas, "aria-label", description(layer, mode));
    hover = null;
    behind();
  }
  let drawnMode: Mode | null = null;

  // The table for screen readers; the last state is never left out.
  function behind(): void {
    const rows = slices.reduce((sum, bins) => sum + bins.state.length, 0);
    const wait = seenTable + Math.max(TABLE_EVERY, TABLE_ROW * rows) - performance.now();
    if (wait > 0) {
      timer ||= window.setTimeout(() => { timer = 0; behind(); }, wait);
      return;
    }
    seenTable = performance.now();
    table.show(layer, view.plane, slices, ctx.view.mode, store.lost && "was ");
  }

  function controls(index: number, mode: Mode): void {
    empty.hidden = Boolean(layer);
    for (const one of [stage, legend.el, readout]) one.hidden = !layer;
    zooms.hidden = !layer || (view.plane.rows * view.plane.cols <= 64 && !view.zoomed);
    layers.hidden = store.layers.length < 2;
    const names = [...store.layers.map(({ name, sizes }) => `${name} (${sizes.join(" × ")})`), "all layers"];
    if (names.join() !== [...layers.options].map((option) => option.text).join()) {
      layers.replaceChildren(...names.map((text) => h("option", {}, text)));
    }
    layers.selectedIndex = index;
    for (const radio of modes) radio.checked = radio.value === mode;
    const { plane } = view;
    sliceRow.hidden = !layer || plane.slices < 2;
    if (layer && plane.slices > 1) {
      attribute(slider, "max", plane.slices - 1);
      slider.value = String(view.slice);
      attribute(slider, "aria-valuetext", sliceName(layer, view.slice));
      text(sliceText, view.overview ? `${plane.slices} slices` : `${sliceName(layer, view.slice)} (${view.slice + 1} of ${plane.slices})`);
      allLabel.hidden = !view.canOverview;
      all.checked = view.overview;
    }
    whole.disabled = further.disabled = !view.zoomed;
    nearer.disabled = view.window.rows <= 4 && view.window.cols <= 4;
  }

  function description({ name, sizes }: Layer, mode: Mode): string {
    const sum = (counts: "claimed" | "alive" | "suspect" | "dead") => slices.reduce((total, bins) => total + bins[counts].reduce((a, b) => a + b, 0), 0);
    const [claimed, dead, suspect] = [sum("claimed"), sum("dead"), sum("suspect")];
    const blocks = slices.some((bins) => !isFine(bins)) ? `, in blocks of ${slices[0].blockRows} × ${slices[0].blockCols}` : "";
    return `Experts of ${name}, ${sizes.join(" × ")}, by ${mode}${blocks}${view.zoomed ? ", zoomed in" : ""}: `
      + `${claimed} seen, ${sum("alive")} alive${suspect ? `, ${suspect} suspect` : ""}${dead ? `, ${dead} dead` : ""}`;
  }

  // What lies above the map: the frames, and the line of text below.
  function decorate(): void {
    if (!layer || !layout || !theme) return;
    const context = pen(over, layout.width, layout.height), chosen = ctx.selected;
    if (context) {
      const here = view.plane.layers || store.experts.layer[chosen] === store.layers.indexOf(layer);
      const place = chosen >= 0 && here ? placeOfExpert(store.experts, view.plane, chosen) : null;
      if (hover) frame(context, layout, placeOfBin(hover.bins, hover.at), theme, "hover");
      if (place) frame(context, layout, place, theme, "selected");
      if (view.cursor && focused()) frame(context, layout, view.cursor, theme, "cursor");
    }
    const under = hover ?? (focused() && view.cursor ? found(view.cursor) : null);
    text(readout, under ? sentence(under.bins, under.at) : hint());
  }

  const focused = () => (el.getRootNode() as Document).activeElement === canvas;
  const hint = () => (slices.some((bins) => !isFine(bins)) ? `Each cell is a block of ${slices[0].blockRows} × ${slices[0].blockCols} experts: click one to see them.`
    : "Click an expert, or move to it with the arrow keys.");

  function found(place: { slice: number; row: number; col: number }): { bins: Bins; at: number } | null {
    const bins = slices.find((one) => one.slice === place.slice), at = bins ? binAt(bins, place) : -1;
    return bins && at >= 0 ? { bins, at } : null;
  }

  function sentence(bins: Bins, at: number): string {
    const mode = ctx.view.mode, expert = isFine(bins) ? bins.expert[at] : -1, server = store.servers[store.experts.server[expert]];
    const parts = [binName(layer!, view.plane, bins, at), (store.lost && "was ") + stateText(bins, at)];
    if (bins.state[at] !== UNCLAIMED) parts.push(valueText(mode, bins.value[at]));
    if (server) parts.push(server.label);
    return parts.filter(Boolean).join(" · ");
  }

  // Enter or a click: an expert is selected, a block is opened.
  function choose(bins: Bins, at: number): void {
    const place = placeOfBin(bins, at);
    if (isFine(bins)) {
      const cell = cellAt(view.plane, place);
      ctx.select(rowOf(store.experts, view.plane.layers ? place.row : store.layers.indexOf(layer!), cell));
    } else {
      view.zoomBy(Math.max(2, bins.blockRows, bins.blockCols),
        { row: place.row + (bins.blockRows - 1) / 2, col: place.col + (bins.blockCols - 1) / 2 });
    }
    if (cellAt(view.plane, place) >= 0) view.cursor = place;
    update();
  }

  const under = (event: MouseEvent) => (layout ? binUnder(layout, event.offsetX, event.offsetY) : null);
  canvas.addEventListener("pointerdown", (event) => {
    press = { x: event.clientX, y: event.clientY, row: view.window.row, col: view.window.col, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (press && event.buttons && layout && view.zoomed) {
      const dx = event.clientX - press.x, dy = event.clientY - press.y, { blockRows, blockCols } = slices[0];
      if (press.moved || Math.hypot(dx, dy) > DRAG_DISTANCE) {
        if (!press.moved) canvas.setPointerCapture(event.pointerId);
        press.moved = true;
        const row = press.row - Math.round(dy / layout.binHeight) * blockRows, col = press.col - Math.round(dx / layout.binWidth) * blockCols;
        return look(() => view.pan(row - view.window.row, col - view.window.col));
      }
    }
    const found = under(event), at = found ? { bins: found.tile.bins, at: found.at } : null;
    if (at?.bins === hover?.bins && at?.at === hover?.at) return;
    hover = at;
    decorate();
  });
  canvas.addEventListener("pointerleave", () => { hover = null; decorate(); });
  canvas.addEventListener("click", (event) => {
    const found = press?.moved ? null : under(event);
    press = null;
    if (found) choose(found.tile.bins, found.at);
  });
  canvas.addEventListener("wheel", (event) => {
    const found = under(event);
    if (!event.ctrlKey || !found) return; // else it scrolls the page
    event.preventDefault();
    look(() => view.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, placeOfBin(found.tile.bins, found.at)));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !slices.length || !act(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    update();
    const now = view.cursor && found(view.cursor);
    text(live, now ? sentence(now.bins, now.at) : "");
  });
  for (const event of ["focus", "blur"]) canvas.addEventListener(event, decorate);
  ctx.onSelect(() => gone || decorate());

  function act(key: string): boolean {
    const { blockRows, blockCols } = slices[0], now = view.cursor && found(view.cursor);
    switch (key) {
      case "ArrowUp": view.move(-blockRows, 0); break;
      case "ArrowDown": view.move(blockRows, 0); break;
      case "ArrowLeft": view.move(0, -blockCols); break;
      case "ArrowRight": view.move(0, blockCols); break;
      case "PageUp": if (view.plane.slices < 2) return false; view.showSlice(view.slice - 1); break;
      case "PageDown": if (view.plane.slices < 2) return false; view.showSlice(view.slice + 1); break;
      case "+": case "=": view.zoomBy(2); break;
      case "-": view.zoomBy(0.5); break;
      case "Escape": if (!view.zoomed) return false; view.reset(); break;
      case "Enter": case " ": if (!now) return false; choose(now.bins, now.at); break;
      default: return false;
    }
    hover = null;
    return true;
  }

  return {
    el,
    update,
    restyle() { theme = null; update(); },
    destroy() {
      gone = true;
      observer?.disconnect();
      clearTimeout(timer);
    },
  };
}

function* known(slices: readonly Bins[]): Iterable<number> {
  for (const bins of slices) yield* bins.value;
}
