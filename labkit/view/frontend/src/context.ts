// What every panel is given: what the user looks at, and how to ask the kernel for something.
import type { ButtonCommand, Mode } from "./types";

export interface Context {
  execute(command: ButtonCommand): Promise<string>; // resolves to what was done, rejects with an Error that says why not
  view: { layer: number; mode: Mode };
  setView(layer: number, mode: Mode): void; // also tells the kernel, which sends that mode first
  selected: number; // row of the expert table, -1: none
  select(expert: number): void;
  onSelect(listener: () => void): void;
  say(text: string): void; // in the status line
  replay: boolean;
  cursor?: number; // replay: seconds
  duration?: number; // replay: seconds
}

export interface Panel {
  el: HTMLElement;
  update(): void; // at most once an animation frame, when the panel can be seen and the view is not paused
  restyle?(): void; // the theme has changed: read the colours again and draw everything
  destroy(): void;
}

export type MakePanel = (store: import("./store").Store, ctx: Context) => Panel;
