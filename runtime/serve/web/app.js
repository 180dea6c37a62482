// The page begins here: words, keys and buttons are tied to what they do, then it is asked what is served.

import { ask, token } from "./link.js";
import * as live from "./live.js";
import { $, dismiss, drawExamples, fillWords, notice, theme, told } from "./view.js";
import { canPlay } from "./player.js";
import * as screen from "./screen.js";
import { TEXT } from "./text.js";

const { state, player, meters, hooks } = live;
const TICK_MS = 200, READY_MS = 1000;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

Object.assign(hooks, { draw: screen.draw, frame: screen.onFrame, moved: screen.moved });

const on = (id, kind, run) => $(id).addEventListener(kind, run);
const click = (id, run) => on(id, "click", () => run());

function send(cut) {
  if (live.live()) live.change(cut);
  else if (!$("start").hidden && !$("start").disabled) live.begin();
}

function wire() {
  on("composer", "submit", (event) => (event.preventDefault(), send(false)));
  on("prompt", "keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    const cuts = event.shiftKey && live.live() && !$("cut").hidden;
    send(cuts);
  });
  on("door", "submit", (event) => {
    event.preventDefault();
    token.set($("token").value.trim());
    $("token").value = "";
    $("door").hidden = true;
    dismiss("session");
    ready();
  });
  for (const [id, run] of [["cut", () => live.change(true)], ["pause", live.togglePause], ["stop", live.stop], ["fresh", fresh], ["newest", live.newest],
    ["download", live.download], ["share", live.share], ["full", full], ["theme", () => theme(1)], ["help", () => $("keys").showModal()],
    ["details-close", () => screen.select()], ["play-from", playFrom], ["unblock", unblock], ["open-story", () => $("story-file").click()]]) click(id, run);
  on("retake-form", "submit", live.retake);
  on("retake-prompt", "keydown", (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && live.retake(event));
  on("story-file", "change", ({ target }) => target.files[0] && live.openStory(target.files[0]).then(() => (target.value = "")));
  click("video", live.togglePause);
  for (const name of ["play", "pause", "ended", "seeked"]) on("video", name, () => screen.draw());
  on("video", "waiting", () => meters.waiting(true));
  on("video", "playing", () => (meters.waiting(false), ($("unblock").hidden = true)));
  document.addEventListener("keydown", shortcut);
  addEventListener("hashchange", fromAddress);
  addEventListener("resize", () => screen.draw());
  document.addEventListener("visibilitychange", () => document.hidden || player.pump());
}

function fresh() {
  live.reset();
  $("prompt").value = "";
  $("prompt").focus();
}

function full() {
  if (document.fullscreenElement) document.exitFullscreen();
  else if ($("frame").requestFullscreen) $("frame").requestFullscreen();
  else $("video").webkitEnterFullscreen?.();
}

function playFrom() {
  const chunk = live.chosen();
  if (!chunk) return;
  live.goTo(chunk.start);
  if (state.paused || $("video").paused) live.togglePause();
}

function unblock() {
  $("unblock").hidden = true;
  player.play();
}

const keys = {
  " ": live.togglePause, "/": () => ($("prompt").focus(), $("prompt").select()), n: live.newest, d: live.download, f: full,
  t: () => $("timeline").querySelector('.tl-block[tabindex="0"]')?.focus(), "?": () => $("keys").showModal(),
  ArrowLeft: () => step(-1), ArrowRight: () => step(1),
};

function step(by) {
  const to = player.film[player.at(live.now()) + by];
  if (to) live.goTo(to.start);
}

function shortcut(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (key === "Escape") {
    if (target.matches("#prompt, #seed")) return target.blur();
    if (state.selected) return screen.select();
  }
  if (target.closest("textarea, input, select, summary") || (key === " " && target.closest("button")) || (key.startsWith("Arrow") && target.closest("#timeline"))) return;
  const run = keys[key.length === 1 ? key.toLowerCase() : key];
  if (run) (event.preventDefault(), run());
}

// A faint light around the picture, of its own colours.
function glow() {
  const canvas = $("glow").getContext("2d"), video = $("video");
  if (!calm.matches && !document.hidden && video.readyState >= 2) canvas.drawImage(video, 0, 0, 16, 16);
}

// A key of the pad holds until it is pressed again, or another one is. In each frame: 25 mm of way, or 0.6 degrees of turn.
function pad() {
  const way = 0.025, turn = Math.sin((0.6 * Math.PI) / 360), rest = Math.cos((0.6 * Math.PI) / 360), still = [0, 0, 0], ahead = [0, 0, 0, 1];
  const moves = [[[0, 0, way], ahead], [[-way, 0, 0], ahead], [[way, 0, 0], ahead], [[0, 0, -way], ahead], [still, [0, -turn, 0, rest]], [still, [0, turn, 0, rest]]];
  $("pad").append(...TEXT.camera.map(([name, sign], order) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: sign, title: name, className: "second" });
    button.setAttribute("aria-label", name);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const held = button.getAttribute("aria-pressed") === "true";
      const [translation, rotation] = held ? [still, ahead] : moves[order];
      if (live.steer({ mode: "velocity", data: { translation, rotation } })) live.press(held ? null : button);
    });
    return button;
  }));
}

function fromAddress() {
  const id = /^#session=([\w-]+)$/.exec(location.hash)?.[1];
  if (!id || id === live.take()?.id) return;
  live.reset();
  live.resume(id);
}

// Ask until the model is there; then begin with the film that the address names.
async function ready() {
  try {
    const [card] = (await ask("/v1/models")).data, first = !state.model;
    Object.assign(state, { model: card.longtake, reason: "", gpu: card.longtake.measured?.gpu || null });
    $("model").textContent = `${card.id} · ${TEXT.model(card.longtake)}`;
    document.documentElement.style.setProperty("--ratio", `${card.longtake.width} / ${card.longtake.height}`);
    document.documentElement.style.setProperty("--ratio-number", card.longtake.width / card.longtake.height);
    document.querySelectorAll(".for-image").forEach((node) => (node.hidden = !card.longtake.can.image));
    drawExamples(card.longtake, live.begin);
    if (first) fromAddress();
    dismiss("ready");
  } catch (error) {
    if (error.status === 401) return live.onError(error);
    state.reason = error.status === 503 ? error.message : "";
    if (!error.status) notice("ready", told(error));
    setTimeout(ready, READY_MS);
  }
  screen.draw();
}

fillWords();
theme(0);
wire();
pad();
screen.draw();
setInterval(screen.tick, TICK_MS);
setInterval(glow, 150);
if (canPlay.sources()) ready();
else live.unsupported(TEXT.errors.mse);
