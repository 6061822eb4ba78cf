// One server in the table: its row, and the details that open below it.
import { actionButton, type ActionButton } from "./confirm";
import type { Context } from "./context";
import { attribute, h, hidden, text } from "./dom";
import { faultSliders, type Fader } from "./faults";
import { age, CAUSE_WORDS, failures, milliseconds, rate, whole } from "./format";
import { mustAsk, nameOf, STATE_SIGNS, stateText, stateWord, whyNoControl, whyNot, type Deed } from "./server_order";
import { drawSplit } from "./server_strip";
import type { ServerRow } from "./store";
import { readTheme } from "./theme";
import { CAUSES, PERCENTILES, SPLIT, type Frame } from "./types";

export const COLUMNS = ["server", "state", "", "heard", "experts", "copies", "adopted", "calls/s", "queue", "p50 ms", "p95 ms", "p99 ms", "p95 split", "failures"] as const;
const DEEDS: Deed[] = ["kill", "stop", "restart"];
const title = (word: string) => word[0].toUpperCase() + word.slice(1);

export class ServerView {
  readonly el: HTMLTableRowElement;
  details: Details | null = null;
  private row!: ServerRow;
  private name = "";
  private opener: HTMLButtonElement;
  private head: HTMLElement;
  private cells: HTMLTableCellElement[];
  private sign: HTMLElement;
  private state: HTMLElement;
  private parts: HTMLElement[];
  private split: HTMLElement;
  private splitText: HTMLElement;
  private buttons: ActionButton[] = [];
  private buttonCell: HTMLTableCellElement;

  constructor(private index: number, private ctx: Context, private toggled: () => void) {
    this.opener = h("button", { type: "button", class: "lk-opener", "aria-expanded": "false", onclick: () => this.toggle() }, "▸");
    this.head = h("span");
    this.sign = h("span", { "aria-hidden": "true", class: "lk-sign" });
    this.state = h("span");
    this.parts = ["queue", "compute", "network"].map((part) => h("i", { class: `lk-part lk-part-${part}` }));
    this.split = h("div", { class: "lk-split", "aria-hidden": "true" }, ...this.parts);
    this.splitText = hidden("");
    this.cells = COLUMNS.slice(3).map(() => h("td"));
    this.cells[9].replaceChildren(this.split, this.splitText);
    this.cells[10].className = "lk-words";
    this.buttonCell = h("td", { class: "lk-actions" });
    this.el = h("tr", {}, h("th", { scope: "row" }, this.opener, this.head), h("td", { class: "lk-state" }, this.sign, " ", this.state), this.buttonCell, ...this.cells);
  }

  // `slowest`: the longest p95 of the table, which fills the split's bar.
  update(row: ServerRow, frame: Frame | null, slowest: number): void {
    this.row = row;
    const name = nameOf(row, this.index);
    if (name !== this.name) this.rename(name);
    attribute(this.el, "data-state", stateWord(row));
    text(this.sign, STATE_SIGNS[row.state] ?? "?");
    text(this.state, (frame?.lost ? "was " : "") + stateText(row));
    const values = [
      Number.isFinite(row.heard) ? `${age(row.heard)} ago` : "–", `${whole(row.alive)} of ${whole(row.experts)}`, whole(row.copies), whole(row.adopted), rate(row.calls), whole(row.queue),
      ...PERCENTILES.map((_, k) => milliseconds(row.latency[0][k])),
    ];
    values.forEach((value, k) => text(this.cells[k], value));
    text(this.cells[10], failures(row.failed));
    const p95 = [1, 2, 3].map((part) => row.latency[part][1]);
    this.parts.forEach((part, k) => { part.style.width = `${Math.min(100, (100 * (p95[k] || 0)) / slowest).toFixed(1)}%`; });
    const words = `queue ${milliseconds(p95[0])}, compute ${milliseconds(p95[1])}, network ${milliseconds(p95[2])}`;
    text(this.splitText, words);
    attribute(this.cells[9], "title", `p95 in ms: ${words}`);
    this.buttons.forEach((button, k) => button.allow(whyNot(DEEDS[k], row, frame, this.ctx.replay), mustAsk(DEEDS[k], row)));
    this.details?.update(row, frame);
  }

