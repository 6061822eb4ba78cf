// One conversation with the kernel for each widget model of a page load, shared by its views: says what is looked at,
// takes frames into the store and acknowledges them once they are drawn, carries commands there and answers back, and knows
// whether there is still a kernel at the other end.
import { Commands, type File } from "./commands";
import { Store } from "./store";
import { type Beat, type ButtonCommand, type Frame, type Mode, type Reply, type Say } from "./types";

// What anywidget gives us of a model (0.9.18 and later).
export interface Model {
  on(event: string, callback: (...args: never[]) => void): void;
  off(event: string, callback?: ((...args: never[]) => void) | null): void;
  send(content: unknown): void;
}

export const LOOK_EVERY = 5; // seconds
export const SILENT_AFTER = 7; // seconds without a word while we watch: the kernel sends one every 2.5, whatever a cell does
const LINK_CHANGE_GRACE = 2; // seconds that the kernel has to answer once its link was cut or made anew
const LOST = "the kernel does not answer"; // why buttons are off
const ACK_WITHIN = 500; // ms; browsers stop animation frames in some iframes

// What one view of the dashboard tells the connection.
export interface Looker { looking: boolean; paused: boolean }

type ForPage = { page?: string };

export class Connection {
  readonly store = new Store();
  readonly page = randomId();
  readonly view: { layer: number; mode: Mode } = { layer: 0, mode: "load" };
  readonly commands: Commands;
  saved: ((file: File) => void) | null = null;
  private heardAt = now(); // when anything came last, or we began to watch
  private lookers = new Set<Looker>();
  private looking = false;
  private paused = false; // something would be looked at, but is paused
  private cut = false; // nothing can be sent any more
  private seconds = 0;
  private gotFrame = false;
  private toAck: number[] = [];
  private timer = 0;
  private ackTimer = 0;
  private ended = false;

  constructor(private model: Model) {
    this.commands = new Commands((file) => this.saved?.(file));
    model.on("msg:custom", this.take as never);
    model.on("comm_live_update", this.relinked);
    document.addEventListener("visibilitychange", this.turned);
    this.timer = window.setInterval(() => this.tick(), 1000);
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
    const some = (what: keyof Looker) => !document.hidden && [...this.lookers].some((looker) => looker[what]);
    const looking = some("looking"), paused = !looking && some("paused");
    if (looking === this.looking && paused === this.paused) return;
    if (!this.watching) this.heardAt = now();
    if (!looking && this.looking) this.acknowledge();
    [this.looking, this.paused] = [looking, paused];
    this.look();
  }

  setView(layer: number, mode: Mode): void {
    if (layer === this.view.layer && mode === this.view.mode) return;
    Object.assign(this.view, { layer, mode });
    if (this.looking) this.look();
  }

  get isLooking(): boolean { return this.looking; }
  get closed(): boolean { return this.store.frame?.open === false; }
  private get watching(): boolean { return this.looking || this.paused; }
  // Seconds since anything came, if that is too long; 0: the kernel lives, or nobody watches.
  get silent(): number {
    const seconds = now() - this.heardAt;
    return this.watching && seconds >= SILENT_AFTER ? seconds : 0;
  }
  // What there is to say when the kernel is gone, or seems to be; "" while it lives.
  get lost(): string {
    if (this.cut) return "the kernel is gone: it was restarted, or has ended; run the cell again";
    return this.silent ? `no sign of life for ${Math.floor(this.silent)} s: the kernel was restarted, has ended, or is not connected` : "";
  }
  get clickWaits(): boolean { return this.commands.waiting(now()); }

  execute(command: ButtonCommand): Promise<string> {
    if (this.store.lost) return Promise.reject(new Error(LOST));
    const { id, answer } = this.commands.begin(command, now());
    if (id) this.say({ type: "command", page: this.page, id, command });
    // An export comes in pieces through the same window as frames: the page has to look until all of it is here.
    if (id && command.do === "export") void answer.catch(() => "").then(() => this.look());
    return answer;
  }

  close(): void {
    if (this.watching) {
      this.looking = this.paused = false;
      this.look();
    }
    this.ended = true;
    clearInterval(this.timer);
    clearTimeout(this.ackTimer);
    document.removeEventListener("visibilitychange", this.turned);
    this.model.off("msg:custom", this.take as never);
    this.model.off("comm_live_update", this.relinked);
    this.commands.drop("the dashboard was closed");
  }

  private turned = (): void => this.changed();

  // The kernel was restarted, or has come back: it says so soon, or is gone.
  private relinked = (): void => {
    this.heardAt = Math.min(this.heardAt, now() - SILENT_AFTER + LINK_CHANGE_GRACE);
    if (this.watching) this.look();
  };

  private tick(): void {
    this.seconds++;
    if (this.seconds % LOOK_EVERY === 0 && (this.watching || this.commands.exporting)) this.look(); // also when it is closed: one seen from afar may come back
    this.judge();
  }

  private judge(): void {
    const lost = this.lost ? LOST : "";
    if (lost === this.store.lost) return;
    this.store.lose(lost);
    if (lost) this.commands.drop(lost);
  }

  private heard(): void {
    this.heardAt = now();
    this.cut = false;
    this.judge();
  }

  // `fresh`: tell us everything; we have nothing yet, or something may have been lost.
  private look(): void {
    const looking = this.looking || this.commands.exporting;
    const { layer, mode } = this.view;
    this.say({ type: "look", page: this.page, looking, paused: this.paused, fresh: looking && (!this.gotFrame || this.lost !== ""), layer, mode });
  }

  private take = (content: unknown, buffers: DataView[] = []): void => {
    if (typeof content !== "object" || content === null) return;
    const message = content as (Frame | Reply | Beat) & ForPage;
    if (message.page !== undefined && message.page !== this.page) return; // another page's
    if (message.type === "frame") {
      if (!this.gotFrame && !message.reset) return this.acknowledge(message.seq); // the end of something we never saw begin
      this.gotFrame = true;
      this.store.apply(message, buffers); // which has the views draw in the next animation frame
      this.heard();
      if (message.ack !== false) this.acknowledgeSoon(message.seq);
    } else if (message.type === "chunk" || message.type === "heard" || message.type === "done" || message.type === "failed") {
      this.heard();
      this.commands.take(message, buffers);
      if (message.type === "chunk") this.acknowledge(message.seq);
    } else if (message.type === "beat") this.heard();
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
      this.cut = true; // the comm is gone, with its kernel
    }
  }
}

function now(): number { return performance.now() / 1000; }

// crypto.randomUUID needs a secure context, which a notebook served over plain HTTP is not.
function randomId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
