// What is seen of it all: the timeline's model, the state in words, the numbers; and which block is looked at.

import { WINDOW, chosen, films, goTo, link, live, meters, now, openTake, player, state, take } from "./live.js";
import { TEXT } from "./text.js";
import { Timeline, clock } from "./timeline.js";
import { $, announce, drawDetails, drawNumbers, drawShots } from "./view.js";

const PING_MS = 15_000;

export const timeline = new Timeline($("timeline"), { select, open: openTake });
let pinged = 0, looked = null, typed = false; // typed: there was something in the prompt box

// Open the details of a block; no arguments close them.
export function select(id, index) {
  const before = state.selected;
  const same = before && before.take === id && before.index === index;
  state.selected = id && !same ? { take: id, index } : null;
  if (state.selected && !films.film(take()).includes(chosen())) openTake(id);
  state.selected = id && !same ? { take: id, index } : null;
  draw();
  if (chosen() && matchMedia("(max-width: 900px)").matches) $("details").scrollIntoView({ block: "nearest" });
  if (!state.selected && before) timeline.focus(before.take, before.index);
}

export function moved(second) {
  timeline.follow = true;
  timeline.tick(second, true);
}

// ---- what is on the screen -------------------------------------------------------------------------------------------------------

export function onFrame(second, at) {
  meters.frame(at);
  const chunk = player.film[player.at(second)];
  if (!chunk || !take()) return;
  const well = second - chunk.start > 0.4 * (chunk.end - chunk.start); // into it: its first frames may still be the shot before
  if (well && timeline.picture(chunk.key, $("video"))) draw();
  const delay = meters.landed(take(), second, at, films.fps);
  if (delay) announce(TEXT.landed(delay.prompt, delay.cut, delay.value));
}

export function tick() {
  const index = player.at(now());
  if (take() && link.open && index > state.acked && ["live", "moved"].includes(state.phase) && $("video").readyState >= 2) {
    state.acked = index;
    if (index + WINDOW >= player.film.length && !state.paused) meters.go(index + WINDOW);
    link.send({ type: "session.ack", chunk: index, ...meters.stalled() });
    draw();
  }
  if (take() && link.open && performance.now() - pinged > PING_MS) {
    pinged = performance.now();
    link.send({ type: "session.ping" });
  }
  if (take() && player.film.length && state.resumeAt === null) sessionStorage.setItem(`longtake-at-${take().id}`, now().toFixed(3));
  pace();
  drawState();
  timeline.tick(now(), !$("video").paused);
  drawNumbers(meters.read($("video"), films.fps, take(), state.gpu));
}

// Where the model is slower than the film, it plays slower rather than in jerks, and says so.
function pace() {
  const made = meters.generated(), waiting = live() && !state.paused && player.film.length;
  const short = player.bufferedAhead < films.later / films.fps, well = player.bufferedAhead > (1.6 * films.later) / films.fps;
  let rate = $("video").playbackRate;
  if (!waiting || well || !made) rate = 1;
  else if (short && made.rate < films.fps * 0.97) rate = Math.max(0.5, Math.round((10 * made.rate) / films.fps) / 10);
  if (rate !== $("video").playbackRate) $("video").playbackRate = rate;
}

function stateNow() {
  const { phase } = state, video = $("video"), words = TEXT.state;
  if (phase === "unsupported") return [phase, words.unsupported];
  if (phase === "queued") return [phase, words.queued(state.ahead, state.wait)];
  if (phase === "idle") return state.reason ? ["opening", words.opening] : [phase, words.idle];
  if (phase === "connecting" || (phase === "reconnecting" && player.bufferedAhead < 0.2)) return [phase, words[phase]];
  if (phase === "moved") return [phase, words.moved];
  if (!player.film.length) return ["starting", take()?.parent || state.resumeAt !== null ? words.replaying : words.starting];
  if (phase === "ended" && (video.ended || player.end - now() < 0.1)) return [take().state, words[take().state]];
  if (phase === "parked") return [phase, words.parked];
  if (state.paused || (video.paused && phase === "ended")) return ["paused", words.paused];
  if (video.readyState < 3 || player.bufferedAhead < 0.02) return ["buffering", words.buffering];
  return video.playbackRate < 0.95 ? ["slow", words.slow(video.playbackRate)] : ["playing", words.playing];
}

function drawState() {
  const [name, words] = stateNow();
  if ($("state").textContent !== words) $("state").textContent = words;
  $("state").dataset.state = name;
  $("making").hidden = player.film.length > 0 || !["connecting", "starting", "queued"].includes(name);
  $("time").textContent = player.film.length ? `${clock(now())} / ${clock(player.end)}` : "";
  const stands = state.paused || state.phase === "parked" || (state.phase === "ended" && $("video").paused);
  const verb = stands ? (live() ? TEXT.page.resume : TEXT.page.play) : TEXT.page.pause;
  if ($("pause-text").textContent !== verb) {
    $("pause-text").textContent = verb;
    $("pause").setAttribute("aria-label", verb); // the word itself is not shown on a phone
  }
  $("pause-icon").setAttribute("href", stands ? "#i-play" : "#i-pause");
  $("newest").hidden = !player.film.length || player.end - now() < ((WINDOW + 2) * films.later) / films.fps;
  drawHint();
}

