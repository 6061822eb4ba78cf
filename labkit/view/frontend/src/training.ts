// How training goes: loss, throughput, traffic, what is in flight, and how stale gradients are.
import { Chart, row, times, type Line } from "./chart";
import type { Context, Panel } from "./context";
import { h } from "./dom";
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
  const el = h("section", { "aria-label": "Training", class: "lk-panel lk-training" },
    h("h3", {}, "Training"), h("div", { class: "lk-charts" }, ...charts.map((chart) => chart.el)));
  let drawn = -1;

  const update = () => {
    const revision = store.revision("series", "marks");
    if (revision === drawn) return;
    drawn = revision;
    const xs = times(store.series);
    PLANS.forEach(({ columns }, i) => {
      const rows = columns.map((name) => row(store.series.values[name], name === "loss" || name === "staleness"));
      charts[i].set(xs, rows, ctx.duration);
    });
  };
  return {
    el, update,
    restyle() { for (const chart of charts) chart.restyle(); },
    destroy() { for (const chart of charts) chart.destroy(); },
  };
}
