// Hands a file to the browser: a link that is clicked, and that stays for a while for who must click it themselves
// (an iframe of a notebook may not start downloads by itself).
import { h } from "./dom";
import { bytes } from "./format";
import type { File } from "./commands";

const LINK_STAYS_FOR = 60_000; // ms

// `place` is inside the dashboard: VS Code saves only links that are part of the page it shows.
export function download(file: File, place: HTMLElement): void {
  const url = URL.createObjectURL(new Blob(file.parts as BlobPart[], { type: file.mime }));
  const link = h("a", { href: url, download: safeName(file.name), class: "lk-save" }, `Save ${file.name} (${bytes(file.size)})`);
  place.replaceChildren(link);
  link.click();
  setTimeout(() => {
    URL.revokeObjectURL(url);
    link.remove();
  }, LINK_STAYS_FOR);
}

export const safeName = (name: string): string => name.replace(/[^\w.() -]+/g, "_").replace(/^\.+/, "").slice(0, 120) || "labkit-export";
