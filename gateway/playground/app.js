// The playground: one person's view of one gateway. It speaks the public HTTP API and knows nothing else of the server.
// Whatever comes from outside reaches the page as text, never as markup.

const KEY = "framemesh-api-key";
const JOBS_PER_PAGE = 8;
const MESH_EVERY_MS = 1000;
const JOBS_EVERY_MS = 3000;
const STEP_SAMPLES = 60;
const MOST_TICKS = 120; // finer ones would be a grey smear

const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function drawing(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
    setTimeout(resolve, ms);
  });
}

/** Until a target fires an event; rejects if it fires an error first. */
function happens(target, event) {
  const heard = new AbortController();
  return new Promise((resolve, reject) => {
    target.addEventListener(event, resolve, heard);
    target.addEventListener("error", () => reject(new Error(`no ${event}`)), heard);
  }).finally(() => heard.abort());
}

// ---- words --------------------------------------------------------------------------------------------------------

function duration(seconds) {
  if (seconds < 0.9995) return `${(seconds * 1000).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function remaining(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 1) return "under a second left";
  return seconds < 90 ? `about ${Math.ceil(seconds)} s left` : `about ${Math.round(seconds / 60)} min left`;
}

function bytes(number) {
  const unit = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  for (; number >= 999.5 && power < unit.length - 1; power++) number /= 1000;
  return `${power && number < 10 ? number.toFixed(1) : Math.round(number)} ${unit[power]}`;
}

function ago(epochSeconds) {
  const minutes = Math.floor((Date.now() / 1000 - epochSeconds) / 60);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  return minutes < 48 * 60 ? `${Math.floor(minutes / 60)} h ago` : `${Math.floor(minutes / 1440)} days ago`;
}

const joined = (...parts) => parts.filter(Boolean).join(" · ");
const isOver = (video) => !["queued", "in_progress"].includes(video.status);
const pathOf = (id) => `v1/videos/${encodeURIComponent(id)}`;

// ---- the API ------------------------------------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    Object.assign(this, { status, param: error.param, code: error.code });
  }

  static async from(answer) {
    const body = await answer.json().catch(() => ({}));
    return new ApiError(answer.status, body.error ?? { message: `The server answered ${answer.status}.` });
  }
}

let keyWanted = false;

async function api(path, { method = "GET", body, headers = {}, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const answer = await fetch(path, {
    method,
    signal,
    headers: {
      ...(key && { authorization: `Bearer ${key}` }),
      ...(body && { "content-type": "application/json" }),
      ...headers,
    },
    body: body && JSON.stringify(body),
  });
  if (answer.ok) return answer;
  const error = await ApiError.from(answer);
  if (error.status === 401) askForKey(error);
  throw error;
}

const getJson = async (path, options) => (await api(path, options)).json();
const post = (path, body) => getJson(path, { method: "POST", body });

/** Where a tag can load a file from: only `fetch` can send the key, so with one the file is fetched first. */
async function mediaUrl(path, signal) {
  if (!sessionStorage.getItem(KEY)) return path;
  return URL.createObjectURL(await (await api(path, { signal })).blob());
}

/** {id, name, data} of each event. EventSource would do the same, but cannot send the key. */
async function* serverSentEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let event = { data: [] };
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    if (!value.includes("\n")) continue; // frames are long lines that come in many pieces
    const lines = text.split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data.length) yield { id: event.id, name: event.event, data: JSON.parse(event.data.join("\n")) };
        event = { data: [] };
        continue;
      }
      const [, field, content] = /^([^:]*):? ?(.*)$/.exec(line);
      if (field === "data") event.data.push(content);
      else event[field] = content;
    }
  }
}

/** Do something again and again while somebody looks at the page. */
async function whileVisible(everyMs, work) {
  for (;;) {
    if (document.hidden) await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
    else {
      if (!keyWanted && (await work()) === "stop") return;
      await sleep(everyMs);
    }
  }
}

// ---- the key ------------------------------------------------------------------------------------------------------

function askForKey(error) {
  keyWanted = true;
  $("key-error").textContent = sessionStorage.getItem(KEY) ? error.message : "";
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  keyWanted = false;
  $("key-form").hidden = true;
  stage.clear();
  begin();
});

// ---- the growing video --------------------------------------------------------------------------------------------

/** "avc1.64001e" from the decoder configuration in the head of an MP4, or null if it has not arrived yet. */
function codecOf(head) {
  for (let at = 0; at + 8 <= head.length; at++) {
    if (head[at] === 0x61 && head[at + 1] === 0x76 && head[at + 2] === 0x63 && head[at + 3] === 0x43) {
      const profile = [...head.subarray(at + 5, at + 8)];
      return `avc1.${profile.map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
    }
  }
  return null;
}

