// One conversation with the kernel for each widget model of a page load, shared by its views: says what is looked at,
// takes frames into the store and acknowledges them once they are drawn, and carries commands there and answers back.
import { Commands, type File } from "./commands";
import { Store } from "./store";
import { type ButtonCommand, type Frame, type Mode, type Reply, type Say } from "./types";

// What anywidget gives us of a model (0.9.18 and later).
export interface Model {
  on(event: string, callback: (...args: never[]) => void): void;
  off(event: string, callback?: ((...args: never[]) => void) | null): void;
  send(content: unknown): void;
}

export const LOOK_EVERY = 5; // seconds
export const SILENT_AFTER = 5; // seconds
const ACK_WITHIN = 500; // ms; browsers stop animation frames in some iframes

// What one view of the dashboard tells the connection.
export interface Looker { looking: boolean }

type ForPage = { page?: string };

export class Connection {
  readonly store = new Store();
  readonly page = randomId();
  readonly view: { layer: number; mode: Mode } = { layer: 0, mode: "load" };
  readonly commands: Commands;
  saved: ((file: File) => void) | null = null;
  private heardAt = now(); // when anything came last, or we began to look
  private lookers = new Set<Looker>();
  private looking = false;
  private gotFrame = false;
  private toAck: number[] = [];
  private timer = 0;
  private ackTimer = 0;
  private ended = false;

  constructor(private model: Model) {
    this.commands = new Commands((file) => this.saved?.(file));
    model.on("msg:custom", this.take as never);
    document.addEventListener("visibilitychange", this.turned);
    this.timer = window.setInterval(() => this.tick(), LOOK_EVERY * 1000);
  }

  // A view comes; call `changed` whenever its `looking` has changed, and the returned function when it goes.
  attach(looker: Looker): () => void {
    this.lookers.add(looker);
    this.changed();
    return () => {
      this.lookers.delete(looker);
      this.changed();
    };
  }

  changed(): void {
    const looking = !document.hidden && [...this.lookers].some((looker) => looker.looking);
    if (looking === this.looking) return;
    this.looking = looking;
    if (looking) this.heardAt = now();
    else this.acknowledge();
    this.look();
  }

  setView(layer: number, mode: Mode): void {
    if (layer === this.view.layer && mode === this.view.mode) return;
    Object.assign(this.view, { layer, mode });
    if (this.looking) this.look();
  }

  get isLooking(): boolean { return this.looking; }
  get closed(): boolean { return this.store.frame?.open === false; }
  // Nothing came for a while though we look.
  get silent(): boolean { return this.looking && !this.closed && now() - this.heardAt >= SILENT_AFTER; }
  get clickWaits(): boolean { return this.commands.waiting(now()); }

  execute(command: ButtonCommand): Promise<string> {
    const { id, answer } = this.commands.begin(command, now());
    if (id) this.say({ type: "command", page: this.page, id, command });
    // An export comes in pieces through the same window as frames: the page has to look until all of it is here.
    if (id && command.do === "export") void answer.catch(() => "").then(() => this.look());
    return answer;
  }

  close(): void {
    if (this.looking) {
      this.looking = false;
      this.look();
    }
    this.ended = true;
    clearInterval(this.timer);
    clearTimeout(this.ackTimer);
    document.removeEventListener("visibilitychange", this.turned);
    this.model.off("msg:custom", this.take as never);
    this.commands.drop("the dashboard was closed");
  }

  private turned = (): void => this.changed();

  private tick(): void {
    if (this.looking || this.commands.exporting) this.look(); // also when it is closed: one seen from afar may come back
  }

  // `fresh`: tell us everything; we have nothing yet, or something may have been lost.
  private look(): void {
    const looking = this.looking || this.commands.exporting;
    const { layer, mode } = this.view;
    this.say({ type: "look", page: this.page, looking, fresh: looking && (!this.gotFrame || this.silent), layer, mode });
  }

  private take = (content: unknown, buffers: DataView[] = []): void => {
    if (typeof content !== "object" || content === null) return;
    const message = content as (Frame | Reply) & ForPage;
    if (message.page !== undefined && message.page !== this.page) return; // another page's
    if (message.type === "frame") {
      if (!this.gotFrame && !message.reset) return this.acknowledge(message.seq); // the end of something we never saw begin
      this.heardAt = now();
      this.gotFrame = true;
      this.store.apply(message, buffers); // which has the views draw in the next animation frame
      if (message.ack !== false) this.acknowledgeSoon(message.seq);
    } else if (message.type === "chunk" || message.type === "heard" || message.type === "done" || message.type === "failed") {
      this.heardAt = now();
      this.commands.take(message, buffers);
      if (message.type === "chunk") this.acknowledge(message.seq);
    }
  };

  private acknowledgeSoon(seq: number): void {
    if (!this.looking || document.hidden) return this.acknowledge(seq);
    this.toAck.push(seq);
    requestAnimationFrame(() => this.acknowledge());
    clearTimeout(this.ackTimer);
    this.ackTimer = window.setTimeout(() => this.acknowledge(), ACK_WITHIN);
  }

  private acknowledge(...more: number[]): void {
    for (const seq of [...this.toAck.splice(0), ...more]) {
      if (Number.isInteger(seq)) this.say({ type: "ack", page: this.page, seq });
    }
  }

  private say(words: Say): void {
    if (this.ended) return;
    try {
      this.model.send(words);
    } catch {
      // The comm is gone, with its kernel. The status line says so when nothing comes.
    }
  }
}

function now(): number { return performance.now() / 1000; }

// crypto.randomUUID needs a secure context, which a notebook served over plain HTTP is not.
function randomId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
