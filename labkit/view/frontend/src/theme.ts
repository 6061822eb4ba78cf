// Light or dark, and the colours that canvases take from the style sheet, so that they are stated once.
import { CAUSES, type Cause } from "./types";

export interface Theme {
  dark: boolean;
  text: string; dim: string; line: string; ground: string; accent: string;
  causes: Record<Cause, string>;
}

// In the order of who knows best: JupyterLab, VS Code, Colab, the page's own ground, the system.
// A page that is the dashboard's alone has the system's colours, whatever the server that it comes from says, unless its
// address says otherwise.
export function isDark(el: Element, alone = false): boolean {
  if (alone && !new URLSearchParams(location.search).has("theme")) return systemIsDark();
  const lab = el.closest("[data-jp-theme-light]");
  if (lab) return lab.getAttribute("data-jp-theme-light") === "false";
  const body = document.body.classList;
  if (body.contains("vscode-light") || body.contains("vscode-high-contrast-light")) return false;
  if (body.contains("vscode-dark") || body.contains("vscode-high-contrast")) return true;
  const colab = document.documentElement.getAttribute("theme");
  if (colab === "dark" || colab === "light") return colab === "dark";
  const ground = getComputedStyle(el).getPropertyValue("--jp-layout-color1").trim();
  const light = ground && lightness(ground);
  if (typeof light === "number") return light < 0.5;
  return systemIsDark();
}

function systemIsDark(): boolean {
  return typeof matchMedia === "function" && matchMedia("(prefers-color-scheme: dark)").matches;
}

// 0 (black) to 1 (white) of `#rgb`, `#rrggbb`, `rgb(…)`, "white" or "black"; null for what it cannot read.
export function lightness(color: string): number | null {
  if (color === "white") return 1;
  if (color === "black") return 0;
  let parts: number[] | null = null;
  if (/^#[0-9a-f]{3}$/i.test(color)) parts = [...color.slice(1)].map((digit) => parseInt(digit + digit, 16));
  else if (/^#[0-9a-f]{6}/i.test(color)) parts = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  else if (/^rgba?\(/.test(color)) parts = (color.match(/[\d.]+/g) ?? []).slice(0, 3).map(Number);
  if (!parts || parts.length < 3) return null;
  return (0.299 * parts[0] + 0.587 * parts[1] + 0.114 * parts[2]) / 255;
}

export function readTheme(el: Element): Theme {
  const style = getComputedStyle(el);
  const of = (name: string, otherwise: string) => style.getPropertyValue(`--lk-${name}`).trim() || otherwise;
  const causes = Object.fromEntries(CAUSES.map((cause) => [cause, of(cause.replace("_", "-"), "#888")]));
  return {
    dark: (el.closest("[data-theme]") ?? el).getAttribute("data-theme") === "dark",
    text: of("text", "#222"), dim: of("dim", "#666"), line: of("line", "#ccc"), ground: of("ground", "#fff"), accent: of("accent", "#1f6fb2"),
    causes: causes as Record<Cause, string>,
  };
}

// Calls `changed` when the page may have turned from light to dark or back.
export function watchTheme(changed: () => void): () => void {
  const observer = new MutationObserver(changed);
  const options = { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name", "theme", "data-vscode-theme-kind"] };
  observer.observe(document.body, options);
  observer.observe(document.documentElement, options);
  const system = typeof matchMedia === "function" ? matchMedia("(prefers-color-scheme: dark)") : null;
  system?.addEventListener("change", changed);
  return () => {
    observer.disconnect();
    system?.removeEventListener("change", changed);
  };
}
