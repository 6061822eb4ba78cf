import { describe, expect, it } from "vitest";
import { colour, css, domainOf, niceAbove, niceBelow, rampOf, settle, shareOf, textOn, tickText, ticks, valueText } from "../src/scales";
import type { Rgb } from "../src/scales";
import { MODES } from "../src/types";

const light = ([r, g, b]: Rgb) => [r, g, b].map((v) => (v / 255) ** 2.2).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a: number, b: number) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);

describe("colours", () => {
  it.each(MODES.flatMap((mode) => [[mode, false], [mode, true]] as const))("of %s (dark: %s) grow steadily lighter or darker, so that they read in grey", (mode, dark) => {
    const steps = Array.from({ length: 65 }, (_, i) => light(colour(rampOf(mode, dark), i / 64)));
    const signs = new Set(steps.slice(1).map((value, i) => Math.sign(value - steps[i])));
    expect(signs.size).toBe(1);
    expect(contrast(steps[0], steps[64])).toBeGreaterThan(5);
  });

  it("at the ends are the ramp's, and beyond them too", () => {
    const stops = rampOf("load", false);
    expect([colour(stops, 0), colour(stops, 1), colour(stops, 7), colour(stops, NaN)]).toEqual([stops[0], stops[15], stops[15], stops[0]]);
    expect(css([1, 2, 3])).toBe("rgb(1,2,3)");
  });

  it("carry text that can be read", () => {
    for (const mode of MODES) for (let i = 0; i <= 64; i++) {
      const ground = colour(rampOf(mode, false), i / 64);
      expect(contrast(light(ground), textOn(ground) === "#fff" ? 1 : 0)).toBeGreaterThan(4.3);
    }
  });
});

describe("domains", () => {
  it("begin at nothing and end at a round number, but for latency, whose scale is logarithmic", () => {
    expect(domainOf("load", [3, 17, NaN, 0])).toEqual({ log: false, low: 0, high: 20, most: 17 });
    expect(domainOf("staleness", [2.2])).toMatchObject({ low: 0, high: 5 });
    expect(domainOf("latency", [3.4, 47, NaN])).toEqual({ log: true, low: 2, high: 50, most: 47 });
  });

  it("are never empty, even with nothing known, and a little noise is not a blaze", () => {
    for (const mode of MODES) {
      for (const values of [[], [NaN, NaN], [0], [Infinity, -3]]) {
        const { low, high } = domainOf(mode, values);
        expect(high).toBeGreaterThan(low);
      }
    }
    expect(domainOf("failures", [0.001]).high).toBeCloseTo(0.05);
    expect(domainOf("failures", [0.93]).high).toBe(1);
    expect(domainOf("latency", [4, 4])).toMatchObject({ low: 2, high: 10 });
  });

  it("of many values let the few busiest lie above, and the legend says so", () => {
    const values = Array.from({ length: 1000 }, (_, i) => (i < 10 ? 5000 : i % 40)), domain = domainOf("load", values);
    expect(domain).toMatchObject({ high: 50, most: 5000 });
    expect(tickText("load", 50, domain)).toBe("50+");
    expect(tickText("load", 40, domain)).toBe("40");
    expect(domainOf("load", values.slice(0, 20)).high).toBe(5000);
  });

  it("stay while they fit, so that colours do not flicker", () => {
    const before = domainOf("load", [90]);
    expect(settle(before, domainOf("load", [41]))).toMatchObject({ high: 100, most: 41 });
    expect(settle(before, domainOf("load", [120])).high).toBe(200);
    expect(settle(before, domainOf("load", [8])).high).toBe(10);
    expect(settle(before, domainOf("latency", [8])).log).toBe(true);
  });

  it("put values between their ends", () => {
    const linear = domainOf("load", [100]), log = { log: true, low: 1, high: 100, most: 100 };
    expect([0, 25, 100, 300].map((value) => shareOf(linear, value))).toEqual([0, 0.25, 1, 1]);
    expect([0, 1, 10, 100].map((value) => shareOf(log, value))).toEqual([0, 0, 0.5, 1]);
    expect(shareOf(linear, NaN)).toBeNaN();
  });
});

describe("ticks", () => {
  it.each([[{ log: false, low: 0, high: 20 }, [0, 5, 10, 15, 20]], [{ log: false, low: 0, high: 0.05 }, [0, 0.01, 0.02, 0.03, 0.04, 0.05]],
    [{ log: true, low: 2, high: 50 }, [2, 5, 10, 20, 50]], [{ log: true, low: 0.01, high: 10000 }, [0.01, 0.1, 1, 10, 100, 1000, 10000].filter((_, i) => i % 2 === 0)]])(
    "of %j are few and round", (domain, expected) => expect(ticks({ ...domain, most: 0 })).toEqual(expected));

  it("end where a linear scale ends, for any size", () => {
    for (let power = -3; power < 9; power++) for (const nice of [1, 2, 5]) {
      const high = Number((nice * 10 ** power).toPrecision(6)), found = ticks({ log: false, low: 0, high, most: high });
      expect(found.length).toBeGreaterThan(3);
      expect(found.length).toBeLessThan(8);
      expect(found.at(-1)).toBeCloseTo(high, 9);
    }
  });

  it("are 1, 2 and 5 times powers of ten", () => {
    expect([0.3, 1, 1.01, 99, 1000].map(niceAbove)).toEqual([0.5, 1, 2, 100, 1000]);
    expect([0.3, 1, 1.99, 99, 1000].map(niceBelow)).toEqual([0.2, 1, 1, 50, 1000]);
  });
});

describe("texts", () => {
  it("have the unit, and say when nothing is known", () => {
    expect(valueText("load", 12.4)).toBe("12 rows/s");
    expect(valueText("latency", 3.42)).toBe("3.4 ms");
    expect(valueText("failures", 0.125)).toBe("12.5 % of calls");
    expect(valueText("staleness", NaN)).toBe("no value yet");
    expect(tickText("failures", 0.05, { log: false, low: 0, high: 1, most: 1 })).toBe("5");
  });
});