/** Play a fragmented MP4 in a <video> while it is being made; returns at its end. */
async function playWhileMade(video, path, signal) {
  if (!("MediaSource" in window)) throw new Error("this browser plays whole files only");
  const reader = (await api(path, { signal })).body.getReader();
  try {
    await playPieces(video, reader, signal);
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function playPieces(video, reader, signal) {
  let head = new Uint8Array();
  while (codecOf(head) === null) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream ended within its header");
    const longer = new Uint8Array(head.length + value.length);
    longer.set(head);
    longer.set(value, head.length);
    head = longer;
  }
  const source = new MediaSource();
  const url = URL.createObjectURL(source);
  video.src = url;
  await happens(source, "sourceopen");
  URL.revokeObjectURL(url);
  const buffer = source.addSourceBuffer(`video/mp4; codecs="${codecOf(head)}"`);
  for (let piece = head; piece; piece = (await reader.read()).value) {
    signal.throwIfAborted();
    buffer.appendBuffer(piece);
    await happens(buffer, "updateend");
    if (piece === head) video.play().catch(() => {});
  }
  source.endOfStream();
}

// ---- the filmstrip ------------------------------------------------------------------------------------------------

/** Every frame of the video on show, as it is decoded; also the way to step through it. */
class Filmstrip {
  constructor(element, choose) {
    this.element = element;
    this.at = 0;
    element.addEventListener("click", (event) => {
      const slot = event.target.closest("#strip span");
      if (slot) choose([...element.children].indexOf(slot));
    });
    element.addEventListener("keydown", (event) => {
      const last = element.children.length - 1;
      const target = { ArrowLeft: this.at - 1, ArrowRight: this.at + 1, Home: 0, End: last }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(target, last)));
      element.children[this.at].scrollIntoView({ block: "nearest", inline: "nearest" });
    });
  }

  clear(count, width, height) {
    this.element.style.setProperty("--shape", `${width} / ${height}`);
    this.element.replaceChildren(...Array.from({ length: count }, () => make("span")));
    this.element.hidden = count === 0;
    this.element.setAttribute("aria-valuemin", 1);
    this.element.setAttribute("aria-valuemax", count);
    this.mark(0);
  }

  fill(first, pictures) {
    for (const [offset, picture] of pictures.entries()) {
      this.element.children[first + offset]?.replaceChildren(make("img", { src: picture, alt: "", decoding: "async" }));
    }
    const newest = this.element.children[first + pictures.length - 1];
    if (!newest || this.element.matches(":hover, :focus")) return;
    this.element.scrollLeft = newest.offsetLeft + newest.offsetWidth - this.element.clientWidth;
  }

  /** The frame that is on show now. */
  mark(number) {
    this.element.children[this.at]?.classList.remove("at");
    this.at = number;
    if (this.picture(number)) this.element.children[number].classList.add("at");
    this.element.setAttribute("aria-valuenow", number + 1);
  }

  rewind() {
    if (!this.element.matches(":hover, :focus")) this.element.scrollLeft = 0;
  }

  picture(number) {
    return this.element.children[number]?.firstChild?.src;
  }
}

// ---- the stage ----------------------------------------------------------------------------------------------------

const STAGES = {
  queued: { title: "Queue", now: "Queued", share: 1 },
  encode: { title: "Encode", now: "Encoding the prompt", share: 1 },
  denoise: { title: "Denoise", now: "Denoising", share: 6 },
  decode: { title: "Decode", now: "Decoding", share: 3 },
};
const ENDINGS = { completed: "Done", failed: "Failed", cancelled: "Cancelled" };

/** The job that is on show, from its first event to its end. */
class Stage {
  constructor() {
    this.control = new AbortController();
    this.job = null;
    this.urls = [];
    this.strip = new Filmstrip($("strip"), (number) => this.choose(number));
    this.segments = Object.entries(STAGES).map(([name, { title }]) => {
      const seconds = make("span");
      const bar = make("div", { className: "bar" });
      return { name, bar, seconds, element: make("div", { className: "segment" }, bar, make("span", {}, title), " ", seconds) };
    });
    $("track").replaceChildren(...this.segments.map((segment) => segment.element));
    $("video").loop = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.watchPlayback();
  }

  /** Take everything of the last job off the stage; what still ran for it stops. */
  clear() {
    this.control.abort();
    this.control = new AbortController();
    this.job = null;
    $("video").removeAttribute("src");
    $("video").controls = false;
    $("video").load();
    $("still").removeAttribute("src");
    this.urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
    this.show("nothing");
    $("job").hidden = true;
    document.title = "framemesh playground";
    return this.control.signal;
  }

