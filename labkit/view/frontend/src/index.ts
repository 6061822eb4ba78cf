// The widget that anywidget loads. The default export is a function, so that each model gets its own connection, which all
// its views share.
import { Connection, type Looker, type Model } from "./connection";
import { controls } from "./controls";
import { download } from "./download";
import { makeContext, shell } from "./shell";
import { statusLine } from "./status";
import type { Mode } from "./types";

const ANSWER_STAYS_FOR = 8_000; // ms that the answer to a command stays in the status line

export default function widget() {
  let connection: Connection | null = null;
  const connect = (model: Model) => (connection ??= new Connection(model));
  return {
    initialize({ model }: { model: Model }) {
      connect(model);
      return () => {
        connection?.close();
        connection = null;
      };
    },
    render({ model, el }: { model: Model & { get(trait: string): unknown }; el: HTMLElement }) {
      return showLive(connect(model), el, model.get("alone") === true);
    },
  };
}

function showLive(connection: Connection, place: HTMLElement, alone: boolean): () => void {
  const { store } = connection;
  const looker: Looker = { looking: false, paused: false };
  let seen = false, paused = false, answer = "", answeredAt = -Infinity;

  const say = (words: string) => {
    answer = words;
    answeredAt = performance.now();
    view?.draw();
  };
  const ctx = makeContext({
    view: connection.view,
    setView(layer: number, mode: Mode) {
      connection.setView(layer, mode);
      view.draw();
    },
    say,
    replay: false,
    async execute(command) {
      if (command.do === "export") connection.saved = (file) => download(file, view.root.querySelector<HTMLElement>(".lk-saves")!);
      try {
        const text = await connection.execute(command);
        say(text);
        return text;
      } catch (error) {
        say(error instanceof Error ? error.message : String(error));
        throw error;
      }
    },
  });
  const turned = () => {
    Object.assign(looker, { looking: seen && !paused, paused: seen && paused });
    connection.changed();
  };
  const view = shell(place, store, ctx, {
    scrolls: true, alone,
    controls: (redraw) => controls(store, ctx, (is) => {
      paused = is;
      turned();
      if (!is) redraw();
    }),
    seen(is) {
      seen = is;
      turned();
    },
    frozen: () => paused,
    status: () => statusLine({
      first: store.frame !== null, closed: connection.closed, paused, clickWaits: connection.clickWaits,
      lost: connection.lost,
      answer: performance.now() - answeredAt < ANSWER_STAYS_FOR ? answer : "",
    }),
  });
  const detach = connection.attach(looker);
  return () => {
    detach();
    view.destroy();
  };
}
