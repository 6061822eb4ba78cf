// The expert that was clicked: what is known of it.
import { STATE_WORDS } from "./binning";
import type { Context, Panel } from "./context";
import { attribute, h, text } from "./dom";
import { whole } from "./format";
import { uidOf } from "./grid";
import { valueText } from "./scales";
import { NOWHERE } from "./store";
import type { Store } from "./store";

const NAMES = ["server", "state", "calls", "failed", "mean latency", "load", "updates", "staleness", "failures lately"] as const;

// The texts of one expert, by NAMES; null if there is none at that row.
export function details(store: Store, row: number): { uid: string; texts: Record<(typeof NAMES)[number], string> } | null {
  const { experts } = store;
  if (!(row >= 0 && row < experts.n)) return null;
  const layer = store.layers[experts.layer[row]], cell = experts.cell[row], server = store.servers[experts.server[row]];
  return {
    uid: layer && cell !== NOWHERE ? uidOf(layer, cell) : "…",
    texts: {
      server: server ? server.label || server.address || "…" : "not known",
      state: (store.lost && "was ") + (STATE_WORDS[experts.state[row]] ?? "not known"),
      calls: whole(experts.calls[row]),
      failed: whole(experts.failed[row]),
      "mean latency": valueText("latency", experts.latency[row]),
      load: valueText("load", experts.load[row]),
      updates: whole(experts.updates[row]),
      staleness: valueText("staleness", experts.staleness[row]),
      "failures lately": valueText("failures", experts.failures[row]),
    },
  };
}

export function detailPanel(store: Store, ctx: Context): Panel {
  const title = h("h4", { class: "lk-uid" }), none = h("p", { class: "lk-empty" }, "None is selected.");
  const values = NAMES.map((name) => ({ name, el: h("dd") }));
  const list = h("dl", {}, ...values.map(({ name, el }) => h("div", { class: "lk-pair" }, h("dt", {}, name), el)));
  const close = h("button", { type: "button", class: "lk-button", "aria-label": "Deselect", title: "Deselect", onclick: () => ctx.select(-1) }, "×");
  const el = h("section", { "aria-label": "Expert", class: "lk-panel lk-detail" },
    h("div", { class: "lk-panel-head" }, h("h3", {}, "Expert"), title, close), none, list);
  const update = () => {
    const found = details(store, ctx.selected);
    none.hidden = Boolean(found);
    for (const one of [list, title, close]) one.hidden = !found;
    if (!found) return;
    text(title, found.uid);
    for (const { name, el } of values) text(el, found.texts[name]);
    attribute(list, "data-state", found.texts.state);
  };
  ctx.onSelect(update);
  update();
  return { el, update, destroy() {} };
}
