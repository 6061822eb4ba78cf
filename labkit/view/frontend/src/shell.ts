// The dashboard as one element: what is always in sight on top, the panels below, and who draws when. Live and replay
// give it what differs: the controls, what a status line says, and what it is to be seen.
import type { Context, MakePanel, Panel } from "./context";
import { attribute, h, text } from "./dom";
import { detailPanel } from "./detail";
import { failuresPanel } from "./failures";
import { headlinePanel } from "./headline";
import { heatmapPanel } from "./heatmap";
import { serversPanel } from "./servers";
import type { Store } from "./store";
import { isDark, readTheme, watchTheme } from "./theme";
import { trainingPanel } from "./training";

export interface Parts {
  controls(redraw: () => void): Panel;
  status(): string;
  seen(is: boolean): void; // whether any of it can be seen
  frozen(): boolean; // paused: what comes is not drawn
  scrolls: boolean; // whether it keeps within the window, and scrolls by itself
  alone?: boolean; // whether the page is its own, and takes its colours from it
}

const TICK = 250; // ms between two looks at the clock
const GROUNDS = ["background", "--jp-layout-color0", "--jp-layout-color1"]; // what a page around us may be painted with
const THEME_SETTLES_AFTER = 500; // ms after a change of theme, when its colours have surely come
const PANELS: Record<string, MakePanel> = {
  routing: heatmapPanel, expert: detailPanel, training: trainingPanel, failures: failuresPanel, servers: serversPanel,
};

export function shell(place: HTMLElement, store: Store, ctx: Context, parts: Parts): { root: HTMLElement; draw(): void; destroy(): void } {
  const status = h("p", { role: "status", class: "lk-status" });
  const headline = headlinePanel(store, ctx);
  let asked = 0, visible = false, broken = false, lost = "";

  const draw = () => {
    asked = 0;
    if (!store.frame) return;
    body.hidden = false;
    lost = store.lost;
    attribute(root, "aria-label", `labkit dashboard of swarm ${store.frame.swarm}`);
    text(name, store.frame.swarm);
    root.classList.toggle("lk-closed", !store.frame.open);
    root.classList.toggle("lk-lost", Boolean(store.frame.lost));
    for (const panel of all) guarded(() => panel.update());
    tick();
  };
  const redraw = () => { asked ||= requestAnimationFrame(draw); };
  // A panel that fails leaves the others alone.
  const guarded = (work: () => void) => {
    try {
      work();
    } catch (error) {
      if (!broken) console.error("labkit dashboard:", error);
      broken = true;
    }
  };

  const controls = parts.controls(redraw);
  const panels = Object.entries(PANELS).map(([kind, make]) => {
    const panel = make(store, ctx);
    panel.el.classList.add("lk-panel", `lk-${kind}`);
    return panel;
  });
  const all: Panel[] = [headline, controls, ...panels];
  const body = h("div", { class: "lk-body", hidden: true }, ...panels.map((panel) => panel.el));
  const name = h("strong", { class: "lk-name" });
  const saves = h("span", { class: "lk-saves" });
  // JupyterLab would take Enter, arrows and letters that are meant for our buttons and sliders as shortcuts of the notebook.
  const root = h("section", { class: "lk", role: "region", "aria-label": "labkit dashboard" },
    h("div", { class: "lk-top" },
      h("div", { class: "lk-bar" }, h("span", { class: "lk-brand" }, "labkit ", name), status, saves, controls.el), headline.el), body);
  if (parts.scrolls && window.parent === window) root.classList.add("lk-scrolls");
  if (parts.alone) root.classList.add("lk-alone");

  const tick = () => {
    const line = parts.status();
    text(status, line);
    attribute(status, "title", line || null);
    headline.tick(performance.now());
  };
  const colour = () => {
    attribute(root, "data-theme", isDark(place, parts.alone) ? "dark" : "light");
    return readTheme(root);
  };
  // Pages change their classes often; only other colours are a reason to draw everything anew. Some load them a little later.
  let styled = "", late = 0;
  const restyle = () => {
    const theme = colour(), style = JSON.stringify(theme);
    if (style === styled) return;
    styled = style;
    if (parts.alone) for (const property of GROUNDS) document.body.style.setProperty(property, theme.ground);
    for (const panel of all) guarded(() => panel.restyle?.());
    redraw();
  };
  const turned = () => {
    restyle();
    clearTimeout(late);
    late = window.setTimeout(restyle, THEME_SETTLES_AFTER);
  };
  const look = (is: boolean) => {
    if (visible === is) return;
    visible = is;
    parts.seen(is);
    if (is) restyle(); // when it was made, it need not have been in the page, whose colours it takes
  };

  // Keys pressed on a control here are its own: JupyterLab moves between cells by arrows, and cuts one at an "x".
  root.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation(); });
  place.append(root);
  colour();
  const stops = [
    store.subscribe(() => { if (visible && (!parts.frozen() || store.lost !== lost)) redraw(); }),
    watchTheme(turned),
    () => clearTimeout(late),
    watchSight(root, look),
    every(TICK, () => { if (visible) tick(); }),
  ];
  ctx.onSelect(redraw);
  tick();
  redraw();

  return {
    root, draw: redraw,
    destroy() {
      for (const stop of stops) stop();
      cancelAnimationFrame(asked);
      for (const panel of all) guarded(() => panel.destroy());
      root.remove();
    },
  };
}

function every(ms: number, work: () => void): () => void {
  const timer = setInterval(work, ms);
  return () => clearInterval(timer);
}

function watchSight(el: Element, onSight: (is: boolean) => void): () => void {
  if (typeof IntersectionObserver !== "function") {
    onSight(true);
    return () => {};
  }
  const observer = new IntersectionObserver((entries) => onSight(entries[entries.length - 1].isIntersecting));
  observer.observe(el);
  return () => observer.disconnect();
}

// What panels of one view share: what is looked at, and which expert was picked.
export function makeContext(fields: Pick<Context, "execute" | "view" | "setView" | "say" | "replay">): Context {
  const listeners: (() => void)[] = [];
  return {
    ...fields,
    selected: -1,
    select(expert) {
      this.selected = expert;
      for (const listener of listeners) listener();
    },
    onSelect(listener) { listeners.push(listener); },
  };
}
