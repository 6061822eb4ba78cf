// The table behind the heat map, for screen readers and tests: a row per shown cell.
import { binName, stateText } from "./binning";
import type { Bins } from "./binning";
import { attribute, h, text } from "./dom";
import type { Plane } from "./grid";
import { MODE_INFO, valueText } from "./scales";
import { UNCLAIMED } from "./types";
import type { Layer, Mode } from "./types";

export interface ExpertsTable { el: HTMLElement; show(layer: Layer | undefined, plane: Plane, slices: Bins[], mode: Mode, was: string): void }

export function makeExpertsTable(): ExpertsTable {
  const body = h("tbody"), value = h("th", { scope: "col" });
  const table = h("table", { "aria-label": "Experts" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "expert"), h("th", { scope: "col" }, "state"), value)), body);
  const el = h("div", { class: "lk-hidden" }, table);
  el.style.contain = "strict"; // its thousands of rows never move anything else
  table.style.tableLayout = "fixed";
  const rows: Row[] = [];
  return {
    el,
    show(layer, plane, slices, mode, was) {
      text(value, `${MODE_INFO[mode].title.toLowerCase()}, ${MODE_INFO[mode].unit}`);
      let used = 0;
      if (layer) for (const bins of slices) for (let at = 0; at < bins.state.length; at++) {
        const name = binName(layer, plane, bins, at);
        if (!name) continue;
        if (used === rows.length) rows.push(makeRow());
        const row = rows[used++];
        if (!row.el.parentNode) body.append(row.el);
        write(row, name, was + stateText(bins, at), bins.state[at] === UNCLAIMED ? "–" : valueText(mode, bins.value[at]));
      }
      for (const row of rows.splice(used)) row.el.remove();
      attribute(table, "aria-rowcount", used + 1);
    },
  };
}

interface Row { el: HTMLElement; cells: HTMLElement[]; said: string[] }

function makeRow(): Row {
  const cells = [h("th", { scope: "row" }), h("td"), h("td")];
  return { el: h("tr", {}, ...cells), cells, said: [] };
}

function write({ cells, said }: Row, ...texts: string[]): void {
  texts.forEach((text, i) => {
    if (said[i] !== text) cells[i].textContent = said[i] = text;
  });
}
