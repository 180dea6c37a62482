// The smallest page that plays a session: one socket, one media source, an acknowledgement a chunk shown.
const $ = (id) => document.getElementById(id);
let socket, buffer, queue = [], chunks = [];

function pump() {
  if (buffer && !buffer.updating && queue.length) buffer.appendBuffer(queue.shift());
}

function begin(message) {
  const source = new MediaSource();
  $("video").src = URL.createObjectURL(source);
  source.addEventListener("sourceopen", () => {
    buffer = source.addSourceBuffer(message.mime);
    buffer.addEventListener("updateend", pump);
    pump();
  });
  $("video").play().catch(() => {});
}

function start() {
  chunks = [];
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/realtime/video`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => socket.send(JSON.stringify({
    type: "session.start", prompt: $("prompt").value, endless: true, flow: { mode: "ack", window: 2 },
  }));
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") { queue.push(data); pump(); return; }
    const message = JSON.parse(data);
    $("state").textContent = message.type + (message.message ? `: ${message.message}` : "");
    if (message.type === "video.start") begin(message);
    if (message.type === "video.chunk_metadata") chunks.push(message);
  };
}

setInterval(() => {
  const fps = 24, frame = $("video").currentTime * fps;
  const shown = chunks.filter((chunk) => chunk.first_frame <= frame).length - 1;
  if (socket && socket.readyState === 1 && shown >= 0) socket.send(JSON.stringify({ type: "session.ack", chunk: shown }));
}, 250);

const interact = (event) => socket && socket.send(JSON.stringify({ type: "session.interaction", interaction: { event } }));
$("start").onclick = start;
$("change").onclick = () => interact({ prompt: $("prompt").value });
$("cut").onclick = () => interact({ prompt: $("prompt").value, cut: true });
$("stop").onclick = () => socket && socket.send(JSON.stringify({ type: "session.stop" }));
