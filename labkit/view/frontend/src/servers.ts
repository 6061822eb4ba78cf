// The servers, worst first: a strip of all of them, and a table of which rows are added and moved, never rebuilt.
import type { Context, Panel } from "./context";
import { arrange, h, text } from "./dom";
import { common, faultSliders } from "./faults";
import { SteadyOrder, whyNoControl } from "./server_order";
import { COLUMNS, ServerView } from "./server_row";
import { Strip } from "./server_strip";
import type { Store } from "./store";
import { readTheme } from "./theme";

export const WORST_SHOWN = 50; // rows, unless all are asked for
const MAX_ROWS = 2000; // rows in any case

export function serversPanel(store: Store, ctx: Context): Panel {
  const order = new SteadyOrder();
  const views = new Map<number, ServerView>();
  let all = false;
  let drawn = "";

  const strip = new Strip((server) => reveal(server));
  const everyone = faultSliders("all servers", () => null, ctx);
  const more = h("button", { type: "button", class: "lk-button lk-more", hidden: true, onclick: () => { all = !all; drawn = ""; update(); } });
  const body = h("tbody");
  const table = h("table", { "aria-label": "Servers", class: "lk-servers-table" },
    h("thead", {}, h("tr", {}, ...COLUMNS.map((name) => (name ? h("th", { scope: "col" }, name) : h("td"))))), body);
  const scroller = h("div", { class: "lk-scroll", tabindex: "-1" }, table);
  const keys = h("span", { class: "lk-keys", "aria-hidden": "true" },
    ...["queue", "compute", "network"].map((part) => h("span", {}, h("i", { class: `lk-key lk-part-${part}` }), part)));
  const reach = h("p", { class: "lk-reach lk-waits lk-dim" });
  const el = h("section", { "aria-label": "Servers", class: "lk-panel lk-servers" },
    h("div", { class: "lk-panel-head" }, h("h3", {}, "Servers"), keys, everyone.el), reach, h("div", { class: "lk-strip-box" }, strip.el), scroller, more);

  const touch = () => order.touch(performance.now() / 1000);
  for (const event of ["pointermove", "pointerdown", "keydown", "focusin"]) scroller.addEventListener(event, touch, { passive: true });

  const view = (index: number): ServerView => {
    let one = views.get(index);
    if (!one) views.set(index, (one = new ServerView(index, ctx, () => { drawn = ""; update(); })));
    return one;
  };

  const reveal = (server: number) => {
    if (!body.contains(view(server).el)) all = true;
    drawn = "";
    update();
    view(server).open();
    view(server).el.scrollIntoView({ block: "nearest" });
  };

  const update = () => {
    const rows = store.servers, frame = store.frame;
    text(reach, store.reach.join("\n"));
    const listed = order.next(rows, performance.now() / 1000).slice(0, all ? MAX_ROWS : WORST_SHOWN);
    const slowest = Math.max(1e-9, ...rows.map((row) => (row.latency[1][1] || 0) + (row.latency[2][1] || 0) + (row.latency[3][1] || 0)));
    const elements: Element[] = [];
    for (const index of listed) {
      const one = view(index);
      elements.push(one.el);
      if (one.details) elements.push(one.details.el);
    }
    arrange(body, elements);
    for (const index of listed) view(index).update(rows[index], frame, slowest);
    for (const [index, one] of views) {
      if (index < rows.length) continue;
      one.destroy();
      views.delete(index);
    }
    more.hidden = rows.length <= WORST_SHOWN;
    text(more, all ? `show the worst ${WORST_SHOWN}` : `show all ${rows.length}`);
    const local = rows.filter((row) => row.local >= 0);
    everyone.update(common(local.map((row) => row.injected)), whyNoControl(frame, ctx.replay) || (local.length ? "" : "no server was started here"));
    const key = `${store.revision("servers")} ${scroller.clientWidth}`;
    if (key === drawn || !strip.el.isConnected) return;
    drawn = key;
    strip.draw(rows, readTheme(el));
  };

  return {
    el, update,
    restyle() {
      drawn = "";
      for (const one of views.values()) one.restyle();
      update();
    },
    destroy() {
      everyone.destroy();
      for (const one of views.values()) one.destroy();
    },
  };
}