function drawHint() {
  const open = take()?.events.filter((event) => event.landed === null) || [], last = open[open.length - 1];
  let words = live() ? (state.model?.can.cut ? TEXT.hint.live : TEXT.hint.liveWithoutCut) : { ended: TEXT.hint.over, parked: TEXT.hint.parked, connecting: TEXT.hint.pending, queued: TEXT.hint.pending }[state.phase] || TEXT.hint.idle;
  const arriving = take()?.events.filter((event) => event.chunk !== null && event.landed !== null && event.landed > now()).pop();
  if (live() && last) words = last.chunk === null ? TEXT.hint.asked : TEXT.hint.lands(last.chunk, films.frames(last.chunk).first_frame / films.fps - now());
  else if (live() && arriving) words = TEXT.hint.lands(arriving.chunk, arriving.landed - now());
  if ($("hint").textContent !== words) $("hint").textContent = words;
}

// Everything that does not change with every frame.
export function draw() {
  const film = player.film, running = live();
  const mode = take() || !["idle", "unsupported"].includes(state.phase) ? (running ? "live" : "film") : "idle";
  document.body.dataset.mode = mode;
  $("welcome").hidden = mode !== "idle";
  $("examples-title").textContent = state.reason ? `${state.reason}.` : state.model ? TEXT.examplesTitle : "";
  const pending = ["connecting", "queued"].includes(state.phase); // a film, or another take of it, is on its way
  $("start").hidden = running || pending || (mode === "film" && state.phase !== "ended");
  $("start").disabled = Boolean(state.reason) || state.phase === "unsupported";
  $("change").hidden = !running && !pending;
  $("cut").hidden = $("change").hidden || !state.model?.can.cut;
  $("change").disabled = $("cut").disabled = pending;
  $("options").hidden = running || pending;
  $("fresh").hidden = mode === "idle";
  $("camera").hidden = !running || !state.model?.can.camera;
  $("pause").disabled = !film.length;
  $("stop").disabled = !running && state.phase !== "queued";
  $("download").disabled = $("share").disabled = !film.length;
  $("prompt-label").textContent = running || pending ? TEXT.ask.live : TEXT.ask.idle;
  $("film-empty").hidden = Boolean(take());
  const shown = film[player.at(now())];
  if (shown && state.resumeAt === null && !typed && $("prompt").value === "" && document.activeElement !== $("prompt")) (($("prompt").value = shown.prompt), (typed = true));
  timeline.draw(model(film));
  if (looked !== chosen()) drawDetails((looked = chosen()), state.model?.can || {});
  drawShots(film, goTo);
  drawState();
}

function model(film) {
  const inFilm = new Set(film), family = films.family().filter((each) => each.chunks.length || each === take() || each.count > each.from);
  const saw = chosen() ? chosen().visible : [];
  const shown = player.at(now());
  const takes = family.map((each, order) => ({
    id: each.id, from: each.from, number: order + 1, active: each === take(),
    blocks: [...blocksOf(each, inFilm, shown), ...(each === take() ? outlines(film) : [])],
  }));
  const events = [];
  for (let index = 0, seen = new Set(); take() && index <= Math.max(film.length, take().from); index += 1) {
    const owner = films.owner(take(), index);
    if (seen.has(owner)) continue;
    seen.add(owner);
    for (const event of owner.events) {
      if ((event.chunk === null ? take() : films.owner(take(), event.chunk)) !== owner) continue;
      const at = event.chunk === null ? null : films.frames(event.chunk).first_frame / films.fps;
      events.push({ id: event.id, asked: event.asked, landed: event.landed, at, cut: event.cut, what: event.prompt });
    }
  }
  return { fps: films.fps, takes, events, selected: state.selected, saw };
}

function blocksOf(each, inFilm, shown) {
  const blocks = [];
  for (let index = each.from; index < Math.max(each.count, each.chunks.length); index += 1) {
    const chunk = each.chunks[index];
    if (!chunk) blocks.push({ index, ...films.frames(index), state: "away", film: false, key: `${each.id}:${index}` });
    else blocks.push({ ...chunk, frames: chunk.num_frames, state: timeline.thumbs.has(chunk.key) || (inFilm.has(chunk) && index <= shown) ? "shown" : "ready", film: inFilm.has(chunk) });
  }
  return blocks;
}

// What is being made, and what is to come: by the rule that no block is begun before the one WINDOW ahead of it is shown.
function outlines(film) {
  if (!live() && !["connecting", "queued"].includes(state.phase)) return [];
  const until = take().endless ? film.length + WINDOW : Math.min(take().total ?? 0, film.length + 40);
  const blocks = [];
  for (let index = film.length; index < until; index += 1) {
    const begun = index === film.length && index - WINDOW <= state.acked && !state.paused;
    blocks.push({ index, ...films.frames(index), state: begun ? "generating" : "planned", film: true, key: `${take().id}:${index}` });
  }
  return blocks;
}
