// From a value of the heat map to a colour, a tick of the legend and a text. Lightness grows, or falls, evenly along each
// ramp, so that it reads in grey and with any colour vision.
import { figures, milliseconds, rate } from "./format";
import type { Mode } from "./types";

export type Rgb = [red: number, green: number, blue: number];
export interface Domain { log: boolean; low: number; high: number; most: number } // most: the largest value, which may lie above

interface ModeInfo { title: string; unit: string; log: boolean; least: number; text(value: number): string }

// least: what the scale's end never goes below, so that a little noise does not look like a blaze
export const MODE_INFO: Record<Mode, ModeInfo> = {
  load: { title: "Load", unit: "rows/s", log: false, least: 1, text: rate },
  latency: { title: "Latency", unit: "ms", log: true, least: 0.01, text: milliseconds },
  failures: { title: "Failures", unit: "% of calls", log: false, least: 0.05, text: (share) => String(Math.round(share * 1000) / 10) },
  staleness: { title: "Staleness", unit: "updates", log: false, least: 1, text: figures },
};

const MANY = 64;

const PLAIN = ramp(
  "1b2456 1e3261 21406c 234e78 255d81 2a6c84 2f7c87 348c89 469b88 5fa882 76b67b 8dc371 a6cf77 c0d983 d9e48f f2ee9b");
const TROUBLE = ramp("f6ede9 efcec2 e5b09c db9179 cf705c c14e3e a8342e 8a2026 6d0a1e");
const TROUBLE_DARK = ramp("2d2a2e 523436 773d3d 9c4644 bc554b de6350 f08067 f9a287 ffc3a6");

function ramp(stops: string): Rgb[] {
  return stops.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)) as Rgb);
}

export function rampOf(mode: Mode, dark: boolean): readonly Rgb[] {
  return mode === "failures" ? (dark ? TROUBLE_DARK : TROUBLE) : PLAIN;
}

// The colour at `share` (0 to 1) of a ramp.
export function colour(stops: readonly Rgb[], share: number): Rgb {
  const at = Math.max(0, Math.min(1, share || 0)) * (stops.length - 1), below = Math.min(stops.length - 2, Math.floor(at));
  return stops[below].map((from, i) => Math.round(from + (stops[below + 1][i] - from) * (at - below))) as Rgb;
}

export const css = ([red, green, blue]: Rgb): string => `rgb(${red},${green},${blue})`;

// Black or white, whichever is read more easily on a colour (WCAG's relative luminance).
export function textOn(rgb: Rgb): string {
  const [r, g, b] = rgb.map((value) => (value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// The domain in which these values lie, its ends round. NaN is passed over; with nothing known it is as small as may be.
// Of many values the topmost fiftieth may lie above a linear scale, or one busy expert would make all others look idle.
export function domainOf(mode: Mode, all: Iterable<number>): Domain {
  const { log, least } = MODE_INFO[mode];
  const values = Float32Array.from(all).filter((value) => value >= 0 && value < Infinity && !(log && value === 0)).sort();
  const most = values.length ? values[values.length - 1] : 0;
  if (!log) {
    const top = values.length >= MANY ? values[Math.floor(values.length * 0.98)] : most, high = niceAbove(Math.max(top, least));
    return { log, low: 0, high: mode === "failures" ? Math.min(1, high) : high, most };
  }
  if (most < least) return { log, low: least, high: 10 * least, most };
  const bottom = niceBelow(Math.max(values[0], least));
  return { log, low: bottom, high: Math.max(niceAbove(most), niceAbove(bottom * 4.5)), most };
}

// The domain to draw with: the one before, as long as the fresh one fills most of it, so that colours do not flicker.
export function settle(before: Domain | null, fresh: Domain): Domain {
  if (!before || before.log !== fresh.log || fresh.high > before.high || fresh.low < before.low) return fresh;
  return shareOf(before, fresh.high) - shareOf(before, fresh.low) >= 0.4 ? { ...before, most: fresh.most } : fresh;
}

// Where a value lies between the ends: 0 to 1; NaN for NaN.
export function shareOf({ log, low, high }: Domain, value: number): number {
  if (Number.isNaN(value)) return NaN;
  const share = log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
  return Math.max(0, Math.min(1, share));
}

// Three to six round values from end to end, for the legend.
export function ticks({ log, low, high }: Domain): number[] {
  if (log) {
    const all = [low];
    while (nextNice(all[all.length - 1]) <= high * 1.0001 && all.length < 64) all.push(nextNice(all[all.length - 1]));
    if (all.length <= 6) return all;
    const decades = all.filter((value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6);
    const step = Math.ceil(decades.length / 6);
    return decades.filter((_, i) => i % step === 0);
  }
  const step = niceAbove((high - low) / 5), found = [];
  for (let i = 0; low + i * step <= high * 1.0001; i++) found.push(Number((low + i * step).toPrecision(12)));
  return found;
}

const NICE = [1, 2, 5, 10];

// The smallest 1, 2 or 5 × 10ⁿ that is not below a positive value; and the largest that is not above it.
export function niceAbove(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return round(NICE.find((nice) => nice * power >= value * 0.999999)! * power);
}
export function niceBelow(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value) + 1e-9);
  return round([...NICE].reverse().find((nice) => nice * power <= value * 1.000001)! * power);
}
const nextNice = (value: number) => niceAbove(value * 1.5);
const round = (value: number) => Number(value.toPrecision(6));

// `12 rows/s`, `3.4 ms`, `12 % of calls`, `no value yet`.
export function valueText(mode: Mode, value: number): string {
  const { unit, text } = MODE_INFO[mode];
  return Number.isNaN(value) ? "no value yet" : `${text(value)} ${unit}`;
}

// `500`, and `500+` at the end of a scale that some values lie above.
export function tickText(mode: Mode, value: number, { high, most }: Domain): string {
  const text = (mode === "failures" ? value * 100 : value).toLocaleString("en-US", { maximumFractionDigits: 4 });
  return value === high && most > high * 1.0001 ? `${text}+` : text;
}