  start(job) {
    const signal = this.clear();
    this.job = { step: 0, decoded: 0, live: null, ...job };
    $("job").hidden = false;
    this.strip.clear(job.id ? (job.num_frames ?? 0) : 0, ...job.size.split("x"));
    this.draw();
    return signal;
  }

  /** Show a video, running or finished, until another one is opened; `since` is when this page asked for it. */
  async openVideo(video, since = null) {
    const signal = this.start({ ...video, since });
    history.replaceState(null, "", `#${video.id}`);
    list.highlight();
    try {
      if (video.status === "completed") await this.showFile();
      await this.follow(signal);
    } catch (error) {
      if (!signal.aborted) this.fail(error);
    }
  }

  async follow(signal) {
    let last = null;
    for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
      try {
        const headers = last ? { "last-event-id": last } : {};
        const answer = await api(`${pathOf(this.job.id)}/events?frames=jpeg`, { signal, headers });
        for await (const { id, name, data } of serverSentEvents(answer)) {
          last = id ?? last;
          pause = 250;
          this.take(name, data);
          if (name === "done" || name === "error") return;
        }
      } catch (error) {
        if (signal.aborted || (error instanceof ApiError && error.status < 500)) throw error;
      }
      await sleep(pause, signal);
    }
  }

  take(name, data) {
    const { job } = this;
    if (name === "queued") Object.assign(job, { queue_position: data.position, eta_s: data.eta_s });
    if (name === "stage") job.stage = data.stage;
    if (name === "step") Object.assign(job, data, { stage: "denoise", num_inference_steps: data.total_steps });
    if (name === "preview") this.showStill(`data:image/jpeg;base64,${data.jpeg}`, `preview after step ${data.step}`);
    if (name === "frames") this.takeFrames(data);
    if (name === "done") this.takeEnd(data);
    if (name === "error") this.takeEnd({ status: data.error.code === "cancelled" ? "cancelled" : "failed", error: data.error });
    this.draw();
  }

  takeFrames({ first, count, total, jpeg }) {
    const { job } = this;
    if (!isOver(job)) {
      job.stage = "decode";
      job.firstFrame ??= job.since && (performance.now() - job.since) / 1000;
      job.live ??= this.playLive();
    }
    job.decoded = first + count;
    if (!jpeg?.length) return;
    const pictures = jpeg.map((data) => `data:image/jpeg;base64,${data}`);
    this.strip.fill(first, pictures);
    const plays = isOver(job) && job.output_format !== "png";
    if (!plays && $("viewer").dataset.shows !== "video") this.showStill(pictures.at(-1), `frame ${first + count} of ${total}`);
  }

  takeEnd(changes) {
    const { job } = this;
    const wasOver = isOver(job);
    Object.assign(job, changes);
    if (job.status === "completed") {
      job.decoded = job.num_frames;
      this.strip.rewind();
      if (!wasOver) this.showFileUnlessLive();
    } else if ($("viewer").dataset.shows === "nothing") {
      $("empty").textContent = "There are no frames.";
      $("strip").hidden = true;
    }
    $("caption").textContent = "";
    if (!wasOver) list.refresh();
  }

  /** Whether the growing file plays; the pictures on the strip are there in any case. */
  async playLive() {
    try {
      await playWhileMade($("video"), `${pathOf(this.job.id)}/stream.mp4`, this.control.signal);
      return true;
    } catch {
      return false;
    }
  }

  async showFileUnlessLive() {
    const { job } = this;
    const played = await job.live;
    if (!played && job === this.job) await this.showFile();
  }

  async showFile() {
    const { job } = this;
    const format = job.output_format ?? "mp4";
    if (format === "png") return; // an archive; the strip has the frames
    try {
      const url = await mediaUrl(`${pathOf(job.id)}/content`, this.control.signal);
      if (url.startsWith("blob:")) this.urls.push(url);
      if (job !== this.job) return;
      if (format === "gif") this.showStill(url, "");
      else $("video").src = url;
      $("video").play().catch(() => {});
    } catch (error) {
      if (job === this.job) this.complain(error);
    }
  }

  /** As soon as a video presents a frame it is what the viewer shows; the strip follows it. */
  watchPlayback() {
    const video = $("video");
    const presented = (_now, { mediaTime }) => {
      if (this.job && video.hasAttribute("src")) {
        this.show("video");
        video.controls = true;
        $("caption").textContent = "";
        this.strip.mark(Math.round(mediaTime * this.job.fps));
      }
      video.requestVideoFrameCallback(presented);
    };
    video.requestVideoFrameCallback(presented);
  }

  choose(number) {
    if ($("viewer").dataset.shows === "video") {
      $("video").pause();
      $("video").currentTime = (number + 0.5) / this.job.fps;
    } else {
      const picture = this.strip.picture(number);
      if (picture) this.showStill(picture, `frame ${number + 1} of ${this.job.num_frames}`);
    }
    this.strip.mark(number);
  }

  show(what) {
    $("viewer").dataset.shows = what;
    if (what === "nothing") {
      $("caption").textContent = "";
      $("empty").textContent = "Frames appear here while they are made.";
    }
  }

  showStill(url, caption) {
    $("still").src = url;
    $("still").alt = caption;
    $("caption").textContent = caption;
    this.show("still");
  }

  fail(error) {
    if (this.job) this.job.status = "failed";
    this.complain(error);
  }

  complain(error) {
    if (!this.job) return;
    this.job.error = error;
    this.draw();
  }

  // -- pictures of image models: one call, answered by events

  async openImage(body, since) {
    const signal = this.start({ model: body.model, prompt: body.prompt, size: body.size ?? "1x1", status: "queued", since });
    history.replaceState(null, "", location.pathname);
    list.highlight();
    try {
      const answer = await api("v1/images/generations", { method: "POST", body, signal });
      for await (const { data } of serverSentEvents(answer)) this.takePicture(data);
      if (!isOver(this.job)) throw new Error("The connection ended before the picture came.");
    } catch (error) {
      if (signal.aborted) return;
      this.fail(error);
      if (error instanceof ApiError) tell(error);
    }
  }

  takePicture(data) {
    const { job } = this;
    if (data.error) throw new ApiError(200, data.error);
    if (data.type === "image_generation.progress") {
      const { stage: name, step, total_steps, eta_s, queue_position } = data;
      Object.assign(job, { stage: name, eta_s, queue_position });
      if (name === "denoise") Object.assign(job, { step, num_inference_steps: total_steps });
    }
    if (data.type === "image_generation.partial_image") this.showStill(pictureUrl(data), `preview ${data.partial_image_index + 1}`);
    if (data.type === "image_generation.completed") {
      const { size, seed, timings, usage, warnings, output_format } = data;
      Object.assign(job, { status: "completed", url: pictureUrl(data), size, seed, timings, usage, warnings, output_format });
      this.showStill(job.url, "");
    }
    this.draw();
  }

  // -- what is said about it

  draw() {
    const { job } = this;
    const over = isOver(job);
    this.say($("now"), ENDINGS[job.status] ?? STAGES[job.stage]?.now ?? (job.stage === "deliver" ? "Writing the file" : "Queued"));
    this.say($("rest"), over ? this.summary() : this.outlook());
    this.say($("failure"), job.error?.message ?? "");
    this.say($("prompt-shown"), job.prompt);
    $("warnings").hidden = !job.warnings?.length;
    $("warnings").replaceChildren(...(job.warnings ?? []).map((warning) => make("li", {}, warning)));
    this.drawActions(over);
    this.drawTrack(over);
    this.drawFacts();
    const state = over || job.progress === undefined ? $("now").textContent : `${job.progress} %`;
    document.title = `${state} · framemesh`;
  }

  /** Text that is read out when it changes must not be set again when it does not. */
  say(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  outlook() {
    const { job } = this;
    const left = remaining(job.eta_s);
    if (job.stage === "denoise" && job.step) return joined(`step ${job.step} of ${job.num_inference_steps}`, left);
    if (job.stage === "decode") return joined(`frame ${job.decoded} of ${job.num_frames}`);
    if (job.stage && job.stage !== "queued") return left;
    return joined(job.queue_position > 1 ? `number ${job.queue_position} in line` : job.queue_position && "next in line", left);
  }

  summary() {
    const { job } = this;
    if (job.status !== "completed") return "";
    const total = job.timings?.total;
    const first = job.firstFrame && `first frame after ${duration(job.firstFrame)}`;
    return joined(total !== undefined && `in ${duration(total)}`, first);
  }

  drawActions(over) {
    const { job } = this;
    if (over && document.activeElement === $("cancel")) $("now").focus(); // not lost with the button
    $("cancel").hidden = over;
    $("remix").hidden = $("delete").hidden = !job.id;
    $("download").hidden = job.status !== "completed";
    if (job.status !== "completed") return;
    $("download").href = job.url ?? `${pathOf(job.id)}/content`;
    const format = job.output_format ?? "mp4";
    $("download").download = job.id ? `${job.id}.${format === "png" ? "zip" : format}` : `${job.seed}.${format}`;
  }

  drawTrack(over) {
    const { job } = this;
    const names = Object.keys(STAGES);
    const reached = job.stage === "deliver" ? names.length : names.indexOf(job.stage ?? "queued");
    const counts = { denoise: [job.step, job.num_inference_steps], decode: [job.decoded, job.num_frames] };
    const timings = job.status === "completed" ? job.timings : null;
    $("track").hidden = over && !timings;
    for (const [index, { name, element, bar, seconds }] of this.segments.entries()) {
      const [count, of] = counts[name] ?? [];
      const current = !over && index === reached;
      const share = timings ? (timings[name] ?? 0) : STAGES[name].share;
      element.classList.toggle("current", current);
      element.classList.toggle("counted", of !== undefined);
      element.style.setProperty("--share", share);
      bar.classList.toggle("ticks", of > 1 && of <= MOST_TICKS);
      bar.style.setProperty("--ticks", of ?? 1);
      bar.style.setProperty("--done", timings || index < reached ? 1 : current && of ? count / of : 0);
      seconds.textContent = timings?.[name] === undefined ? "" : duration(timings[name]);
    }
    $("track").setAttribute("aria-valuenow", job.progress ?? 0);
    $("track").setAttribute("aria-valuetext", joined($("now").textContent, $("rest").textContent));
  }

  drawFacts() {
    const { job } = this;
    const { usage } = job;
    const facts = {
      Model: job.model,
      Size: job.size === "1x1" ? null : job.size?.replace("x", " × "),
      Frames: job.fps && `${job.num_frames} at ${job.fps} fps`,
      Steps: job.num_inference_steps,
      Seed: job.seed === undefined ? null : make("button", { type: "button", title: "Use this seed", onclick: useSeed }, `${job.seed}`),
      "Rank seconds": usage?.rank_seconds && usage.rank_seconds.toFixed(2),
      "Peak memory": usage?.peak_memory_mb && bytes(usage.peak_memory_mb * 2 ** 20),
      Attempts: usage?.attempts > 1 && usage.attempts,
    };
    const shown = Object.entries(facts).filter(([, fact]) => fact);
    const text = shown.map(([name, fact]) => name + (fact.textContent ?? fact)).join();
    if (this.factsShown === text) return; // a button that has the focus keeps it
    this.factsShown = text;
    $("facts").replaceChildren(...shown.map(([name, fact]) => make("div", {}, make("dt", {}, name), make("dd", {}, fact))));
  }
}

