// Three numbers, all measured here: frames made a second, frames shown a second, and how long a change takes to the screen.

import { TEXT } from "./text.js";

const BLOCKS = 8; // over which making is averaged
const SPAN_MS = 2000; // over which showing is

export class Meters {
  constructor() {
    this.clear();
  }

  clear() {
    Object.assign(this, { made: [], begun: new Map(), last: 0, frames: [], delay: null, stalledSince: null, stalledMs: 0 });
  }

  // The server may begin chunk `index` from now on.
  go(index) {
    if (!this.begun.has(index)) this.begun.set(index, performance.now());
  }

  // Chunks on their way are not measured: somebody paused, or the connection is new.
  interrupted() {
    this.begun.clear();
  }

  // A chunk is here. What it took runs from when it could be begun, which is not before the one before it was here.
  arrived({ generation_chunk_index: index, num_frames: frames }) {
    const at = performance.now(), begun = this.begun.get(index);
    if (begun !== undefined) this.made = [...this.made.slice(1 - BLOCKS), { frames, took: at - Math.max(begun, this.last) }];
    this.begun.delete(index);
    this.last = at;
  }

  generated() {
    if (!this.made.length) return null;
    const total = (name) => this.made.reduce((sum, one) => sum + one[name], 0);
    return { rate: (1000 * total("frames")) / total("took"), chunks: this.made.length };
  }

  frame(at) {
    this.frames.push(at);
    while (this.frames.length && this.frames[0] < at - SPAN_MS) this.frames.shift();
  }

  shown(at) {
    while (this.frames.length && this.frames[0] < at - SPAN_MS) this.frames.shift();
    const span = Math.min(SPAN_MS, at - this.frames[0]);
    return this.frames.length > 2 && span > 250 ? (1000 * this.frames.length) / span : null;
  }

  // A change that has come to the screen with the frame of this second; null if there is none.
  landed(take, second, at, fps) {
    const event = take.events.find((each) => each.landed !== null && each.pressed !== null && each.delay === null && second >= each.landed - 0.5 / fps);
    if (!event) return null;
    event.delay = this.delay = (at - event.pressed) / 1000;
    event.pressed = null;
    return { value: this.delay, prompt: event.prompt, cut: event.cut };
  }

  // Somebody paused or went elsewhere in the film: how long a change takes to the screen cannot be told of those on their way.
  disturbed(take) {
    for (const event of take?.events || []) event.pressed = null;
  }

  waiting(on) {
    if (on && this.stalledSince === null) this.stalledSince = performance.now();
    if (!on && this.stalledSince !== null) {
      this.stalledMs += performance.now() - this.stalledSince;
      this.stalledSince = null;
    }
  }

  // How long the picture stood since this was asked last, as the server wants it.
  stalled() {
    const ms = Math.round(this.stalledMs);
    this.stalledMs = 0;
    return ms ? { stalled_ms: ms } : {};
  }

  read(video, fps, take, gpu) {
    const at = performance.now(), generated = this.generated();
    const rate = video.paused ? null : this.shown(at);
    const waits = (take?.events || []).filter((event) => event.pressed !== null && event.delay === null).pop();
    return {
      generated: generated && { ...generated, where: TEXT.on(gpu) },
      shown: rate === null ? null : { rate, dropped: video.getVideoPlaybackQuality?.().droppedVideoFrames || 0 },
      fps,
      delay: waits ? { value: (at - waits.pressed) / 1000, waiting: true } : this.delay === null ? null : { value: this.delay, waiting: false },
    };
  }
}
