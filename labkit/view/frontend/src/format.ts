// Numbers as people read them. Everywhere: null and NaN are "–", nothing known.
import { CAUSES, type Cause } from "./types";

type Maybe = number | null | undefined;
export const NOTHING = "–";
const known = (value: Maybe): value is number => typeof value === "number" && Number.isFinite(value);

export const CAUSE_WORDS: Record<Cause, string> = {
  timeout: "timeout", refused: "refused", overloaded: "overloaded", lost: "lost connection",
  bad_reply: "bad reply", cancelled: "cancelled", failed: "failed",
};

const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 }); // made once: making one costs more than its use
export const whole = (value: Maybe): string => (known(value) ? WHOLE.format(Math.round(value)) : NOTHING);

// Three figures: 0.0123, 0.412, 4.12, 41.2, 412, 4,120.
export function figures(value: Maybe): string {
  if (!known(value)) return NOTHING;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 99.95) return whole(value);
  if (size < 1e-4) return value.toExponential(1);
  return value.toPrecision(3);
}

// A rate or a count a second: 88, 7.4, 0.25.
export function rate(value: Maybe): string {
  if (!known(value)) return NOTHING;
  if (value >= 9.95 || value === 0) return whole(value);
  return value >= 0.995 ? value.toFixed(1) : value.toFixed(2);
}

export function bytes(value: Maybe): string {
  if (!known(value)) return NOTHING;
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "KB"]] as const) {
    if (value >= size * 0.9995) return `${figures(value / size)} ${unit}`;
  }
  return `${whole(value)} B`;
}

// Milliseconds: 0.42, 4.2, 42, 4,200.
export const milliseconds = (value: Maybe): string =>
  !known(value) ? NOTHING : value >= 9.95 || value === 0 ? whole(value) : value.toFixed(value >= 0.995 ? 1 : 2);

// How long ago: 0.3 s, 12 s, 3 min, 2 h.
export function age(seconds: Maybe): string {
  if (!known(seconds)) return NOTHING;
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

// A time since the start: 0:07, 12:05, 1:02:05.
export function clock(seconds: number): string {
  const s = Math.max(0, Math.floor(seconds));
  const two = (n: number) => String(n).padStart(2, "0");
  const hours = Math.floor(s / 3600), minutes = Math.floor(s / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

// 3 (lost 2, timeout 1): in all, and by cause, the most frequent first.
export function failures(failed: readonly number[]): string {
  const total = failed.reduce((sum, n) => sum + (n || 0), 0);
  if (!total) return "0";
  const some = CAUSES.map((cause, i) => [cause.replace("_", " "), failed[i] || 0] as const).filter(([, n]) => n > 0);
  some.sort((a, b) => b[1] - a[1]);
  return `${whole(total)} (${some.map(([cause, n]) => `${cause} ${whole(n)}`).join(", ")})`;
}