const pictureUrl = ({ output_format, b64_json }) => `data:image/${output_format};base64,${b64_json}`;

function useSeed(event) {
  $("random").checked = false;
  $("seed").disabled = false;
  $("seed").value = event.target.textContent;
}

$("cancel").addEventListener("click", async () => {
  const { job } = stage;
  if (!job.id) {
    stage.control.abort();
    stage.takeEnd({ status: "cancelled" });
    stage.draw();
    return;
  }
  await api(`${pathOf(job.id)}/cancel`, { method: "POST" }).catch((error) => stage.complain(error));
});

$("download").addEventListener("click", async (event) => {
  const link = event.currentTarget;
  if (!sessionStorage.getItem(KEY) || !/content$/.test(link.href)) return;
  event.preventDefault();
  try {
    const url = await mediaUrl(link.href);
    make("a", { href: url, download: link.download }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    stage.complain(error);
  }
});

// ---- the list of videos -------------------------------------------------------------------------------------------

class VideoList {
  constructor() {
    this.order = [];
    this.rows = new Map();
    this.hasMore = false;
  }

  /** The newest page again, or null without an answer; pages that were loaded behind it stay. */
  async refresh() {
    try {
      const page = await getJson(`v1/videos?limit=${JOBS_PER_PAGE}`);
      const overlap = this.order.indexOf(page.last_id);
      const behind = overlap < 0 || !page.has_more ? [] : this.order.slice(overlap + 1);
      this.place([...page.data.map((video) => this.update(video)), ...behind]);
      if (behind.length === 0) this.hasMore = page.has_more;
      this.drawMore();
      return page.data;
    } catch {
      return null; // the header says when the server does not answer
    }
  }

  async more() {
    const page = await getJson(`v1/videos?limit=${JOBS_PER_PAGE}&after=${encodeURIComponent(this.order.at(-1))}`);
    this.place([...this.order, ...page.data.map((video) => this.update(video))]);
    this.hasMore = page.has_more;
    this.drawMore();
  }

  place(ids) {
    const order = [...new Set(ids)];
    if (order.join() !== this.order.join()) {
      const focused = document.activeElement;
      $("list").replaceChildren(...order.map((id) => this.rows.get(id).item));
      if ($("list").contains(focused)) focused.focus();
      for (const id of this.order) if (!order.includes(id)) this.drop(id);
    }
    this.order = order;
    this.highlight();
  }

  drop(id) {
    const { thumbnail } = this.rows.get(id);
    if (thumbnail) URL.revokeObjectURL(thumbnail);
    this.rows.delete(id);
  }

  update(video) {
    let row = this.rows.get(video.id);
    if (!row) this.rows.set(video.id, (row = this.row()));
    row.video = video;
    row.title.textContent = video.prompt;
    const state = video.status === "completed" ? "" : video.status.replace("_", " ");
    row.meta.textContent = joined(state, video.size.replace("x", " × "), ago(video.created_at));
    row.done.hidden = isOver(video);
    row.done.style.setProperty("--done", video.progress / 100);
    if (video.status === "completed" && !row.asked) this.loadThumbnail(row);
    return video.id;
  }

  row() {
    const title = make("span", { className: "title" });
    const meta = make("span", { className: "meta" });
    const done = make("i");
    const picture = make("span", { className: "thumbnail" }, done);
    const button = make("button", { type: "button" }, picture, make("span", {}, title, meta));
    const row = { title, meta, done, picture, button, item: make("li", {}, button), video: null, asked: false };
    button.addEventListener("click", () => {
      stage.openVideo(row.video);
      if (getComputedStyle(document.querySelector("main")).display === "flex") $("stage").scrollIntoView();
    });
    return row;
  }

  async loadThumbnail(row) {
    row.asked = true;
    try {
      const answer = await api(`${pathOf(row.video.id)}/content?variant=thumbnail`);
      row.thumbnail = URL.createObjectURL(await answer.blob());
      row.picture.prepend(make("img", { src: row.thumbnail, alt: "" }));
    } catch {
      // The row does without one.
    }
  }

  highlight() {
    for (const [id, { button }] of this.rows) button.setAttribute("aria-current", id === stage.job?.id);
  }

  drawMore() {
    $("more").hidden = !this.hasMore;
    $("no-jobs").hidden = this.order.length > 0;
  }
}

$("more").addEventListener("click", () => list.more().catch(() => {}));

// ---- the mesh -----------------------------------------------------------------------------------------------------

/** Measured and predicted seconds of a denoising step, as they were seen from here; by model. */
const samples = new Map();

async function pollMeshes() {
  try {
    const info = await getJson("server_info");
    $("meshes").replaceChildren(...info.meshes.map(meshPanel));
    $("cluster").hidden = false;
    takeDefaults(info.models);
    const troubles = info.meshes.filter((mesh) => !mesh.ready || mesh.draining);
    sayServer(troubles.map((mesh) => mesh.reason).join(", ") || `ready · version ${info.version}`, troubles.length > 0);
  } catch (error) {
    if (error.status === 404) return "stop";
    if (!keyWanted) sayServer(error instanceof ApiError ? error.message : "The server does not answer.", true);
  }
}

function sayServer(text, bad) {
  $("server").classList.toggle("bad", bad);
  if ($("server").textContent !== text) $("server").textContent = text;
}

function meshPanel(mesh, number) {
  const facts = make("ul", { className: "facts" });
  const fact = (name, value) => facts.append(make("li", {}, `${name} `, make("b", {}, `${value}`)));
  if (mesh.running !== null) fact("running", mesh.running);
  if (mesh.queued !== null) fact("queued", mesh.queued);
  if (mesh.losses) fact("restarts", mesh.losses);
  const panel = make("div", { className: "mesh" }, make("p", {}, mesh.model, " ", make("span", { className: "hint" }, layoutOf(mesh.layout))), facts);
  if (!mesh.ready || mesh.draining) panel.append(make("p", { className: "not-ready" }, mesh.reason));
  panel.append(make("ol", { className: "ranks" }, ...mesh.ranks.map(rankRow)));
  if (mesh.step_times?.length) panel.append(timesTable(mesh.step_times), ...stepChart(number, mesh.step_times));
  return panel;
}

function layoutOf(layout) {
  return layout ? joined(`cfg ${layout.cfg}`, `ring ${layout.ring}`, `ulysses ${layout.ulysses}`) : "";
}

function rankRow(rank) {
  const kind = !rank.ready ? "lost" : rank.doing === "idle" ? "idle" : "";
  const gauge = make("i");
  gauge.style.setProperty("--done", rank.budget_bytes ? Math.min(rank.held_bytes / rank.budget_bytes, 1) : 0);
  const seconds = rank.predicted_s ? `${duration(rank.running_s)} of ${duration(rank.predicted_s)}` : "";
  const memory = rank.budget_bytes ? `${bytes(rank.held_bytes)} of ${bytes(rank.budget_bytes)}` : bytes(rank.held_bytes);
  return make(
    "li",
    { title: rank.host },
    make("span", { className: "number" }, `${rank.rank}`),
    make("span", { className: `doing ${kind}` }, rank.doing),
    make("span", { className: "seconds", title: "this item, and what was predicted for it" }, seconds),
    make("span", { className: "gauge" }, gauge),
    make("span", { className: "memory" }, memory),
  );
}

function timesTable(times) {
  const units = { encode: "encode, a prompt", denoise: "denoise, a step", first_decode: "decode, first chunk", decode: "decode, a chunk" };
  const rows = times.map((time) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, units[time.kind] ?? time.kind),
      make("td", {}, duration(time.seconds)),
      make("td", {}, `${duration(time.predicted_s)} predicted`),
    ),
  );
  return make("table", { className: "times" }, make("tbody", {}, ...rows));
}

