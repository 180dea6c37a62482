// A film that is made while it is watched: the session, and everything that the viewer asks of it.

import { Films } from "./film.js";
import { Link, ask, token } from "./link.js";
import { Meters } from "./meters.js";
import { Player, canPlay } from "./player.js";
import { TEXT, firstPrompt } from "./text.js";
import { $, announce, dismiss, notice, save, told } from "./view.js";

export const WINDOW = 2; // chunks ahead of the picture: more of them, and a change would land later
const FLOW = { mode: "ack", window: WINDOW };
const PATIENCE = 20, MINE_MS = 15_000; // half seconds, and since when, that the server has to put this page's film before this one aside
const ENDED = ["done", "stopped", "failed"];

export const hooks = { draw() {}, frame() {}, moved() {} }; // of the screen: something is new, a frame was shown, the play-head leapt
export const films = new Films();
export const meters = new Meters();
// phase: idle | connecting | queued | live | moved | reconnecting | parked | ended | unsupported. reason: why nothing can be begun yet.
export const state = { model: null, phase: "idle", reason: "", paused: false, selected: null, acked: -1, tries: 0, resumeAt: null, jump: null, first: null, again: 0, waits: false, away: false };
export const player = new Player($("video"), { problem: onProblem, blocked: () => ($("unblock").hidden = false), frame: (...frame) => hooks.frame(...frame) });
export const link = new Link({ message: onMessage, chunk: onChunk, closed: onClosed });
export const now = () => $("video").currentTime;
export const take = () => films.active;
export const live = () => Boolean(take()) && !ENDED.includes(take().state) && ["live", "reconnecting", "moved"].includes(state.phase);
const draw = () => hooks.draw();

// ---- the session -----------------------------------------------------------------------------------------------------------

export async function begin(story) {
  const prompt = $("prompt").value.trim();
  if (!story && !prompt) return (notice("input", TEXT.errors.empty), $("prompt").focus());
  const typed = $("seed").value.trim();
  if (typed && !(/^\d{1,16}$/.test(typed) && Number.isSafeInteger(Number(typed)))) return ($("options").open = true, notice("input", TEXT.errors.seed), $("seed").focus());
  dismiss("input");
  reset();
  const seconds = $("length").value, picture = $("image").files[0];
  const asked = { type: "session.start", seed: typed ? Number(typed) : (story?.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]), flow: FLOW };
  if (story) asked.story = { ...story, name: story.name || story.title, title: undefined, seed: undefined };
  else asked.prompt = prompt;
  if (seconds) asked.seconds = seconds;
  else asked.endless = true;
  if (picture && state.model?.can.image) asked.image_reference = { image_url: await dataUrl(picture) };
  if (story) $("prompt").value = firstPrompt(story);
  await connect(asked);
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = Object.assign(new FileReader(), { onload: () => resolve(reader.result), onerror: reject });
  reader.readAsDataURL(file);
});

// `again`: how often the place that this page's own film before this one holds was waited for.
async function connect(first, again = 0) {
  state.phase = state.phase === "reconnecting" ? "reconnecting" : "connecting";
  Object.assign(state, { first, again });
  dismiss("session");
  draw();
  try {
    await link.begin(first);
  } catch (error) {
    state.phase = "idle";
    onError(error);
  }
}

export function resume(id, from = 0) {
  return connect({ type: "session.resume", session_id: id, next_chunk: from, flow: FLOW });
}

export function reset() {
  link.end();
  films.clear();
  meters.clear();
  player.show([]);
  player.finished = false;
  Object.assign(state, { phase: "idle", paused: false, selected: null, acked: -1, resumeAt: null, jump: null });
  history.replaceState(null, "", location.pathname);
  draw();
}

export function retake(event) {
  event.preventDefault();
  const chunk = chosen();
  if (!chunk) return notice("input", TEXT.retake.ended);
  const prompt = $("retake-prompt").value.trim(), cut = $("retake-cut").checked && !$("retake-cut").closest("label").hidden;
  const asked = { type: "session.retake", session_id: take().id, from_chunk: chunk.index, next_chunk: chunk.index, flow: FLOW };
  if (prompt && prompt !== chunk.prompt) asked.prompt = prompt;
  if (cut) asked.cut = true;
  if ($("retake-seed").checked) asked.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  $("prompt").value = prompt || chunk.prompt;
  state.selected = null;
  state.jump = chunk.start;
  connect(asked);
}

// Show another take of the same film: what is here already is not sent again.
export function openTake(id) {
  if (!take() || id === take().id || films.take(id).gone) return;
  const known = films.take(id);
  films.active = known;
  state.jump = known.from ? films.frames(known.from).first_frame / films.fps : 0;
  state.selected = null;
  resume(id, films.film(known).length);
}

