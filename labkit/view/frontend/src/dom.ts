// Making elements. Text only ever enters the page as text, never as HTML.

type Props = Record<string, string | number | boolean | ((event: Event) => void) | null | undefined>;
type Child = Node | string | null | undefined;

// h("button", { class: "x", "aria-pressed": "true", onclick: f }, "Text", child). `on…` listens, true sets an empty
// attribute, and false, null and undefined leave it out.
export function h<K extends keyof HTMLElementTagNameMap>(tag: K, props: Props = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") el.addEventListener(name.slice(2), value);
    else attribute(el, name, value);
  }
  for (const child of children) if (child !== null && child !== undefined) el.append(child);
  return el;
}

// These write only what has changed: an untouched element costs no layout, and screen readers hear nothing twice.
export function attribute(el: Element, name: string, value: string | number | boolean | null | undefined): void {
  if (value === false || value === null || value === undefined) {
    if (el.hasAttribute(name)) el.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (el.getAttribute(name) !== text) el.setAttribute(name, text);
  }
}

export function text(el: Element, value: string): void {
  if (el.textContent !== value) el.textContent = value;
}

// Text that only screen readers, and tests, see.
export const hidden = (value: string): HTMLElement => h("span", { class: "lk-hidden" }, value);

// Makes `list` the children of `parent`, moving as few as it can; the focus stays where it is.
export function arrange(parent: Element, list: readonly Element[]): void {
  const focused = (parent.getRootNode() as Document).activeElement;
  const keep = new Set(list);
  for (const child of [...parent.children]) if (!keep.has(child)) child.remove();
  let at: Element | null = parent.firstElementChild;
  let moved = false;
  for (const child of list) {
    if (child === at) at = at.nextElementSibling;
    else {
      parent.insertBefore(child, at);
      moved = true;
    }
  }
  if (moved && focused instanceof HTMLElement && focused !== parent.ownerDocument.activeElement && parent.contains(focused)) {
    focused.focus({ preventScroll: true });
  }
}

// A canvas of `width` × `height` CSS pixels, sharp on any screen, cleared; null where there is no canvas.
export function pen(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D | null {
  const ratio = window.devicePixelRatio || 1;
  const w = Math.max(1, Math.round(width * ratio)), hh = Math.max(1, Math.round(height * ratio));
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== hh) canvas.height = hh;
  const context = canvas.getContext("2d");
  if (!context) return null;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