function stepChart(number, times) {
  const step = times.find((time) => time.kind === "denoise");
  if (!step) return [];
  const seen = samples.get(number) ?? [];
  samples.set(number, seen);
  if (seen.at(-1)?.seconds !== step.seconds) seen.push(step);
  if (seen.length > STEP_SAMPLES) seen.shift();
  if (seen.length < 2) return [];
  const most = 1.1 * Math.max(...seen.flatMap((time) => [time.seconds, time.predicted_s]));
  const chart = drawing("svg", { class: "chart", viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const name of ["predicted_s", "seconds"]) {
    const points = seen.map((time, index) => `${((100 * index) / (seen.length - 1)).toFixed(2)},${(40 - (40 * time[name]) / most).toFixed(2)}`);
    chart.append(drawing("polyline", { points: points.join(" "), class: name === "seconds" ? "measured" : "predicted" }));
  }
  const legend = make("p", { className: "legend" }, make("span", {}, "step time"), make("span", { className: "predicted" }, "predicted"));
  return [chart, legend];
}

// ---- the form -----------------------------------------------------------------------------------------------------

const NUMBERS = ["num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "previews"];
/** Parameters of the API whose field here has another name. */
const SHOWN_AT = { width: "size", height: "size", seconds: "num_frames", partial_images: "previews" };

const STREAMED = { stream: true, stream_options: { include_progress: true } };
/** File formats by what the model makes; the first is what the server takes unasked. */
const FORMATS = {
  video: { mp4: "MP4", webm: "WebM", gif: "GIF", png: "PNG frames" },
  image: { png: "PNG", webp: "WebP", jpeg: "JPEG" },
};

const models = new Map();
const defaults = new Map();
const fields = new Map();
for (const element of document.querySelectorAll("[data-field]")) {
  const { field } = element.dataset;
  const error = make("p", { className: "error", id: `${field}-error` });
  error.setAttribute("role", "alert");
  element.append(error);
  $(field).setAttribute("aria-describedby", error.id);
  fields.set(field, { element, error, input: $(field) });
}

const makesImages = () => models.get($("model").value)?.task_type === "T2I";

/** The request as the form has it; what is left empty is the server's choice. */
function wanted() {
  const hidden = makesImages() ? "video-only" : "image-only";
  const body = {};
  for (const [name, { element, input }] of fields) {
    const text = input.value.trim();
    if (input.disabled || element.classList.contains(hidden) || (text === "" && name !== "prompt")) continue;
    body[name] = NUMBERS.includes(name) ? number(text) : text;
  }
  if (body.previews === 0) delete body.previews;
  if ($("output_format").selectedIndex <= 0) delete body.output_format;
  if (!makesImages()) return { path: "v1/videos", body };
  const { previews, ...image } = body;
  return { path: "v1/images/generations", body: { ...image, ...STREAMED, partial_images: Math.min(previews ?? 0, 3) } };
}

/** A number, or the text as it was typed: the server says best what is wrong with it. Large seeds stay exact as text. */
function number(text) {
  const value = Number(text);
  return Number.isFinite(value) && Math.abs(value) <= Number.MAX_SAFE_INTEGER ? value : text;
}

function forgetErrors() {
  $("form-error").textContent = "";
  for (const { error, input } of fields.values()) {
    error.textContent = "";
    input.removeAttribute("aria-invalid");
  }
}

/** Put an error where the person can mend it. */
function tell(error) {
  const field = fields.get(SHOWN_AT[error.param] ?? error.param);
  if (!field) {
    $("form-error").textContent = error instanceof ApiError ? error.message : "The server does not answer.";
    return;
  }
  field.error.textContent = error.message;
  field.input.setAttribute("aria-invalid", "true");
  field.input.focus();
}

let submitting = false;

async function submit() {
  if (submitting) return;
  submitting = true;
  forgetErrors();
  const { path, body } = wanted();
  const since = performance.now();
  try {
    if (makesImages()) stage.openImage(body, since);
    else {
      stage.openVideo(await post(path, body), since);
      list.refresh();
    }
    if (getComputedStyle(document.querySelector("main")).display === "flex") $("stage").scrollIntoView();
  } catch (error) {
    tell(error);
  } finally {
    submitting = false;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

/** Ctrl+Enter from anywhere in a form: plain Enter makes a new line in a prompt. */
function submitsWithEnter(form, send) {
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    send();
  });
}

submitsWithEnter($("form"), submit);

$("random").addEventListener("change", () => {
  $("seed").disabled = $("random").checked;
  if (!$("random").checked) $("seed").focus();
});

async function loadModels() {
  for (;;) {
    try {
      const { data } = await getJson("v1/models");
      for (const model of data) models.set(model.id, model);
      $("model").replaceChildren(...data.map((model) => make("option", { value: model.id }, model.id)));
      chooseModel();
      return;
    } catch (error) {
      if (error.status === 401) return;
      sayServer(error instanceof ApiError ? error.message : "The server does not answer.", true);
      await sleep(2000);
    }
  }
}

/** What a request gets that leaves a field empty. */
function takeDefaults(described) {
  const news = described.filter((model) => model.defaults && !defaults.has(model.id));
  for (const model of news) defaults.set(model.id, model.defaults);
  if (news.length) chooseModel();
}

function chooseModel() {
  const { width, height, ...others } = defaults.get($("model").value) ?? {};
  const chosen = { size: width && `${width}x${height}`, ...others };
  const kind = makesImages() ? "image" : "video";
  if ($("form").dataset.kind !== kind) {
    const formats = Object.entries(FORMATS[kind]);
    $("output_format").replaceChildren(...formats.map(([value, name]) => make("option", { value }, name)));
  }
  $("form").dataset.kind = kind;
  for (const name of ["size", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale"]) {
    $(name).placeholder = chosen[name] ?? "auto";
  }
}

$("model").addEventListener("change", chooseModel);

// ---- dialogs ------------------------------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curlCommand() {
  const { path, body } = wanted();
  const key = sessionStorage.getItem(KEY) ? ['-H "Authorization: Bearer $FRAMEMESH_API_KEY"'] : [];
  const parts = [
    `curl ${quoted(new URL(path, document.baseURI).href)}`,
    ...key,
    "-H 'Content-Type: application/json'",
    `-d ${quoted(JSON.stringify(body, null, 2))}`,
  ];
  return parts.join(" \\\n  ");
}

$("curl").addEventListener("click", () => {
  $("curl-text").textContent = curlCommand();
  $("curl-copy").textContent = "Copy";
  $("curl-dialog").showModal();
});

$("curl-copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl-text").textContent);
    $("curl-copy").textContent = "Copied";
  } catch {
    // Pages of plain-http servers may not write to the clipboard: the text is selected for the person to do it.
    getSelection().selectAllChildren($("curl-text"));
    $("curl-copy").textContent = "Selected";
  }
});

