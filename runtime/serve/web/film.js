// What is known of a film: its takes, their chunks, and the changes that were asked for. No picture, no network.

const KEPT = "longtake-events-";

export class Films {
  constructor() {
    this.clear();
  }

  clear() {
    Object.assign(this, { takes: new Map(), active: null, fps: 24, first: 29, later: 32 });
  }

  // A take by its id; one that is new is made. facts: {parent, from, total, endless, seed, state, count}
  take(id, facts = {}) {
    let take = this.takes.get(id);
    if (!take) {
      take = { id, parent: null, from: 0, chunks: [], count: 0, total: null, endless: true, seed: null, state: "", events: recalled(id) };
      this.takes.set(id, take);
    }
    return Object.assign(take, facts);
  }

  // Of which take a chunk of a film is: those before the point where it was taken again are its parent's.
  owner(take, index) {
    while (take.parent && index < take.from) take = this.take(take.parent);
    return take;
  }

  // Chunks of a take's film, from the first on without a gap.
  film(take) {
    const found = [];
    for (let index = 0; take; index += 1) {
      const chunk = this.owner(take, index).chunks[index];
      if (!chunk) break;
      found.push(chunk);
    }
    return found;
  }

  put(take, about, blob) {
    const owner = this.owner(take, about.generation_chunk_index);
    const index = about.generation_chunk_index;
    if (owner.chunks[index]) return owner.chunks[index];
    const start = about.first_frame / this.fps;
    const chunk = { ...about, index, start, end: start + about.num_frames / this.fps, blob, key: `${owner.id}:${index}`, seed: take.seed };
    owner.chunks[index] = chunk;
    owner.count = Math.max(owner.count, index + 1);
    for (const id of about.started_event_ids) this.landed(owner, id, chunk);
    return chunk;
  }

  // A change was asked for when the play-head stood at second `asked`.
  asked(take, id, { asked, prompt, cut, pressed }) {
    take.events.push({ id, asked, prompt, cut, pressed, chunk: null, landed: null, delay: null });
    remember(take);
  }

  queued(take, id, chunk) {
    const event = take.events.find((each) => each.id === id);
    if (event) event.chunk = chunk;
    remember(take);
    return event;
  }

  landed(take, id, chunk) {
    let event = take.events.find((each) => each.id === id);
    if (!event) { // asked for before this page was loaded, or elsewhere
      event = { id, asked: null, prompt: chunk.prompt, cut: chunk.cut, pressed: null, delay: null };
      take.events.push(event);
    }
    Object.assign(event, { chunk: chunk.index, landed: chunk.start });
    remember(take);
  }

  forget(take, id) {
    take.events = take.events.filter((event) => event.id !== id);
    remember(take);
  }

  // A family's takes in the order of its tree.
  family() {
    const all = [...this.takes.values()], ordered = [];
    const visit = (take) => {
      ordered.push(take);
      all.filter((each) => each.parent === take.id).forEach(visit);
    };
    all.filter((take) => !take.parent || !this.takes.has(take.parent)).forEach(visit);
    return ordered;
  }

  // Takes that the server knows and that belong to the same film as `id`.
  learn(rows, id) {
    const known = new Map(rows.map((row) => [row.id, row]));
    const root = (each) => {
      const seen = new Set();
      while (known.get(each)?.parent && !seen.has(each)) (seen.add(each), (each = known.get(each).parent));
      return each;
    };
    for (const row of [...rows].reverse()) {
      if (root(row.id) !== root(id)) continue;
      const take = this.take(row.id, { parent: row.parent || null, from: row.from_chunk });
      take.count = Math.max(take.count, row.chunks);
      if (row.parent && !known.has(row.parent)) this.take(row.parent, { gone: true });
    }
  }

  frames(index) {
    return index ? { first_frame: this.first + (index - 1) * this.later, frames: this.later } : { first_frame: 0, frames: this.first };
  }

  // The film as the CLI and this page read it: JSON, which is YAML, too.
  story(take) {
    const shots = [];
    for (const chunk of this.film(take)) {
      const shot = shots[shots.length - 1], parts = shot && [shot, ...(shot.then || [])], last = parts && parts[parts.length - 1];
      if (!shot || chunk.cut) shots.push({ prompt: chunk.prompt, chunks: 1 });
      else if (last.prompt === chunk.prompt) last.chunks += 1;
      else (shot.then = shot.then || []).push({ prompt: chunk.prompt, chunks: 1 });
    }
    return { name: take.id, ...(take.seed !== null && { seed: take.seed }), shots };
  }
}

// When changes were asked for is known to this page only; it outlives a reload.
function recalled(id) {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT + id)) || [];
  } catch {
    return [];
  }
}

function remember(take) {
  try {
    sessionStorage.setItem(KEPT + take.id, JSON.stringify(take.events.map((event) => ({ ...event, pressed: null }))));
  } catch { /* full: marks of this film are not kept over a reload */ }
}
