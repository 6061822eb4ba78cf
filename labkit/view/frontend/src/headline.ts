// The numbers that are always in sight, and how old they are.
import type { Context, Panel } from "./context";
import { attribute, h, text } from "./dom";
import { age, bytes, clock, figures, NOTHING, rate, whole } from "./format";
import type { Store } from "./store";
import type { Frame } from "./types";

interface Tile { el: HTMLElement; value: HTMLElement; label: HTMLElement }

// `first`: whether the label is read before the number ("step 120 of 500"); it is always drawn below it.
function tile(name: string, labelFirst = false): Tile {
  const value = h("span", { class: "lk-value" }, NOTHING), label = h("span", { class: "lk-label" }, name);
  const el = labelFirst ? h("div", { class: "lk-tile" }, label, " ", value) : h("div", { class: "lk-tile" }, value, " ", label);
  return { el, value, label };
}

export function headlinePanel(store: Store, ctx: Context): Panel & { tick(now: number): void } {
  const experts = tile("experts"), risk = tile("at risk"), servers = tile("servers"), step = tile("step", true), loss = tile("loss", true);
  const samples = tile("samples/s"), calls = tile("calls/s"), traffic = tile("B/s"), flight = tile("in flight"), failed = tile("failed");
  const seen = h("span", { class: "lk-age", "data-age": "" }, "");
  const bar = h("div", { class: "lk-progress", "aria-hidden": "true" });
  const tiles = [experts, risk, servers, step, loss, samples, calls, traffic, flight, failed].flatMap((one) => [one.el, " "]);
  const el = h("section", { "aria-label": "Headline", class: "lk-headline" }, ...tiles, h("div", { class: "lk-tile lk-tile-age" }, seen), bar);

  const update = () => {
    const frame = store.frame;
    if (!frame) return;
    const n = frame.headline;
    const alive = (count: number) => (frame.lost ? "?" : whole(count));
    text(experts.value, `${alive(n.experts_alive)} of ${whole(n.experts)}`);
    text(servers.value, `${alive(n.servers_alive)} of ${whole(n.servers)}`);
    experts.el.classList.toggle("lk-bad", n.experts_alive < n.experts);
    risk.el.hidden = n.at_risk === null;
    text(risk.value, whole(n.at_risk));
    risk.el.classList.toggle("lk-bad", n.at_risk! > 0);
    servers.el.classList.toggle("lk-bad", n.servers_alive < n.servers);
    text(step.value, n.total_steps ? `${whole(n.steps)} of ${whole(n.total_steps)}` : n.steps ? whole(n.steps) : NOTHING);
    text(loss.value, figures(n.loss));
    text(samples.value, rate(n.samples));
    text(calls.value, rate(n.calls));
    const [amount, unit] = bytes(n.bytes).split(" ");
    text(traffic.value, amount);
    text(traffic.label, `${unit ?? "B"}/s`);
    text(flight.value, whole(n.in_flight));
    const failures = frame.source === "calls" ? Object.values(n.failed).reduce((sum, count) => sum + (count ?? 0), 0) : NaN;
    text(failed.value, whole(failures));
    failed.el.classList.toggle("lk-bad", failures > 0);
    attribute(failed.el, "title", failedTitle(frame));
    bar.style.setProperty("--done", String(n.total_steps ? Math.min(1, n.steps / n.total_steps) : 0));
    bar.classList.toggle("lk-running", n.running && !frame.lost);
  };

  const tick = (now: number) => {
    if (!store.frame) return;
    if (ctx.replay) {
      text(seen, `at ${clock(ctx.cursor ?? 0)} of ${clock(ctx.duration ?? 0)}`);
      return;
    }
    const seconds = Math.max(0, (now - store.receivedAt) / 1000);
    attribute(seen, "data-age", seconds.toFixed(1));
    text(seen, `view ${age(seconds)} old`);
    seen.classList.toggle("lk-bad", seconds > 3 && store.frame.open);
  };

  return { el, update, tick, destroy() {} };
}

function failedTitle(frame: Frame): string {
  const rows = frame.headline.unanswered_rows;
  if (frame.source === "servers") return `no call was made from here, so it is not known how many failed; ${whole(frame.headline.answered)} were answered`;
  return `calls that failed since the start, of ${whole(frame.headline.answered)} answered${rows ? `; ${whole(rows)} rows of a batch were left without an answer` : ""}`;
}