const handlers = {
  "session.queued": ({ ahead, estimate_s }) => Object.assign(state, { phase: "queued", ahead, wait: estimate_s }),
  "video.start": onStart,
  "session.interaction.queued": ({ event_id, at_chunk }) => {
    const event = films.queued(take(), event_id, at_chunk);
    if (event?.cut || event?.prompt) $("prompt").value = event.prompt || $("prompt").value;
  },
  "session.paused": () => (state.paused = true),
  "session.continued": () => (state.paused = false),
  "session.moved": () => (state.phase = "moved"),
  "session.done": ({ stopped }) => finish(stopped ? "stopped" : "done"),
  error: onError,
};

function onMessage(message) {
  handlers[message.type]?.(message);
  draw();
}

function onStart(message) {
  const { config, session_id: id } = message;
  if (!canPlay.type(message.mime)) return (link.end(), unsupported(TEXT.errors.codec(message.mime)));
  Object.assign(films, { fps: config.fps, first: config.first_chunk_frames, later: config.chunk_frames });
  const opened = films.take(id, { parent: config.parent || null, from: config.from_chunk || 0, total: config.chunks, endless: config.endless, seed: config.seed, state: "live" });
  if (config.parent) films.take(config.parent);
  const same = films.active === opened && state.phase === "reconnecting";
  const kept = Number(sessionStorage.getItem(`longtake-at-${id}`));
  films.active = opened;
  if ($("pad").dataset.take !== id) press(null); // a take that goes on moves on
  $("pad").dataset.take = id;
  Object.assign(state, { phase: "live", paused: false, tries: 0, acked: message.next_chunk - 1 });
  player.finished = false;
  meters.interrupted();
  for (let next = 0; next < WINDOW; next += 1) if (!config.parent && !message.next_chunk && !same && !kept) meters.go(next);
  if (!player.source || player.mime !== message.mime) player.open(message.mime, config.fps);
  if (location.hash !== `#session=${id}`) history.replaceState(null, "", `#session=${id}`);
  if (!same && state.jump === null && kept && !films.film(opened).length) state.resumeAt = kept;
  refresh();
  if (state.jump !== null && state.jump < player.end) goTo(state.jump);
  else if (!same && state.jump === null && state.resumeAt === null) goTo(0);
  family(id);
  player.play();
}

// Other takes of the same film, so that they stand in the timeline after a reload, too.
async function family(id) {
  try {
    films.learn((await ask("/v1/realtime/sessions")).data, id);
    draw();
  } catch { /* the film plays without */ }
}

function onChunk(about, init, media) {
  if (!take()) return;
  if (init && !player.init) player.init = init;
  state.phase = "live";
  films.put(take(), about, new Blob([media]));
  refresh();
  meters.arrived(about);
  if (state.resumeAt !== null && player.end > state.resumeAt) (goTo(state.resumeAt), (state.resumeAt = null));
  if (state.jump !== null && player.end > state.jump) (goTo(state.jump), (state.jump = null));
  if (player.film.length === 1 || $("video").paused) state.paused || player.play();
  draw();
}

function refresh() {
  player.show(films.film(take()));
}

function finish(how) {
  take().state = how;
  take().total = films.film(take()).length;
  state.phase = "ended";
  player.finished = true;
  if (state.resumeAt !== null) (goTo(Math.min(state.resumeAt, Math.max(0, player.end - 2))), (state.resumeAt = null));
  player.pump();
  if (how === "done") announce(TEXT.state.done);
}

export function onError(error) {
  const words = told(error);
  if (error.event_id && take()) films.forget(take(), error.event_id);
  if (error.status === 401 || error.code === "unauthorized") return askToken();
  if (error.code === "not_found" && player.film.length) return (finish("stopped"), notice("session", TEXT.errors.lost), draw());
  if (error.code === "not_found") reset();
  if (error.code === "quota" && performance.now() - link.left < MINE_MS && state.again < PATIENCE) return void (state.waits = true);
  if (error.code === "not_ready" && toResume()) return void (state.away = true); // no worker is there just now
  if (["engines_differ", "chunk_failed", "failed", "worker_lost", "internal_error"].includes(error.code) && take()) finish("failed");
  const back = take() && { taken_over: TEXT.actions.takeBack, idle: TEXT.actions.resume, quota: TEXT.actions.resume, no_capacity: TEXT.actions.resume }[error.code];
  notice("session", words, back ? { name: back, run: () => resume(take().id, films.film(take()).length) } : null);
  draw();
}

