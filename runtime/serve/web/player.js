// The picture: a film is a list of chunks, of which a stretch around the play-head is in the browser's media buffer.
// What was trimmed from the buffer is put back when someone looks there again, so memory stays bounded and every block plays.

const BACK_S = 60; // kept behind the play-head
const AHEAD_S = 60; // put in before it
const TRIES = 3; // of one chunk, before it counts as unplayable

export const canPlay = {
  sources: () => "MediaSource" in window || "ManagedMediaSource" in window,
  type: (mime) => (window.MediaSource || window.ManagedMediaSource).isTypeSupported(mime),
};

export class Player {
  // on: {problem(reason), blocked(), frame(mediaTime, now)}; blocked: the browser wants a click before it plays
  constructor(video, on) {
    Object.assign(this, { video, on, film: [], init: null, fps: 24, mime: "", finished: false, problems: 0 });
    Object.assign(this, { source: null, buffer: null, busy: false, back: BACK_S, ahead: AHEAD_S, cutAt: null, tries: new Map() });
    for (const name of ["seeking", "timeupdate"]) video.addEventListener(name, () => this.pump());
    video.addEventListener("error", () => {
      if (video.error && video.src) this.problem(video.error.message);
    });
    this.watchFrames();
  }

  // An empty buffer for films of this media type.
  open(mime, fps) {
    this.mime = mime;
    this.fps = fps;
    this.tries.clear();
    this.buffer = null;
    const Source = window.ManagedMediaSource || window.MediaSource;
    const source = new Source();
    this.source = source;
    this.video.disableRemotePlayback = true;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(source);
    this.video.src = this.url;
    source.addEventListener("sourceopen", () => {
      if (this.source !== source || this.buffer) return;
      this.buffer = source.addSourceBuffer(mime);
      this.hasInit = false;
      this.pump();
    });
  }

  reload() {
    const at = this.video.currentTime;
    this.open(this.mime, this.fps);
    this.seek(at);
  }

  // Show another film; what both begin with stays in the buffer. Returns the second from which they differ, or null.
  show(film) {
    let same = 0;
    while (same < film.length && same < this.film.length && film[same] === this.film[same]) same += 1;
    const differs = same < this.film.length ? this.film[same].start : null;
    this.film = film;
    this.tries.clear();
    if (differs !== null && this.buffer) this.cutAt = this.cutAt === null ? differs : Math.min(this.cutAt, differs);
    this.pump();
    return differs;
  }

  get end() {
    return this.film.length ? this.film[this.film.length - 1].end : 0;
  }

  // Index of the chunk at a second of the film; -1 before there is one.
  at(second) {
    let low = 0, high = this.film.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.film[middle].start <= second + 0.25 / this.fps) low = middle;
      else high = middle - 1;
    }
    return this.film.length ? low : -1;
  }

  seek(second) {
    if (Math.abs(this.video.currentTime - second) > 0.001) this.video.currentTime = second;
    this.pump();
  }

  play() {
    if (this.video.ended && this.video.currentTime < this.end - 0.1) this.video.currentTime += 0.001;
    this.video.play().catch((error) => error.name === "NotAllowedError" && this.on.blocked());
  }

  // Seconds of film that are buffered from the play-head on.
  get bufferedAhead() {
    const { buffered, currentTime } = this.video;
    for (let i = 0; i < buffered.length; i += 1) {
      if (buffered.start(i) <= currentTime + 0.1 && currentTime <= buffered.end(i)) return buffered.end(i) - currentTime;
    }
    return 0;
  }

  covered(chunk) {
    const half = 0.5 / this.fps, ranges = this.buffer.buffered;
    for (let i = 0; i < ranges.length; i += 1) {
      if (ranges.start(i) <= chunk.start + half && chunk.end - half <= ranges.end(i)) return true;
    }
    return false;
  }

  // The first chunk from the play-head on that the buffer lacks.
  missing() {
    const now = this.video.currentTime;
    for (let i = Math.max(0, this.at(now)); i < this.film.length && this.film[i].start < now + this.ahead; i += 1) {
      if (!this.covered(this.film[i])) return this.film[i];
    }
    return null;
  }

  async pump() {
    if (this.busy) return;
    this.busy = true;
    try {
      while (this.buffer && this.source.readyState !== "closed" && (await this.step()));
      this.close();
    } catch (error) {
      this.problem(error.message);
    } finally {
      this.busy = false;
    }
  }

  // One change of the buffer; false if there is nothing to do.
  async step() {
    const { buffer, source } = this;
    const act = (change) => new Promise((resolve, reject) => {
      buffer.onerror = () => reject(new Error("a block was refused"));
      buffer.onupdateend = () => resolve(true);
      change();
    });
    if (this.cutAt !== null) {
      const from = Math.max(0, this.cutAt - 0.5 / this.fps);
      this.cutAt = null;
      if (buffer.buffered.length && buffer.buffered.end(buffer.buffered.length - 1) > from) return act(() => buffer.remove(from, Infinity));
      return true;
    }
    const keep = this.at(this.video.currentTime - this.back);
    const until = keep > 0 ? this.film[keep].start : 0;
    if (until && buffer.buffered.length && buffer.buffered.start(0) < until - 1) return act(() => buffer.remove(0, until));
    if (this.init && !this.hasInit) {
      this.hasInit = true;
      return act(() => buffer.appendBuffer(this.init));
    }
    const next = this.hasInit ? this.missing() : null;
    if (!next) return false;
    const data = await next.blob.arrayBuffer();
    if (this.buffer !== buffer || this.source !== source || !this.film.includes(next) || this.cutAt !== null) return true;
    const tries = (this.tries.get(next) || 0) + 1;
    this.tries.set(next, tries);
    if (tries > TRIES) throw new Error(`block ${next.index + 1}`);
    try {
      return await act(() => buffer.appendBuffer(data));
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      this.tries.delete(next);
      this.back = Math.max(5, this.back / 2); // less is kept; the rest is put back when someone looks there
      this.ahead = Math.max(6, this.ahead / 2);
      return false;
    }
  }

  // Tell the browser that nothing follows, once that is so.
  close() {
    const whole = this.finished && this.film.length && this.buffer && this.source.readyState === "open";
    if (whole && !this.missing() && this.covered(this.film[this.film.length - 1])) this.source.endOfStream();
  }

  problem(reason) {
    this.problems += 1;
    this.on.problem(reason);
  }

  // Every frame that reaches the screen, with the second of the film that it is.
  watchFrames() {
    const { video } = this;
    if ("requestVideoFrameCallback" in video) {
      const each = (now, { mediaTime }) => {
        this.on.frame(mediaTime, performance.now());
        video.requestVideoFrameCallback(each);
      };
      video.requestVideoFrameCallback(each);
      return;
    }
    let last = -1;
    const each = () => {
      if (video.currentTime !== last) this.on.frame((last = video.currentTime), performance.now());
      requestAnimationFrame(each);
    };
    requestAnimationFrame(each);
  }

  // The whole film as one file; no byte of it is encoded again.
  file() {
    return this.init && this.film.length ? new Blob([this.init, ...this.film.map((chunk) => chunk.blob)], { type: "video/mp4" }) : null;
  }
}
