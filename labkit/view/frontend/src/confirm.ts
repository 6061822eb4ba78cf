// A button that asks once: the first press turns it into a question for four seconds, the second one acts.
import { attribute, h, hidden } from "./dom";

export const ASKS_FOR = 4; // seconds

// The thinking, with the time passed in.
export class ConfirmOnce {
  private until = -Infinity;
  asking(now: number): boolean { return now < this.until; }
  // Whether to act. `double`: the second press of a double click: the question cannot have been read yet.
  press(now: number, double = false): boolean {
    if (this.asking(now)) {
      if (double) return false;
      this.until = -Infinity;
      return true;
    }
    this.until = now + ASKS_FOR;
    return false;
  }
  forget(): void { this.until = -Infinity; }
}

export interface ActionButton {
  el: HTMLButtonElement;
  // Why it cannot be pressed now ("" if it can), and whether it must ask first.
  allow(why: string, ask: boolean): void;
  destroy(): void;
}

// `words`: what is seen and what only screen readers need: ["Kill", " servers[2]"] becomes "Really kill servers[2]?".
export function actionButton(words: [seen: string, heard: string], act: () => Promise<unknown> | void, question = `Really ${words[0].toLowerCase()}`): ActionButton {
  const confirm = new ConfirmOnce();
  let mustAsk = true, busy = false, timer = 0;
  const now = () => performance.now() / 1000;
  const el = h("button", { type: "button", class: "lk-button", onclick: (event) => press((event as MouseEvent).detail > 1) });
  const show = () => {
    const asking = confirm.asking(now());
    el.replaceChildren(asking ? question : words[0], hidden(words[1]), asking ? "?" : "");
    el.classList.toggle("lk-asking", asking);
  };
  const press = async (double: boolean) => {
    if (busy) return;
    clearTimeout(timer);
    if (mustAsk && !confirm.press(now(), double)) {
      timer = window.setTimeout(show, ASKS_FOR * 1000 + 20);
      return show();
    }
    confirm.forget();
    show();
    busy = true;
    attribute(el, "aria-busy", "true");
    try {
      await act();
    } catch {
      // the status line has said why
    } finally {
      busy = false;
      attribute(el, "aria-busy", null);
    }
  };
  show();
  return {
    el,
    allow(why, ask) {
      mustAsk = ask;
      if (el.disabled !== (why !== "")) {
        el.disabled = why !== "";
        if (why) { confirm.forget(); show(); }
      }
      attribute(el, "title", why || null);
    },
    destroy() { clearTimeout(timer); },
  };
}