$("remix").addEventListener("click", () => {
  $("remix-prompt").value = stage.job.prompt;
  $("remix-error").textContent = "";
  $("remix-dialog").showModal();
});

async function remix() {
  const since = performance.now();
  try {
    const video = await post(`${pathOf(stage.job.id)}/remix`, { prompt: $("remix-prompt").value });
    $("remix-dialog").close();
    stage.openVideo(video, since);
    list.refresh();
  } catch (error) {
    $("remix-error").textContent = error.message;
  }
}

$("remix-form").addEventListener("submit", (event) => {
  event.preventDefault();
  remix();
});
submitsWithEnter($("remix-form"), remix);
$("remix-close").addEventListener("click", () => $("remix-dialog").close());

$("delete").addEventListener("click", () => {
  $("delete-dialog").returnValue = "";
  $("delete-dialog").showModal();
});

$("delete-dialog").addEventListener("close", async () => {
  if ($("delete-dialog").returnValue !== "delete") return;
  try {
    await api(pathOf(stage.job.id), { method: "DELETE" });
    stage.clear();
    history.replaceState(null, "", location.pathname);
    $("prompt").focus();
  } catch (error) {
    stage.complain(error);
  }
  await list.refresh();
});

// ---- the beginning ------------------------------------------------------------------------------------------------

const stage = new Stage();
const list = new VideoList();

/** Open what the address names, or else what runs. */
async function openFirst() {
  let listed = null;
  while (!keyWanted && !(listed = await list.refresh())) await sleep(JOBS_EVERY_MS);
  const named = location.hash.slice(1);
  const video = named
    ? await getJson(pathOf(named)).catch(() => null)
    : listed?.find((listedVideo) => !isOver(listedVideo));
  if (video && !stage.job) stage.openVideo(video);
}

function begin() {
  loadModels();
  openFirst();
}

addEventListener("hashchange", async () => {
  const id = location.hash.slice(1);
  const video = id && id !== stage.job?.id && (await getJson(pathOf(id)).catch(() => null));
  if (video) stage.openVideo(video);
});

begin();
whileVisible(MESH_EVERY_MS, pollMeshes);
whileVisible(JOBS_EVERY_MS, () => list.refresh());