  open(): void { if (!this.details) this.toggle(); }

  restyle(): void { if (this.details) this.details.update(this.row, null, true); }

  destroy(): void {
    for (const button of this.buttons) button.destroy();
    this.details?.destroy();
  }

  private toggle(): void {
    if (this.details) {
      this.details.destroy();
      this.details = null;
    } else this.details = new Details(this.name, () => this.row.local, this.ctx);
    attribute(this.opener, "aria-expanded", String(this.details !== null));
    text(this.opener, this.details ? "▾" : "▸");
    this.toggled();
  }

  private rename(name: string): void {
    this.name = name;
    text(this.head, name);
    attribute(this.head, "title", this.row.address || null);
    attribute(this.opener, "aria-label", `Details of ${name}`);
    for (const button of this.buttons) button.destroy();
    this.buttons = DEEDS.map((deed) => actionButton([title(deed), ` ${name}`], () => this.ctx.execute({ do: deed, server: this.row.local })));
    this.buttonCell.replaceChildren(...this.buttons.map((button) => button.el));
  }
}

class Details {
  readonly el: HTMLTableRowElement;
  private cells: HTMLTableCellElement[][];
  private canvas: HTMLCanvasElement;
  private causes: HTMLElement;
  private where: HTMLElement;
  private faults: Fader;
  private drawn = "";

  constructor(name: string, local: () => number, private ctx: Context) {
    this.cells = SPLIT.map(() => PERCENTILES.map(() => h("td")));
    const order = [1, 2, 3, 0]; // queue, compute, network, total
    const table = h("table", { class: "lk-small", "aria-label": `Latency split of ${name}` },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "ms"), ...PERCENTILES.map((p) => h("th", { scope: "col" }, `p${p}`)))),
      h("tbody", {}, ...order.map((k) => h("tr", {}, h("th", { scope: "row" }, k ? h("i", { class: `lk-key lk-part-${SPLIT[k]}`, "aria-hidden": "true" }) : null, SPLIT[k]), ...this.cells[k]))));
    this.canvas = h("canvas", { role: "img", "aria-label": `latency of ${name}, split into queue, compute and network` });
    this.causes = h("p");
    this.where = h("p", { class: "lk-dim" });
    this.faults = faultSliders(name, local, ctx);
    this.el = h("tr", { class: "lk-details" }, h("td", { colspan: COLUMNS.length },
      h("div", { class: "lk-details-grid" }, table, h("div", { class: "lk-split-canvas" }, this.canvas), h("div", {}, this.where, this.causes), this.faults.el)));
  }

  update(row: ServerRow, frame: Frame | null, again = false): void {
    row.latency.forEach((values, part) => values.forEach((value, k) => text(this.cells[part][k], milliseconds(value))));
    const failed = CAUSES.map((cause, k) => [CAUSE_WORDS[cause], row.failed[k] || 0] as const).filter(([, n]) => n > 0);
    text(this.causes, failed.length ? `Failures: ${failed.map(([cause, n]) => `${cause} ${whole(n)}`).join(", ")}` : "No call failed");
    text(this.where, row.address);
    if (frame) {
      const why = whyNoControl(frame, this.ctx.replay) || (row.local < 0 ? "it was started elsewhere" : "");
      this.faults.update([row.injected[0] || 0, row.injected[1] || 0], why);
    }
    const key = `${row.latency.join()} ${this.canvas.parentElement?.clientWidth}`;
    if ((key === this.drawn && !again) || !this.canvas.isConnected) return;
    this.drawn = key;
    drawSplit(this.canvas, row.latency, readTheme(this.canvas));
  }

  destroy(): void { this.faults.destroy(); }
}
