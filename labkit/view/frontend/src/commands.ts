// What this page has asked of the kernel, and what came back: which click still waits, and the pieces of exports.
import type { ButtonCommand, Reply } from "./types";

export interface File { name: string; mime: string; parts: DataView[]; size: number }
interface Pending {
  command: ButtonCommand; sentAt: number; heard: boolean;
  resolve(text: string): void; reject(error: Error): void;
  file: File | null; total: number; // chunks
}

export const WAITING_AFTER = 1; // seconds without "heard", after which a click counts as waiting
const MAX_PENDING = 32;
const MAX_CHUNKS = 8192;

export class Commands {
  private next = 1;
  private pending = new Map<number, Pending>();
  constructor(private save: (file: File) => void) {}

  // Rejects at once when too many are under way already.
  begin(command: ButtonCommand, now: number): { id: number; answer: Promise<string> } {
    const id = this.next++;
    const answer = new Promise<string>((resolve, reject) => {
      if (this.pending.size >= MAX_PENDING) reject(new Error("too many commands are waiting for the kernel"));
      else this.pending.set(id, { command, sentAt: now, heard: false, resolve, reject, file: null, total: 0 });
    });
    return { id: this.pending.has(id) ? id : 0, answer };
  }

  take(reply: Reply, buffers: DataView[]): void {
    const entry = this.pending.get(reply.id);
    if (!entry) return;
    entry.heard = true;
    if (reply.type === "chunk") {
      this.chunk(entry, reply, buffers[0]);
    } else if (reply.type === "failed") {
      this.pending.delete(reply.id);
      entry.reject(new Error(reply.text));
    } else if (reply.type === "done") {
      this.pending.delete(reply.id);
      if (entry.command.do === "export") {
        const file = entry.file;
        if (!file || !whole(file, entry.total)) return entry.reject(new Error("the export arrived incomplete; try again"));
        this.save(file);
      }
      entry.resolve(reply.text);
    }
  }

  private chunk(entry: Pending, reply: Extract<Reply, { type: "chunk" }>, buffer: DataView | undefined): void {
    const { index, total } = reply;
    if (!buffer || !Number.isInteger(index) || !(index >= 0 && index < total && total <= MAX_CHUNKS)) return;
    entry.file ??= { name: reply.name, mime: reply.mime, parts: [], size: 0 };
    entry.total = total;
    if (!entry.file.parts[index]) entry.file.size += buffer.byteLength;
    entry.file.parts[index] = buffer;
  }

  // Whether a click has gone unheard for a while.
  waiting(now: number): boolean {
    return [...this.pending.values()].some((entry) => !entry.heard && now - entry.sentAt >= WAITING_AFTER);
  }

  get exporting(): boolean {
    return [...this.pending.values()].some((entry) => entry.command.do === "export");
  }

  drop(why: string): void {
    for (const entry of this.pending.values()) entry.reject(new Error(why));
    this.pending.clear();
  }
}

function whole(file: File, total: number): boolean {
  for (let i = 0; i < total; i++) if (!file.parts[i]) return false;
  return true;
}
