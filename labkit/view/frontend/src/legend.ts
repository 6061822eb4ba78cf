// The legend of the heat map: the scale with its unit, and what the shapes mean.
import { h, pen, text } from "./dom";
import { ADOPTED, gradient, neutral, paintSample } from "./paint";
import type { Look } from "./paint";
import { MODE_INFO, css, shareOf, tickText, ticks } from "./scales";
import { ALIVE, DEAD, SUSPECT, UNCLAIMED } from "./types";

const SIZE = 14; // of a sample, pixels
const SHAPES: [state: number, word: string][] = [[SUSPECT, "suspect"], [DEAD, "dead"], [UNCLAIMED, "unclaimed"], [ALIVE, "no value yet"], [ADOPTED, "adopted"]];

export interface Legend { el: HTMLElement; show(look: Look): void }

export function makeLegend(): Legend {
  const bar = h("div", { class: "lk-scale-bar" }), marks = h("div", { class: "lk-scale-ticks" }), unit = h("span", { class: "lk-scale-unit" });
  const samples = SHAPES.map(([state, word]) => ({ state, canvas: h("canvas", { class: "lk-sample", "aria-hidden": "true" }), word }));
  const el = h("div", { class: "lk-legend" },
    h("div", { class: "lk-scale" }, h("div", { class: "lk-scale-body" }, bar, marks), unit),
    h("div", { class: "lk-samples" }, ...samples.map(({ canvas, word }) => h("span", {}, canvas, word))));
  let shown = "";
  return {
    el,
    show(look) {
      const { mode, domain, theme } = look, key = JSON.stringify([mode, { ...domain, most: domain.most > domain.high }, theme, window.devicePixelRatio]);
      if (key === shown) return;
      shown = key;
      bar.style.background = gradient(mode, theme.dark);
      text(unit, MODE_INFO[mode].unit);
      marks.replaceChildren(...ticks(domain).map((value) => {
        const tick = h("span", {}, tickText(mode, value, domain));
        tick.style.left = `${(shareOf(domain, value) * 100).toFixed(2)}%`;
        return tick;
      }));
      for (const { state, canvas } of samples) {
        canvas.style.width = canvas.style.height = `${SIZE}px`;
        const context = pen(canvas, SIZE, SIZE);
        if (!context) continue;
        if (state === ALIVE) { // paintSample would do, but for the line between neighbours
          context.fillStyle = css(neutral(theme));
          context.fillRect(0, 0, SIZE - 1, SIZE - 1);
        } else paintSample(context, state, domain.low + (domain.high - domain.low) * 0.6, SIZE, look);
      }
    },
  };
}
