// How training goes: loss, throughput, traffic, what is in flight, and how stale gradients are.
import { Chart, row, times, type Line } from "./chart";
import type { Context, Panel } from "./context";
import { h, text } from "./dom";
import { bytes, figures, rate } from "./format";
import type { Store } from "./store";
import type { Theme } from "./theme";
import { SERIES } from "./types";

type Name = (typeof SERIES)[number];
interface Plan { label: string; columns: Name[]; lines: Line[] }

const first = (theme: Theme) => theme.accent;
const second = (theme: Theme) => theme.causes.lost;

const count = (value: number | null) => rate(value).replace(/\.0$/, ""); // a mean over time, of whole numbers

const PLANS: Plan[] = [
  { label: "Loss", columns: ["loss"], lines: [{ name: "loss", color: first, format: figures }] },
  { label: "Samples per second", columns: ["samples"], lines: [{ name: "samples/s", color: first, format: rate }] },
  {
    label: "Calls and bytes per second", columns: ["calls", "bytes"],
    lines: [{ name: "calls/s", color: first, format: rate }, { name: "bytes/s", color: second, format: bytes, dashed: true, axis: "right" }],
  },
  { label: "Calls in flight", columns: ["in_flight"], lines: [{ name: "in flight", color: first, format: count }] },
  { label: "Staleness, expert updates between forward and backward", columns: ["staleness"], lines: [{ name: "staleness (updates)", color: first, format: figures }] },
];
const HEIGHT = 104;
let panels = 0;

export function trainingPanel(store: Store, ctx: Context): Panel {
  const sync = `labkit-${++panels}`;
  const charts = PLANS.map(({ label, lines }) => new Chart(store, { label, lines, sync, height: HEIGHT }));
  const measured: Chart[] = []; // one for each learning curve, behind that of the loss
  const all = () => [...charts, ...measured];
  const waits = h("p", { class: "lk-waits lk-dim" }), box = h("div", { class: "lk-charts" }, ...charts.map((chart) => chart.el));
  const el = h("section", { "aria-label": "Training", class: "lk-panel lk-training" }, h("h3", {}, "Training"), waits, box);
  let drawn = -1;

  const update = () => {
    text(waits, store.waits.join("\n"));
    const revision = store.revision("series", "marks", "curves");
    if (revision === drawn) return;
    drawn = revision;
    const xs = times(store.series);
    PLANS.forEach(({ columns }, i) => {
      const rows = columns.map((name) => row(store.series.values[name], name === "loss" || name === "staleness"));
      charts[i].set(xs, rows, ctx.duration);
    });
    const begin = xs[0] ?? 0, end = ctx.duration || (xs.at(-1) ?? 0) + store.series.width;
    store.curves.forEach(({ name, at, value }, i) => {
      if (measured[i]?.name !== name) {
        measured[i]?.destroy();
        const chart = new Chart(store, { label: name, lines: [{ name, color: first, format: figures }], sync, height: HEIGHT, close: true });
        measured[i] ? measured[i].el.replaceWith(chart.el) : (measured[i - 1] ?? charts[0]).el.after(chart.el);
        measured[i] = chart;
      }
      measured[i].set([begin, ...at], [[null, ...row(value)]], Math.max(end, at.at(-1) ?? 0));
    });
    for (const chart of measured.splice(store.curves.length)) {
      chart.destroy();
      chart.el.remove();
    }
  };
  return {
    el, update,
    restyle() { for (const chart of all()) chart.restyle(); },
    destroy() { for (const chart of all()) chart.destroy(); },
  };
}
