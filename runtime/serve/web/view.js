// What is drawn around the picture: words, notices, the numbers, a block's details, the list of shots, examples.

import { TEXT, examplesFor, firstPrompt, seconds } from "./text.js";
import { clock } from "./timeline.js";

export const $ = (id) => document.getElementById(id);

export const el = (tag, facts = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

export function fillWords() {
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = TEXT.page[node.dataset.t];
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", TEXT.page[node.dataset.label]);
    if (node.tagName === "BUTTON" && !node.querySelector("[data-t]")) node.title = TEXT.page[node.dataset.label];
  }
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = TEXT.page[node.dataset.placeholder];
  $("length").append(...TEXT.lengths.map(([value, name]) => el("option", { value, textContent: name })));
  $("keys-list").append(...TEXT.keys.map(([key, what]) => el("div", {}, el("dt", {}, ...key.split(" ").map((one) => el("kbd", { textContent: one }))), el("dd", { textContent: what }))));
}

// ---- notices: sentences that say what to do, with at most one action ----------------------------------------------------

export function notice(kind, words, action) {
  dismiss(kind);
  const box = el("div", { className: "notice", role: "alert" }, el("p", { textContent: words }));
  box.dataset.kind = kind;
  if (action) {
    const act = el("button", { type: "button", className: "second", textContent: action.name });
    act.addEventListener("click", () => (box.remove(), action.run()));
    box.append(act);
  }
  const close = el("button", { type: "button", className: "tool", ariaLabel: TEXT.page.close, innerHTML: '<svg><use href="#i-close" /></svg>' });
  close.addEventListener("click", () => box.remove());
  box.append(close);
  $("notices").append(box);
}

export const dismiss = (kind) => document.querySelectorAll(`.notice[data-kind="${kind}"]`).forEach((node) => node.remove());

// An error of the server as sentences; ours where we know better what can be done here.
export const told = (error) => TEXT.errors.code[error.code] || (error.code === "unreachable" ? TEXT.errors.unreachable : TEXT.errors.told(error));

let spoken = 0;
export function announce(words) {
  const now = ++spoken;
  $("announce").textContent = "";
  setTimeout(() => spoken === now && ($("announce").textContent = words), 60); // said again even if the words are the same
}

// ---- the three numbers ---------------------------------------------------------------------------------------------------

const show = (id, value, how) => {
  if ($(id).textContent !== value) $(id).textContent = value;
  if ($(`${id}-how`).textContent !== how) $(`${id}-how`).textContent = how;
};

// stats: {generated: {rate, chunks, where} or null, shown: {rate, dropped} or null, fps, delay: {value, waiting} or null}
export function drawNumbers({ generated, shown, fps, delay }) {
  const words = TEXT.numbers;
  show("fps-generated", generated ? generated.rate.toFixed(1) : words.none, generated ? words.generated(generated.chunks, generated.where) : words.generatedNone);
  show("fps-shown", shown ? shown.rate.toFixed(1) : words.none, shown ? words.shown(fps, shown.dropped) : words.shownNone);
  show("delay", delay ? seconds(delay.value) : words.none, delay ? (delay.waiting ? words.delayWaiting : words.delay) : words.delayNone);
}

// ---- a block ---------------------------------------------------------------------------------------------------------------

export function drawDetails(chunk, can) {
  $("details").hidden = !chunk;
  if (!chunk) return;
  $("details-title").textContent = `Block ${chunk.index + 1}`;
  const seed = chunk.seed === null || chunk.seed === undefined ? "" : ` · seed ${chunk.seed}`;
  $("details-facts").textContent = `${TEXT.made(chunk, clock(chunk.start))} · shot ${chunk.shot + 1}${chunk.cut ? ", begins with a cut" : ""}${seed}`;
  $("details-saw").textContent = TEXT.saw(chunk.visible.filter((one) => one !== chunk.index));
  const stages = Object.entries(chunk.ms).filter(([, value]) => value >= 0.05);
  const total = stages.reduce((sum, [, value]) => sum + value, 0) || 1;
  $("details-ms").replaceChildren(...stages.map(([name, value], order) => {
    const bar = el("i");
    bar.style.width = `${(100 * value) / total}%`;
    bar.dataset.order = order;
    return el("div", {}, el("span", { textContent: TEXT.stages[name] || name }), el("span", { className: "bar" }, bar), el("span", { className: "value", textContent: `${Math.round(value)} ms` }));
  }));
  $("retake-prompt").value = chunk.prompt;
  $("retake-cut").checked = false;
  $("retake-seed").checked = true;
  document.querySelectorAll(".for-cut").forEach((node) => (node.hidden = !can.cut || !chunk.index));
}

// ---- the shots ------------------------------------------------------------------------------------------------------------

let drawnShots = "";
export function drawShots(film, go) {
  const shots = [];
  for (const chunk of film) {
    let shot = shots[shots.length - 1];
    if (!shot || shot.number !== chunk.shot) shots.push((shot = { number: chunk.shot, start: chunk.start, prompts: [] }));
    if (shot.prompts[shot.prompts.length - 1]?.prompt !== chunk.prompt) shot.prompts.push({ prompt: chunk.prompt, start: chunk.start });
  }
  const now = JSON.stringify(shots);
  if (now === drawnShots) return;
  drawnShots = now;
  $("shots-box").hidden = !shots.length;
  $("shots").replaceChildren(...shots.map((shot) => {
    const lines = shot.prompts.map(({ prompt, start }) => {
      const line = el("button", { type: "button", className: "line" }, el("time", { textContent: clock(start) }), el("span", { textContent: prompt }));
      line.addEventListener("click", () => go(start));
      return line;
    });
    const item = el("li", {}, ...lines);
    item.dataset.hue = shot.number % 6;
    return item;
  }));
  $("shots").scrollTop = $("shots").scrollHeight;
}

// ---- before a film ----------------------------------------------------------------------------------------------------------

export function drawExamples(model, begin) {
  $("prompt").placeholder = TEXT.example(firstPrompt(examplesFor(model)[1]));
  $("examples").replaceChildren(...examplesFor(model).map((story) => {
    const card = el("button", { type: "button" }, el("b", { textContent: story.title }), el("span", { textContent: firstPrompt(story) }));
    card.addEventListener("click", () => begin(story));
    return el("li", {}, card);
  }));
}

export function theme(step) {
  const names = ["auto", "light", "dark"];
  const at = (names.indexOf(localStorage.getItem("longtake-theme") || "auto") + step) % names.length;
  localStorage.setItem("longtake-theme", names[at]);
  if (at) document.documentElement.dataset.theme = names[at];
  else delete document.documentElement.dataset.theme;
  $("theme").title = TEXT.theme[names[at]];
  $("theme").setAttribute("aria-label", TEXT.theme[names[at]]);
}

export function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
