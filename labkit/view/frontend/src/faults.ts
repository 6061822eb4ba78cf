// Sliders for injected latency and loss, of one server or of all.
import type { Context } from "./context";
import { attribute, h, text } from "./dom";

export const LATENCIES = [0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]; // seconds
export const LOSSES = [0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]; // share of the requests
const DEBOUNCE = 200; // ms
const SETTING_STANDS_FOR = 2000; // ms for which the user's own setting stands, whatever the kernel still reports

// Index of the step that is nearest to a value; the distance is relative, as the steps are.
export function nearest(steps: readonly number[], value: number): number {
  if (!(value > 0)) return 0;
  let best = 0;
  for (let i = 1; i < steps.length; i++) {
    const far = (k: number) => Math.abs(Math.log((steps[k] || steps[1] / 4) / value));
    if (far(i) < far(best)) best = i;
  }
  return best;
}

export const latencyText = (seconds: number): string => (!seconds ? "none" : seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds} s`);
export const lossText = (share: number): string => (!share ? "none" : `${Math.round(share * 100)} %`);

export interface Fader {
  el: HTMLElement;
  update(injected: [number, number], why: string): void; // NaN: not the same everywhere, or not known
  destroy(): void;
}

interface One { el: HTMLElement; update(value: number, why: string): void; destroy(): void }

function slider(label: string, word: string, steps: readonly number[], format: (value: number) => string, send: (value: number) => void): One {
  let timer = 0, mine = -Infinity, due = () => {};
  const said = h("output", { class: "lk-slider-value" }, format(0));
  const input = h("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: 0, "aria-label": label, "aria-valuetext": format(0) });
  const el = h("label", { class: "lk-slider" }, h("span", {}, word), input, said);
  const say = (value: string) => {
    text(said, value);
    attribute(input, "aria-valuetext", value);
  };
  input.addEventListener("input", () => {
    mine = performance.now();
    const value = steps[Number(input.value)] ?? 0;
    say(format(value));
    clearTimeout(timer);
    due = () => { due = () => {}; send(value); };
    timer = window.setTimeout(() => due(), DEBOUNCE);
  });
  return {
    el,
    update(value, why) {
      if (input.disabled !== (why !== "")) input.disabled = why !== "";
      attribute(el, "title", why || null);
      if (performance.now() - mine < SETTING_STANDS_FOR) return;
      const step = String(nearest(steps, value));
      if (input.value !== step) input.value = step;
      say(Number.isNaN(value) ? "mixed" : format(value));
    },
    destroy() { clearTimeout(timer); due(); }, // what was set last is still to be sent
  };
}

// `server`: its local index; null: all of them.
export function faultSliders(name: string, server: () => number | null, ctx: Context): Fader {
  const inject = (latency: number | null, loss: number | null) =>
    void ctx.execute({ do: "faults", server: server(), latency, loss }).catch(() => {}); // the status line has said why
  const latency = slider(`Latency of ${name}`, "inject latency", LATENCIES, latencyText, (value) => inject(value, null));
  const loss = slider(`Loss of ${name}`, "loss", LOSSES, lossText, (value) => inject(null, value));
  return {
    el: h("div", { class: "lk-sliders", role: "group", "aria-label": `Injected faults of ${name}` }, latency.el, loss.el),
    update([seconds, share], why) {
      latency.update(seconds, why);
      loss.update(share, why);
    },
    destroy() {
      latency.destroy();
      loss.destroy();
    },
  };
}

// What all have in common; NaN where they differ. Servers of which nothing is known count as having none.
export function common(injected: readonly [number, number][]): [number, number] {
  const same = (k: 0 | 1) => {
    const values = new Set(injected.map((one) => (Number.isFinite(one[k]) ? one[k] : 0)));
    return values.size > 1 ? NaN : ([...values][0] ?? 0);
  };
  return [same(0), same(1)];
}
