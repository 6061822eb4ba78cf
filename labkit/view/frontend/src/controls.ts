// The buttons of a live view: pause it, stop the run, take the dashboard away as a file.
import { actionButton } from "./confirm";
import type { Context, Panel } from "./context";
import { attribute, h, hidden, text } from "./dom";
import { whyNoControl } from "./server_order";
import type { Store } from "./store";

const FORMATS = ["png", "html", "json"] as const;

export function controls(store: Store, ctx: Context, paused: (is: boolean) => void): Panel {
  let pausing = false;
  const pause = h("button", { type: "button", class: "lk-button", onclick: () => {
    pausing = !pausing;
    text(pause, pausing ? "Resume view" : "Pause view");
    pause.classList.toggle("lk-on", pausing);
    paused(pausing);
  } }, "Pause view");
  const stop = actionButton(["Stop run", ""], () => ctx.execute({ do: "stop_run" }), "Really stop the run");
  const exports = FORMATS.map((format) => {
    const el = h("button", { type: "button", class: "lk-button", onclick: () => void fetch() }, hidden("Export "), format.toUpperCase());
    const fetch = async () => {
      if (el.hasAttribute("aria-busy")) return;
      attribute(el, "aria-busy", "true");
      try {
        await ctx.execute({ do: "export", format });
      } catch {
        // the status line has said why
      } finally {
        attribute(el, "aria-busy", null);
      }
    };
    return el;
  });
  const el = h("div", { class: "lk-controls", role: "group", "aria-label": "View and run" }, pause, stop.el,
    h("span", { class: "lk-export" }, h("span", { class: "lk-dim", "aria-hidden": "true" }, "Export"), ...exports));

  const update = () => {
    const frame = store.frame;
    stop.allow(whyNoControl(frame, ctx.replay) || (frame?.headline.running ? "" : "no run is training now"), true);
    const off = !frame || Boolean(frame.lost);
    for (const button of [pause, ...exports]) if (button.disabled !== off) button.disabled = off;
  };
  update();
  return { el, update, destroy: () => stop.destroy() };
}
