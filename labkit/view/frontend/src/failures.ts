// Calls that failed, over time and by cause; what happened to servers is written where it happened.
import type uPlot from "uplot";
import { Chart, times, type Row } from "./chart";
import type { Context, Panel } from "./context";
import { attribute, h, text } from "./dom";
import { CAUSE_WORDS, clock, whole } from "./format";
import type { Store } from "./store";
import type { Theme } from "./theme";
import { CAUSES, type Cause } from "./types";

const HEIGHT = 132;
const LISTED = 50; // marks that are listed for screen readers

// stacked[i] is the top of cause i's bar in each bin: the sum of the shown causes up to it.
export function stack(values: Record<string, Float32Array>, shown: ReadonlySet<Cause>): Row[] {
  const count = values[CAUSES[0]]?.length ?? 0;
  const sum = new Array<number>(count).fill(0);
  return CAUSES.map((cause) => {
    if (shown.has(cause)) for (let i = 0; i < count; i++) sum[i] += values[cause][i] || 0;
    return [...sum];
  });
}

export function failuresPanel(store: Store, ctx: Context): Panel {
  const shown = new Set<Cause>(CAUSES);
  let rows: Row[] = [];
  let drawn = -1;

  const chart = new Chart(store, {
    label: "Failed calls by cause over time", lines: CAUSES.map((cause) => ({ name: cause, color: (theme) => theme.causes[cause], format: whole })),
    sync: "", height: HEIGHT,
    bars: (plot, theme) => { drawBars(plot, theme, rows, store.series.width); drawMarks(plot, theme, store.marks); },
    top: (all) => Math.max(3, ...all.flatMap((one) => one.map((value) => value ?? 0))),
  });
  chart.el.classList.add("lk-chart-bare");

  const toggles = CAUSES.map((cause) => {
    const count = h("span", { class: "lk-count", "aria-hidden": "true" }, "0");
    const el = h("button", {
      type: "button", class: "lk-toggle", "aria-pressed": "true", "aria-label": CAUSE_WORDS[cause], title: "click to hide or show; double-click to show only this cause",
      onclick: () => toggle(cause), ondblclick: () => only(cause),
    }, h("i", { class: `lk-key lk-key-${cause.replace("_", "-")}`, "aria-hidden": "true" }), CAUSE_WORDS[cause], " ", count);
    return { cause, el, count };
  });
  const counts = CAUSES.map((cause) => {
    const cell = h("td", {}, "0");
    return { cause, cell, row: h("tr", {}, h("th", { scope: "row" }, CAUSE_WORDS[cause]), cell) };
  });
  const table = h("table", { "aria-label": "Failures by cause" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "cause"), h("th", { scope: "col" }, "failed calls since the start"))),
    h("tbody", {}, ...counts.map((one) => one.row)));
  const happened = h("ol", { "aria-label": "What happened to servers" });
  const el = h("section", { "aria-label": "Failures", class: "lk-panel lk-failures" },
    h("div", { class: "lk-panel-head" }, h("h3", {}, "Failures"), h("div", { role: "group", "aria-label": "Causes", class: "lk-toggles" }, ...toggles.map((one) => one.el))),
    chart.el, h("div", { class: "lk-hidden" }, table, happened));

  const filtered = () => {
    for (const one of toggles) attribute(one.el, "aria-pressed", String(shown.has(one.cause)));
    drawn = -1;
    update();
  };
  const toggle = (cause: Cause) => {
    if (!shown.delete(cause)) shown.add(cause);
    filtered();
  };
  const only = (cause: Cause) => {
    const alone = shown.size === 1 && shown.has(cause);
    shown.clear();
    for (const one of CAUSES) if (alone || one === cause) shown.add(one);
    filtered();
  };

  const update = () => {
    const failed = store.frame?.headline.failed ?? {}, known = store.frame?.source !== "servers"; // who makes no calls knows of none
    const count = (cause: Cause) => (known ? failed[cause] ?? 0 : NaN);
    for (const one of toggles) text(one.count, whole(count(one.cause)));
    for (const one of counts) text(one.cell, whole(count(one.cause)));
    const revision = store.revision("series", "marks");
    if (revision === drawn) return;
    drawn = revision;
    rows = stack(store.series.values, shown);
    chart.set(times(store.series), rows, ctx.duration);
    const total = CAUSES.reduce((sum, cause) => sum + count(cause), 0);
    attribute(chart.el, "aria-label", `Failed calls by cause over time, ${known ? `${whole(total)} in all` : "not known here, where no call was made"}; the last things that happened: `
      + (store.marks.slice(-3).map(([at, what]) => `${clock(at)} ${what}`).join(", ") || "nothing"));
    const listed = store.marks.slice(-LISTED);
    if (happened.childElementCount !== listed.length || happened.lastElementChild?.textContent !== markText(listed.at(-1))) {
      happened.replaceChildren(...listed.map((mark) => h("li", {}, markText(mark))));
    }
  };
  return { el, update, restyle: () => chart.restyle(), destroy: () => chart.destroy() };
}

const markText = (mark: [number, string] | undefined): string => (mark ? `${clock(mark[0])} ${mark[1]}` : "");

function drawBars(plot: uPlot, theme: Theme, rows: readonly Row[], width: number): void {
  const { ctx, bbox } = plot;
  const xs = plot.data[0], floor = plot.valToPos(0, "y", true);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  for (let i = 0; i < xs.length; i++) {
    if (!rows[CAUSES.length - 1][i]) continue;
    const left = Math.round(plot.valToPos(xs[i], "x", true));
    const right = Math.max(left + 2, Math.round(plot.valToPos(xs[i] + width, "x", true)) - 1);
    let bottom = floor;
    CAUSES.forEach((cause, k) => {
      const top = plot.valToPos(rows[k][i] as number, "y", true);
      if (top >= bottom) return;
      ctx.fillStyle = theme.causes[cause];
      ctx.fillRect(left, top, right - left, bottom - top);
      bottom = top;
    });
  }
  ctx.restore();
}

// The words of marks, on up to three lines; one that finds no room keeps only its dashed line.
function drawMarks(plot: uPlot, theme: Theme, marks: readonly [number, string][]): void {
  const { ctx, bbox } = plot;
  const ratio = window.devicePixelRatio || 1, line = 13 * ratio;
  const free = [-Infinity, -Infinity, -Infinity];
  ctx.save();
  ctx.font = `${11 * ratio}px ${getComputedStyle(plot.root).fontFamily}`;
  ctx.textBaseline = "top";
  ctx.textAlign = "left";
  for (const [at, what] of marks.slice(-200)) {
    const x = plot.valToPos(at, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    const width = ctx.measureText(what).width + 8 * ratio;
    const left = Math.min(x + 3 * ratio, bbox.left + bbox.width - width);
    const level = free.findIndex((taken) => left >= taken);
    if (level < 0) continue;
    free[level] = left + width;
    ctx.globalAlpha = 0.85;
    ctx.fillStyle = theme.ground;
    ctx.fillRect(left, bbox.top + level * line, width - 4 * ratio, line);
    ctx.globalAlpha = 1;
    ctx.fillStyle = theme.text;
    ctx.fillText(what, left + 2 * ratio, bbox.top + level * line + ratio);
  }
  ctx.restore();
}
