// @vitest-environment happy-dom
import { describe, expect, it, vi } from "vitest";
import { row, last } from "../src/chart";
import { ASKS_FOR, ConfirmOnce } from "../src/confirm";
import { arrange, h } from "../src/dom";
import { stack } from "../src/failures";
import { age, bytes, clock, failures, figures, milliseconds, rate, whole } from "../src/format";
import { seriesValues } from "../src/store";
import { isDark, lightness } from "../src/theme";
import { CAUSES } from "../src/types";

describe("numbers", () => {
  it("that nobody knows are a dash", () => {
    for (const format of [whole, figures, rate, bytes, milliseconds, age]) expect([format(null), format(NaN)]).toEqual(["–", "–"]);
  });
  it("have three figures", () => {
    expect([0, 0.00001, 0.0123, 0.412, 0.9996, 4.125, 41.26, 412, 4120.4].map(figures))
      .toEqual(["0", "1.0e-5", "0.0123", "0.412", "1.00", "4.13", "41.3", "412", "4,120"]);
  });
  it("are written with their size in mind", () => {
    expect([0, 0.25, 7.44, 9.97, 88.2, 1234].map(rate)).toEqual(["0", "0.25", "7.4", "10", "88", "1,234"]);
    expect([0, 512, 1500, 2.9e6, 3e9].map(bytes)).toEqual(["0 B", "512 B", "1.50 KB", "2.90 MB", "3.00 GB"]);
    expect([0, 0.42, 4.2, 42.4, 4200].map(milliseconds)).toEqual(["0", "0.42", "4.2", "42", "4,200"]);
    expect([-1, 0.31, 12.3, 300, 9000].map(age)).toEqual(["0.0 s", "0.3 s", "12 s", "5 min", "3 h"]);
    expect([0, 7.9, 725, 3725].map(clock)).toEqual(["0:00", "0:07", "12:05", "1:02:05"]);
  });
  it("of failures name the causes, the most frequent first", () => {
    expect(failures([1, 0, 0, 2, 0, 0, 0])).toBe("3 (lost 2, timeout 1)");
    expect(failures([0, 0, 0, 0, 0, 0, 0])).toBe("0");
  });
});

describe("a question before a deed", () => {
  it("is asked once", () => {
    const confirm = new ConfirmOnce();
    expect(confirm.press(0)).toBe(false);
    expect(confirm.asking(1)).toBe(true);
    expect(confirm.press(1)).toBe(true);
    expect(confirm.asking(1)).toBe(false);
    expect(confirm.press(2)).toBe(false);
  });
  it("is forgotten after four seconds", () => {
    const confirm = new ConfirmOnce();
    confirm.press(0);
    expect(confirm.asking(ASKS_FOR)).toBe(false);
    expect(confirm.press(ASKS_FOR)).toBe(false);
  });
  it("is not answered by a double click", () => {
    const confirm = new ConfirmOnce();
    confirm.press(0);
    expect(confirm.press(0.1, true)).toBe(false);
    expect(confirm.press(1)).toBe(true);
  });
});

describe("a line", () => {
  const values = Float32Array.from([1, NaN, 3, NaN, NaN, NaN, NaN, 8]);
  it("has gaps where nothing is known", () => {
    expect(row(values)).toEqual([1, null, 3, null, null, null, null, 8]);
  });
  it("bridges short gaps if it is told to, and no long ones", () => {
    expect(row(values, true)).toEqual([1, undefined, 3, null, null, null, null, 8]);
  });
  it("ends with the last value that is known", () => {
    expect(last([1, 2, null, undefined])).toBe(2);
    expect(last([])).toBeNull();
  });
});

it("bars stand on each other, without the causes that are filtered out", () => {
  const values = seriesValues(2);
  values.timeout.set([1, 2]);
  values.lost.set([10, NaN]);
  const all = stack(values, new Set(CAUSES));
  expect([all[0], all[CAUSES.length - 1]]).toEqual([[1, 2], [11, 2]]);
  expect(stack(values, new Set(["lost"] as const))[CAUSES.length - 1]).toEqual([10, 0]);
});

it("rows are moved, not made anew, and the focus stays", () => {
  const [a, b, c, d] = ["a", "b", "c", "d"].map((id) => h("button", { id }));
  const parent = document.body.appendChild(h("div", {}, a, b, c));
  a.focus();
  arrange(parent, [c, d, a]);
  expect([...parent.children]).toEqual([c, d, a]);
  expect(document.activeElement).toBe(a);
});

describe("light or dark", () => {
  it("is what JupyterLab says", () => {
    const lab = document.body.appendChild(h("div", { "data-jp-theme-light": "false" }, h("i")));
    expect(isDark(lab.firstElementChild!)).toBe(true);
    lab.setAttribute("data-jp-theme-light", "true");
    expect(isDark(lab.firstElementChild!)).toBe(false);
  });
  it("is what VS Code says", () => {
    document.body.className = "vscode-dark";
    expect(isDark(document.body)).toBe(true);
    document.body.className = "vscode-light";
    expect(isDark(document.body)).toBe(false);
    document.body.className = "";
  });
  it("is what the system says, on a page of its own, unless the address says otherwise", () => {
    vi.stubGlobal("matchMedia", () => ({ matches: true }));
    const page = document.body.appendChild(h("div", { "data-jp-theme-light": "true" }));
    expect(isDark(page)).toBe(false);
    expect(isDark(page, true)).toBe(true);
    history.replaceState(null, "", "?token=1&theme=light");
    expect(isDark(page, true)).toBe(false);
    history.replaceState(null, "", "?");
    vi.unstubAllGlobals();
  });
  it("is read from a colour", () => {
    expect(lightness("#fff")).toBe(1);
    expect(lightness("#111111")).toBeLessThan(0.1);
    expect(lightness("rgb(255, 255, 255)")).toBe(1);
    expect(lightness("var(--x)")).toBeNull();
  });
});
