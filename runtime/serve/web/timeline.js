// The film as blocks: one a chunk, to scale, a row a take. Marks say where a change was asked for and where it landed.

import { TEXT } from "./text.js";

const SHOTS = 6; // colours, in turn
const KEPT = "longtake-picture-";
const THUMB = { width: 144, height: 92 };

export const clock = (second) => `${Math.floor(second / 60)}:${String(Math.floor(second % 60)).padStart(2, "0")}`;

const made = (tag, name, parent) => {
  const node = document.createElement(tag);
  node.className = name;
  if (parent) parent.append(node);
  return node;
};
const set = (node, name, value) => {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
};
const place = (node, left, width) => {
  node.style.left = `${left}px`;
  if (width !== undefined) node.style.width = `${Math.max(2, width)}px`;
};

export class Timeline {
  // on: {select(take, index), open(take)}
  constructor(root, on) {
    Object.assign(this, { root, on, blocks: new Map(), rows: new Map(), thumbs: new Map(), asked: new Set(), model: null, marks: "", words: "" });
    this.canvas = made("div", "tl-canvas", root);
    this.lane = made("div", "tl-prompts", this.canvas);
    this.lane.setAttribute("aria-hidden", "true");
    this.takes = made("div", "tl-takes", this.canvas);
    this.events = made("div", "tl-events", this.canvas);
    this.head = made("div", "tl-head", this.canvas);
    this.head.setAttribute("aria-hidden", "true");
    this.follow = true;
    root.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["wheel", "pointerdown"]) root.addEventListener(name, () => (this.follow = false), { passive: true });
  }

  get scale() {
    return (parseFloat(getComputedStyle(this.root).getPropertyValue("--block")) || 76) / 32; // pixels a frame
  }

  // model: {fps, takes: [{id, from, number, active, blocks, depth}], events, selected: {take, index}, saw: [index]}
  // blocks: {index, first_frame, frames, state, shot, cut, prompt, key}; those of the film that plays are marked `film`.
  draw(model) {
    this.model = model;
    const scale = (this.px = this.scale), seen = new Set();
    let end = 0;
    model.takes.forEach((take, order) => {
      const row = this.row(take, order);
      for (const block of take.blocks) {
        const name = `${take.id}:${block.index}`;
        seen.add(name);
        this.block(row, name, take, block, scale);
        end = Math.max(end, (block.first_frame + block.frames) * scale);
      }
    });
    for (const [name, node] of this.blocks) if (!seen.has(name)) (node.remove(), this.blocks.delete(name));
    const ids = new Set(model.takes.map((take) => take.id));
    for (const [id, row] of this.rows) if (!ids.has(id)) (row.remove(), this.rows.delete(id));
    this.canvas.style.width = `${Math.ceil(end) + 24}px`;
    this.root.classList.toggle("branched", model.takes.length > 1);
    this.drawPrompts(scale);
    this.drawEvents(scale);
    this.rove();
  }

  row(take, order) {
    let row = this.rows.get(take.id);
    if (!row) {
      row = made("div", "tl-row", this.takes);
      row.setAttribute("role", "group");
      row.link = made("span", "tl-link", row);
      row.name = made("button", "tl-take", row);
      row.name.type = "button";
      row.name.addEventListener("click", () => this.on.open(take.id));
      this.rows.set(take.id, row);
    }
    row.order = order;
    if (this.takes.children[order] !== row) this.takes.insertBefore(row, this.takes.children[order] || null);
    set(row, "data-take", take.id);
    set(row, "data-active", take.active ? "" : null);
    set(row, "aria-label", TEXT.take(take.number, take.from));
    set(row.name, "aria-label", `${TEXT.take(take.number, take.from)}: ${take.active ? "on the screen" : "show it"}`);
    set(row.name, "aria-pressed", take.active);
    row.name.textContent = take.number;
    row.name.hidden = this.model.takes.length < 2;
    const first = take.blocks[0];
    const left = first ? first.first_frame * this.px : 0;
    row.name.style.left = `${Math.max(0, left - 30)}px`;
    row.name.classList.toggle("first", left < 30);
    row.link.hidden = take.number === 1;
    row.link.style.left = `${Math.max(0, left - 18)}px`;
    return row;
  }

  block(row, name, take, block, scale) {
    let node = this.blocks.get(name);
    if (!node) {
      node = made("button", "tl-block", row);
      node.type = "button";
      node.tabIndex = -1;
      node.name_ = name;
      node.addEventListener("click", () => node.dataset.real && this.on.select(take.id, node.chunk.index));
      made("span", "tl-number", node).textContent = block.index + 1;
      this.blocks.set(name, node);
    }
    node.chunk = block;
    place(node, block.first_frame * scale + 1, block.frames * scale - 2);
    const real = block.state === "ready" || block.state === "shown";
    set(node, "data-real", real ? "1" : null);
    set(node, "data-chunk", block.film ? block.index : null);
    set(node, "data-other", block.film ? null : block.index);
    set(node, "data-state", block.state);
    set(node, "data-shot", block.shot);
    set(node, "data-hue", ((block.shot ?? 0) % SHOTS + SHOTS) % SHOTS);
    set(node, "data-cut", block.cut ? "" : null);
    const { selected, saw } = this.model;
    set(node, "aria-expanded", real ? String(Boolean(selected && selected.take === take.id && selected.index === block.index)) : null);
    set(node, "data-saw", block.film && saw.includes(block.index) ? "" : null);
    set(node, "aria-disabled", real ? null : "true");
    const at = clock(block.first_frame / this.model.fps);
    set(node, "aria-label", real
      ? TEXT.chunk(block, at, (block.shot ?? 0) + 1)
      : `Block ${block.index + 1}: ${TEXT.outline[block.state] || block.state}`);
    if (real && block.prompt) set(node, "title", block.prompt);
    if (real) this.recall(block.key);
    const picture = this.thumbs.get(block.key);
    if (picture && node.picture !== picture) {
      if (node.picture) node.picture.remove();
      const copy = picture.isConnected ? picture.cloneNode() : picture;
      if (copy !== picture) copy.getContext("2d").drawImage(picture, 0, 0);
      copy.setAttribute("aria-hidden", "true");
      node.prepend(copy);
      node.picture = picture;
    }
  }

  // What every run of blocks with the same prompt is called, above them.
  drawPrompts(scale) {
    const runs = [];
    for (const block of this.film()) {
      const last = runs[runs.length - 1];
      if (!block.prompt) continue;
      if (last && last.prompt === block.prompt && last.shot === block.shot) last.end = block.first_frame + block.frames;
      else runs.push({ prompt: block.prompt, shot: block.shot, start: block.first_frame, end: block.first_frame + block.frames });
    }
    const words = JSON.stringify([runs, scale]);
    if (words === this.words) return;
    this.words = words;
    this.lane.replaceChildren();
    for (const run of runs) {
      const node = made("span", "tl-prompt", this.lane);
      node.dataset.hue = ((run.shot ?? 0) % SHOTS + SHOTS) % SHOTS;
      made("span", "", node).textContent = run.prompt;
      place(node, run.start * scale + 1, (run.end - run.start) * scale - 2);
    }
  }

  // events: {id, asked: second or null, landed: second or null, at: second where it is to land, cut, what}
  drawEvents(scale) {
    const { events, fps } = this.model, marks = JSON.stringify([events, scale]);
    if (marks === this.marks) return;
    this.marks = marks;
    this.events.replaceChildren();
    const x = (second) => second * fps * scale;
    const mark = (kind, second, event, says) => {
      const node = made("span", `tl-mark ${event.cut ? "is-cut" : ""}`, this.events);
      node.dataset.event = kind;
      node.dataset.eventId = event.id;
      node.setAttribute("role", "img");
      node.setAttribute("aria-label", says);
      node.title = says;
      place(node, x(second));
    };
    for (const event of events) {
      const what = `${event.cut ? "cut" : "change"}${event.what ? `: ${event.what}` : ""}`;
      const to = event.landed ?? event.at;
      if (event.asked !== null && to !== null) {
        const line = made("span", `tl-delay ${event.landed === null ? "is-open" : ""}`, this.events);
        place(line, x(Math.min(event.asked, to)), Math.abs(x(to) - x(event.asked)));
      }
      if (event.asked !== null) mark("asked", event.asked, event, `Asked at ${clock(event.asked)}, ${what}`);
      if (event.landed !== null) mark("landed", event.landed, event, `Landed at ${clock(event.landed)}, ${what}`);
      else if (event.at !== null) mark("expected", event.at, event, `Lands at ${clock(event.at)}, ${what}`);
    }
  }

  film() {
    const all = this.model.takes.flatMap((take) => take.blocks.filter((block) => block.film));
    return all.sort((one, other) => one.index - other.index);
  }

  // The picture that is on the screen becomes a block's own. Returns whether it was new.
  picture(key, video) {
    if (this.thumbs.has(key) || !video.videoWidth) return false;
    const canvas = document.createElement("canvas");
    Object.assign(canvas, THUMB);
    const fit = Math.max(THUMB.width / video.videoWidth, THUMB.height / video.videoHeight);
    const [width, height] = [video.videoWidth * fit, video.videoHeight * fit];
    canvas.getContext("2d").drawImage(video, (THUMB.width - width) / 2, (THUMB.height - height) / 2, width, height);
    this.thumbs.set(key, canvas);
    try {
      sessionStorage.setItem(KEPT + key, canvas.toDataURL("image/jpeg", 0.6));
    } catch { /* full: this block has no picture after a reload until it is shown again */ }
    return true;
  }

  // The picture that a block had before the page was loaded anew.
  recall(key) {
    const kept = !this.thumbs.has(key) && !this.asked.has(key) && sessionStorage.getItem(KEPT + key);
    if (!kept) return;
    this.asked.add(key);
    const image = new Image();
    image.onload = () => {
      if (this.thumbs.has(key)) return;
      const canvas = Object.assign(document.createElement("canvas"), THUMB);
      canvas.getContext("2d").drawImage(image, 0, 0);
      this.thumbs.set(key, canvas);
      if (this.model) this.draw(this.model);
    };
    image.src = kept;
  }

  // The play-head, at a second of the film.
  tick(second, moving) {
    if (!this.model) return;
    const x = second * this.model.fps * this.px;
    this.head.style.transform = `translateX(${x}px)`;
    const { scrollLeft, clientWidth } = this.root;
    if (this.follow && moving && (x > scrollLeft + clientWidth * 0.7 || x < scrollLeft)) this.root.scrollLeft = x - clientWidth * 0.45;
    if (x >= scrollLeft && x <= scrollLeft + clientWidth * 0.7) this.follow = true;
  }

  // ---- by keyboard: one stop for Tab, arrows within ------------------------------------------------------------------

  rove() {
    const current = this.root.contains(document.activeElement) && document.activeElement.name_;
    const fallback = this.film().filter((block) => block.state === "shown").pop();
    let stop = current || this.stop;
    if (!this.blocks.has(stop)) stop = [...this.blocks].find(([, node]) => fallback && node.chunk === fallback)?.[0] || this.blocks.keys().next().value;
    this.stop = stop;
    for (const [name, node] of this.blocks) node.tabIndex = name === stop ? 0 : -1;
  }

  key(event) {
    const node = document.activeElement;
    if (!node.name_ || event.altKey || event.ctrlKey || event.metaKey) return;
    const row = node.parentElement, inRow = [...row.querySelectorAll(".tl-block")].sort((a, b) => a.chunk.index - b.chunk.index);
    const here = inRow.indexOf(node);
    const rows = [...this.rows.values()].sort((a, b) => a.order - b.order);
    const nearest = (other) => other && [...other.querySelectorAll(".tl-block")].sort(
      (a, b) => Math.abs(a.chunk.index - node.chunk.index) - Math.abs(b.chunk.index - node.chunk.index))[0];
    const to = {
      ArrowRight: () => inRow[here + 1], ArrowLeft: () => inRow[here - 1], Home: () => inRow[0], End: () => inRow[inRow.length - 1],
      ArrowDown: () => nearest(rows[rows.indexOf(row) + 1]), ArrowUp: () => nearest(rows[rows.indexOf(row) - 1]),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = to();
    if (!next) return;
    this.follow = false;
    next.focus();
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.rove();
  }

  focus(take, index) {
    const node = this.blocks.get(`${take}:${index}`);
    if (node) node.focus();
  }
}