function onClosed(code) {
  if (state.waits) return void ((state.waits = false), setTimeout(() => state.phase === "connecting" && connect(state.first, state.again + 1), 500));
  if (state.away) return ((state.away = false), reconnect(), draw());
  if (["ended", "idle"].includes(state.phase)) return draw();
  if ([4408, 4409].includes(code) && take()) {
    state.phase = "parked";
    $("video").pause();
  } else if (code >= 4400 || code === 1000) {
    state.phase = take() && take().chunks.length ? "parked" : "idle";
  } else reconnect();
  draw();
}

// The session that is here, or that was asked for by the page's address.
const toResume = () => take()?.id || (state.first?.type === "session.resume" ? state.first.session_id : "");

// The server or the way to it is gone: what is here plays on, and the film goes on where it was once there is an answer.
function reconnect() {
  const id = toResume();
  state.phase = "reconnecting";
  state.tries += 1;
  if (state.tries === 3) notice("session", TEXT.errors.unreachable);
  setTimeout(async () => {
    if (state.phase !== "reconnecting") return;
    const there = await ask("/ready").then(() => true, (error) => error.status === 401);
    if (state.phase !== "reconnecting") return;
    if (!there) return reconnect();
    dismiss("session");
    if (id) resume(id, take() ? films.film(take()).length : 0);
    else (state.phase = "idle", draw());
  }, Math.min(4000, 250 * 2 ** state.tries));
}

// ---- what the viewer asks for --------------------------------------------------------------------------------------------------

const newId = () => `e${Date.now().toString(36)}${Math.floor(Math.random() * 1e6).toString(36)}`;

export function change(cut) {
  if (!live()) return;
  const prompt = $("prompt").value.trim();
  if (!prompt && !cut) return (notice("input", TEXT.errors.empty), $("prompt").focus());
  dismiss("input");
  const id = newId();
  const event = { ...(prompt && { prompt }), ...(cut && { cut: true }) };
  films.asked(take(), id, { asked: now(), prompt, cut, pressed: performance.now() });
  if (!link.send({ type: "session.interaction", interaction: { event_id: id, event } })) {
    films.forget(take(), id);
    notice("session", TEXT.errors.unreachable);
  }
  draw();
}

// A move of the camera, where the model has one; it holds until the next one. Returns whether it was sent.
export function steer(camera) {
  return live() && link.send({ type: "session.interaction", interaction: { event_id: newId(), event: { multi_modal_data: { camera } } } });
}

// Show which key of the camera holds; null: none.
export function press(key) {
  for (const each of $("pad").querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === key));
}

export function togglePause() {
  if (!take()) return;
  const wish = !($("video").paused || state.paused);
  if (wish) $("video").pause();
  else player.play();
  if (state.phase === "parked") return resume(take().id, films.film(take()).length);
  if (live()) link.send({ type: wish ? "session.pause" : "session.continue" });
  state.paused = wish;
  meters.interrupted();
  meters.disturbed(take());
  draw();
}

export function stop() {
  if (live() || state.phase === "queued") link.send({ type: "session.stop" });
}

export function goTo(second) {
  meters.disturbed(take());
  player.seek(second);
  hooks.moved(second);
}

export const newest = () => player.film.length && goTo(player.film[player.film.length - 1].start);

export function chosen() {
  const { selected } = state;
  return (selected && films.takes.get(selected.take)?.chunks[selected.index]) || null;
}

// ---- problems ------------------------------------------------------------------------------------------------------------------

export function onProblem(reason) {
  notice("media", TEXT.errors.media(reason), { name: TEXT.actions.reload, run: () => (player.reload(), player.play()) });
}

export function unsupported(words) {
  state.phase = "unsupported";
  notice("session", words);
  draw();
}

function askToken() {
  $("door").hidden = false;
  $("token").focus();
  notice("session", TEXT.errors.code.unauthorized);
}

// ---- files -------------------------------------------------------------------------------------------------------------------------

export function download() {
  const file = player.file();
  if (!file) return notice("input", TEXT.errors.nofilm);
  save(file, TEXT.files.film(take().id));
}

export function share() {
  const story = take() && films.story(take());
  if (!story?.shots.length) return notice("input", TEXT.errors.storyEmpty);
  save(new Blob([JSON.stringify(story, null, 2)], { type: "application/yaml" }), TEXT.files.story(take().id));
}

export async function openStory(file) {
  try {
    const story = JSON.parse(await file.text());
    if (!story.shots?.[0]?.prompt) throw new Error("no shots");
    await begin(story);
  } catch {
    notice("input", TEXT.errors.story);
  }
}
