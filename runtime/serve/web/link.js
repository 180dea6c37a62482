// One socket to the server: messages as objects, and every chunk together with the bytes that follow its metadata.

const TOKEN = "longtake-token"; // of this tab only, never in an address

export const token = {
  get: () => sessionStorage.getItem(TOKEN) || "",
  set: (value) => (value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN)),
};

// JSON of a route. Throws {status, code, message, longtake}; status 0 if nobody answers.
export async function ask(path, method = "GET") {
  const headers = token.get() ? { authorization: `Bearer ${token.get()}` } : {};
  let answer;
  try {
    answer = await fetch(path, { method, headers, cache: "no-store" });
  } catch {
    throw { status: 0, code: "unreachable", message: "" };
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw { status: answer.status, message: answer.statusText, ...body, ...(body.error || {}) };
  return body;
}

// Where the media of an mp4 stream begins: what comes before the first moof describes it.
export function mediaOffset(bytes) {
  const view = new DataView(bytes);
  for (let at = 0; at + 8 <= bytes.byteLength; ) {
    const size = view.getUint32(at);
    if (view.getUint32(at + 4) === 0x6d6f6f66) return at; // "moof"
    if (size < 8) break;
    at += size;
  }
  return 0;
}

export class Link {
  // on: {message(object), chunk(metadata, init or null, media), closed(code)}
  constructor(on) {
    this.on = on;
    this.socket = null;
    this.announced = null;
    this.left = -Infinity; // when a socket was given up here
  }

  get open() {
    return this.socket !== null && this.socket.readyState === WebSocket.OPEN;
  }

  // Open a socket whose first message is `first`. An earlier one is given up.
  async begin(first) {
    this.end();
    const ticket = token.get() ? (await ask("/v1/realtime/tickets", "POST")).ticket : "";
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const query = ticket ? `?ticket=${encodeURIComponent(ticket)}` : "";
    const socket = new WebSocket(`${scheme}://${location.host}/v1/realtime/video${query}`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.announced = null;
    const mine = (handler) => (event) => this.socket === socket && handler(event);
    socket.onopen = mine(() => socket.send(JSON.stringify(first)));
    socket.onmessage = mine(({ data }) => this.receive(data));
    socket.onclose = mine(({ code }) => {
      this.socket = null;
      this.on.closed(code);
    });
  }

  receive(data) {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      if (message.type === "video.chunk_metadata") this.announced = message;
      else this.on.message(message);
    } else if (this.announced) {
      const offset = mediaOffset(data);
      const chunk = this.announced;
      this.announced = null;
      this.on.chunk(chunk, offset ? data.slice(0, offset) : null, offset ? data.slice(offset) : data);
    }
  }

  // Returns false if there is no socket to say it on.
  send(message) {
    if (this.open) this.socket.send(JSON.stringify(message));
    return this.open;
  }

  end() {
    const socket = this.socket;
    this.socket = null;
    if (!socket) return;
    this.left = performance.now();
    socket.close(1000);
  }
}
