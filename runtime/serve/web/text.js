// Every word of the page, in one place. Functions take what is told; the rest is said as it stands.

const seconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
const sentence = (text) => {
  const trimmed = String(text || "").trim();
  return trimmed && trimmed[0].toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
};

export const TEXT = {
  page: {
    headline: "A film that is made while you watch it",
    lead: "Type a scene. The first picture comes within seconds, and whatever you type next happens in it.",
    stage: "Picture", video: "The film", transport: "Playback", timeline: "Timeline: arrow keys move, Enter opens a block",
    fresh: "New film", openStory: "Open a story", help: "Keyboard", close: "Close", stop: "Stop", play: "Play", pause: "Pause",
    resume: "Continue", newest: "Newest", download: "Download the film", share: "Save its story as a file", full: "Full screen",
    start: "Start", change: "Change", cut: "Cut", options: "Options", length: "Length", seed: "Seed", seedAny: "a new one each time",
    image: "Begin with a picture", camera: "Camera", film: "Film", filmEmpty: "Your film appears here, block by block.",
    retakePrompt: "Prompt from here on", retakeCut: "Cut here", retakeSeed: "Another seed", retake: "Retake from here",
    playFrom: "Play from here", shots: "Shots", numbers: "Measured", generated: "Generated", shown: "Shown", delay: "Delay",
    token: "This server asks for a token", enter: "Enter",
  },
  lengths: [["", "until I stop it"], ["10", "10 seconds"], ["30", "30 seconds"], ["60", "1 minute"], ["180", "3 minutes"]],
  keys: [
    ["Enter", "start, or change the prompt"], ["Shift Enter", "cut to a new shot"], ["/", "go to the prompt"],
    ["Esc", "leave the prompt, close a panel"], ["Space", "pause, continue"], ["← →", "one block back, one on"], ["N", "go to the newest picture"],
    ["T", "go to the timeline"], ["D", "download"], ["F", "full screen"], ["?", "this list"],
  ],
  camera: [["Forward", "↑"], ["Left", "←"], ["Right", "→"], ["Back", "↓"], ["Turn left", "↶"], ["Turn right", "↷"]],
  state: {
    idle: "Ready",
    opening: "Getting ready",
    connecting: "Connecting",
    queued: (ahead, seconds) => (ahead ? `Waiting: ${ahead} ahead of you` : "You are next")
      + (seconds ? `, in about ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`}` : ""),
    starting: "Making the first picture",
    replaying: "Rebuilding the film",
    playing: "Playing",
    slow: (rate) => `Playing at ${rate.toFixed(1)}×`,
    buffering: "Buffering",
    paused: "Paused",
    reconnecting: "Reconnecting",
    moved: "Moving to another worker; the film goes on by itself",
    done: "The film is complete",
    stopped: "Stopped",
    parked: "Kept for later",
    failed: "This take has failed",
    unsupported: "This browser cannot play it",
  },
  ask: { idle: "Type what you want to see", live: "What happens next?" },
  example: (prompt) => `For example: ${prompt}`,
  hint: {
    idle: "Enter starts.",
    live: "Enter changes it, Shift+Enter cuts to a new shot.",
    liveWithoutCut: "Enter changes it.",
    pending: "A moment, then you can change it.",
    asked: "Sent.",
    lands: (chunk, wait) => `Lands with block ${chunk + 1}${wait > 0.05 ? `, in ${seconds(wait)} of film` : ""}.`,
    parked: "Press play to go on.",
    over: "This take has ended. Click a block to take it again from there.",
  },
  landed: (prompt, cut, delay) => `${cut ? "Cut" : "Change"} is on the screen${delay ? ` after ${seconds(delay)}` : ""}${prompt ? `: ${prompt}` : ""}`,
  chunk: (chunk, at, shot) => `Block ${chunk.index + 1}, at ${at}, shot ${shot}: ${chunk.prompt || "being made"}`,
  outline: { generating: "being made", planned: "planned" },
  take: (number, from) => (number === 1 ? "First take" : `Take ${number}, from block ${from + 1}`),
  made: (chunk, at) => `${chunk.num_frames} frames from ${at}`,
  saw: (visible) => (visible.length ? `It saw ${visible.length === 1 ? "block" : "blocks"} ${visible.map((one) => one + 1).join(", ")}.` : ""),
  stages: { conditions: "prompt", denoise: "denoise", clean: "remember", decode: "decode", encode: "encode" },
  model: (about) => `${about.width}×${about.height}, ${about.fps} frames a second, ${about.steps} steps`,
  on: (gpu) => gpu || "without a GPU",
  numbers: {
    none: "–",
    generated: (count, where) => `frames a second, ${count === 1 ? "one block" : `${count} blocks`}, ${where}`,
    generatedNone: "frames a second",
    shown: (fps, dropped) => `of ${fps} frames a second${dropped ? `, ${dropped} dropped in all` : " on your screen"}`,
    shownNone: "frames a second on your screen",
    delay: "from your key to your screen, last change",
    delayNone: "from your key to your screen",
    delayWaiting: "and counting: not on the screen yet",
  },
  retake: { ended: "There is no such block any more." },
  errors: {
    mse: "This browser has no Media Source Extensions, with which the picture is played. Use a current Chrome, Edge, Firefox or Safari (on an iPhone iOS 17.1 or later).",
    codec: (mime) => `This browser cannot play ${mime}. Use a browser with H.264, or start the server with --codec vp9.`,
    media: (reason) => `The browser could not play a piece of the film${reason ? ` (${reason})` : ""}. Press Reload the picture; the film on the server is whole.`,
    autoplay: "The browser waits for your click before it plays. Press the picture.",
    unreachable: "The server does not answer. Start it with longtake serve, and this page goes on by itself.",
    empty: "There is nothing to send yet. Type what you want to see.",
    story: "This file is no story. Open one that was saved here.",
    storyEmpty: "There are no blocks yet. Start a film, then save its story.",
    nofilm: "There are no blocks to download yet. Start a film first.",
    seed: "The seed is a whole number from 0 to 9007199254740991. Leave it empty for a new one each time.",
    code: {
      unauthorized: "This server asks for a token. Enter the one you were given.",
      not_found: "This film is not on the server any more. Start a new one.",
      taken_over: "This film is open in another window. Take it back here, or close this one.",
      idle: "The film was put aside because nobody was watching. Continue it whenever you like.",
      engines_differ: "This film was made by another model than the one that runs now. It can be watched and downloaded, not continued.",
      quota: "You have as many films running as you may. Close the other one, or wait until it ends.",
      queue_full: "Too many people are waiting. Try again in a minute.",
      no_capacity: "Nothing is free to make it right now. Try again in a moment.",
      rate_limited: "That was too fast for the server. Wait a second, then try again.",
      store_full: "The server's disk is full. What was made is kept; ask whoever runs it to free some space.",
      chunk_failed: "A block could not be made, twice. The film up to there is kept: take it again from its last block.",
      too_late: "The film ends with the block that is being made. Take it again from an earlier one.",
      internal_error: "The server made a mistake. The film is kept; reload this page to go on.",
      stopping: "The server is stopping. The film is kept and goes on when it is back.",
    },
    lost: "This film is not on the server any more. What you have seen is still here: download it before you close the page.",
    told: (error) => {
      const { got, expected, fix } = error.longtake || {};
      const facts = [got && `got ${got}`, expected && `expected ${expected}`].filter(Boolean).join("; ");
      return [sentence(error.message), facts && sentence(facts), fix && sentence(fix)].filter(Boolean).join(" ");
    },
  },
  actions: { takeBack: "Take it back here", resume: "Continue", reload: "Reload the picture", again: "Try again", fresh: "Start a new film" },
  theme: { auto: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" },
  examplesTitle: "Or begin with one of these",
  files: { film: (id) => `longtake-${id}.mp4`, story: (id) => `longtake-${id}.story.yaml` },
};

// One click starts one of these. The tiny model knows ten digits, a few colours and places; the large ones want dense paragraphs.
const small = [
  {
    title: "A six, and back again",
    shots: [
      { prompt: "a yellow six drifts left over a dark blue background, soft light", chunks: 2 },
      { prompt: "a red zero sways over a forest background, light from above", chunks: 2,
        then: [{ prompt: "a white zero sways over a forest background, light from above", chunks: 1 }] },
      { prompt: "a yellow six rises over a sunset background, light from the left", chunks: 2 },
    ],
  },
  {
    title: "Three at dusk",
    shots: [
      { prompt: "a cyan three circles over a sunset background, light from the right", chunks: 3,
        then: [{ prompt: "a purple three grows over a sunset background, light from the right", chunks: 2 }] },
      { prompt: "a green eight sinks over a sea background, soft light", chunks: 2 },
    ],
  },
  {
    title: "One long shot",
    shots: [
      { prompt: "a green seven drifts right over a dark blue background, soft light", chunks: 2,
        then: [
          { prompt: "an orange seven drifts right over a dark blue background, soft light", chunks: 2 },
          { prompt: "a white seven stands still over a dark blue background, light from above", chunks: 2 },
        ] },
    ],
  },
];
const large = [
  {
    title: "Heron at first light",
    shots: [
      { prompt: "A grey heron stands motionless in tall reeds at first light, seen through a long lens from low over the water. Mist drifts slowly across the marsh, the plumage is detailed and wet, warm light catches the edge of its back, and small ripples spread from its legs. The camera holds still; muted greens and amber, shallow depth of field.", chunks: 4,
        then: [{ prompt: "The grey heron takes one slow step forward through the reeds and lowers its head towards the water, eyes fixed on something below the surface. Mist drifts across the marsh behind it, warm light on its back, ripples around its legs. The camera holds still; muted greens and amber, shallow depth of field.", chunks: 3 }] },
      { prompt: "The marsh at night under a clear sky full of stars, the same reeds now black against a faint blue horizon. The heron is a dark outline, standing in still water that mirrors the stars. The camera moves forward very slowly; deep blues, fine grain, silence.", chunks: 4 },
    ],
  },
  {
    title: "The baker's morning",
    shots: [
      { prompt: "Inside a small bakery before dawn, a woman in a flour-dusted apron kneads dough on a long wooden table under one warm lamp. Her forearms move in a steady rhythm, flour hangs in the light, copper pans shine on the wall behind her. Handheld camera at table height, close, warm tungsten colours, gentle film grain.", chunks: 4 },
      { prompt: "The same woman in the flour-dusted apron slides round loaves into a brick oven with a long wooden peel, the glow of the fire on her face. Sparks rise, heat shimmers in front of the bricks. Medium shot from the side, deep orange light against a dark room, gentle film grain.", chunks: 4 },
    ],
  },
  {
    title: "Tram in the rain",
    shots: [
      { prompt: "A red tram moves slowly down a wet city street in the evening, headlights reflected in the cobblestones. Rain falls in fine lines through the light of shop windows, people with umbrellas pass in the foreground out of focus. The camera tracks beside the tram at walking pace; cool blues, neon reflections, 35 mm look.", chunks: 4,
        then: [{ prompt: "The red tram comes to a stop and its doors open, warm yellow light spilling onto the wet cobblestones. A passenger with a dark coat steps down and opens an umbrella. Rain in fine lines, neon reflections, the camera slows and settles; cool blues, 35 mm look.", chunks: 3 }] },
    ],
  },
];

export const examplesFor = (model) => (model && model.width <= 256 ? small : large);
export const firstPrompt = (story) => story.shots[0].prompt;
export { seconds };
