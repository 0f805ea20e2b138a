"use strict";
// The page of `unimodal serve`. It asks nothing of any host but its own, and puts what people or
// the model wrote into the page as text alone.

const $ = (id) => document.getElementById(id);
const KEPT = 48; // results in the strip
const ENDPOINT = {
  images: "/v1/images/generations",
  videos: "/v1/videos/generations",
  edit: "/v1/images/edits",
  extend: "/v1/videos/extensions",
  chat: "/v1/chat/completions",
};
/** By mode: label of the prompt, name of the button, an example. */
const WORDS = {
  images: ["Prompt", "Draw", "a red kite over the sea"],
  videos: ["Prompt", "Draw", "a ball rolls to the right"],
  edit: ["What to do to the picture", "Edit", "make it blue"],
  extend: ["What the clip shows (optional)", "Continue", ""],
  chat: ["Question (none: describe the picture)", "Ask", "What is to be seen here?"],
};

let key = "";
let model = null; // what /v1/models says
let upload = null; // Blob
let running = null; // AbortController
const past = [];

// --- starting ----------------------------------------------------------------------------

function el(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function start() {
  try {
    const given = new URLSearchParams(location.hash.slice(1)).get("key");
    key = given || sessionStorage.getItem("key") || "";
    if (given) history.replaceState(null, "", location.pathname);
  } catch { /* storage may be switched off */ }
  await open();
}

async function open() {
  const answer = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  if (!answer) return fail("The server does not answer: is it still running?");
  $("key").hidden = answer.status !== 401;
  if (answer.status === 401) {
    if (key) fail("This is not the server's key.");
    $("secret").focus();
    return;
  }
  if (!answer.ok) return fail(await reason(answer));
  fail("");
  if (key) sessionStorage.setItem("key", key);
  model = (await answer.json()).data[0];
  describe(model);
}

function describe(card) {
  const own = card.unimodal;
  document.title = `${card.id} · unimodal`;
  $("model").textContent = card.id;
  const can = { ...own.can, chat: own.can.describe || own.can.ask };
  const names = { images: "pictures", videos: "videos", edit: "edits", describe: "descriptions", ask: "answers" };
  const does = Object.keys(names).filter((name) => can[name]).map((name) => names[name]);
  $("about").textContent =
    `${does.join(", ")} · context of ${own.context.toLocaleString("en")} tokens`;
  for (const input of document.querySelectorAll("[name=mode]")) {
    input.disabled = !can[input.value];
    input.parentElement.title = input.disabled ? "This checkpoint was not trained for it" : "";
  }
  const first = document.querySelector("[name=mode]:not(:disabled)");
  if (first && !can[mode()]) first.checked = true;
  const defaults = own.defaults, limits = own.limits;
  $("guidance").value = defaults.guidance;
  $("image_guidance").value = defaults.image_guidance ?? 1;
  $("n").max = limits.pictures;
  $("prompt").maxLength = limits.prompt;
  $("tokens").max = limits.tokens;
  $("tokens").value = Math.min(256, limits.tokens);
  if (!can.ask) document.querySelector("[name=mode][value=chat] + span").textContent = "Describe";
  $("frames").max = limits.frames;
  $("frames").value = own.frames || 8;
  $("fps").placeholder = own.fps;
  choose();
}

function mode() {
  return document.querySelector("[name=mode]:checked").value;
}

/** What the mode needs, and nothing else. */
function choose() {
  const now = mode(), own = model?.unimodal;
  for (const part of document.querySelectorAll(".needs")) part.hidden = !part.classList.contains(now);
  const [label, verb, example] = WORDS[now];
  $("named").textContent = label;
  $("go").textContent = now === "chat" && own && !own.can.ask ? "Describe" : verb;
  $("prompt").placeholder = example;
  $("choose").firstChild.textContent =
    now === "extend" ? "Drop a video here, or " : "Drop a picture here, or ";
  $("file").accept = now === "extend" ? "video/*,image/webp,image/gif" : now === "edit" ? "image/*" : "image/*,video/*";
  if (own) {
    const sizes = now === "videos" ? own.video_sizes : own.sizes;
    const before = $("size").value;
    const auto = now === "edit" ? "as given" : sizes[0] ?? "auto";
    const rest = now === "edit" ? sizes : sizes.slice(1);
    $("size").replaceChildren(
      el("option", { value: "auto", textContent: auto.replace("x", " × ") }),
      ...rest.map((size) => el("option", { value: size, textContent: size.replace("x", " × ") })),
      el("option", { value: "custom", textContent: "other…" }),
    );
    $("size").value = before;
    if ($("size").selectedIndex < 0) $("size").value = "auto";
    const chat = now === "chat";
    $("temperature").placeholder = chat ? own.defaults.text_temperature ?? "likeliest" : own.defaults.temperature;
    $("top_k").placeholder = chat ? own.defaults.text_top_k ?? "" : own.defaults.top_k;
    $("top_p").placeholder = chat ? own.defaults.text_top_p ?? "" : own.defaults.top_p;
  }
  // What only describes pictures takes no words.
  $("prompt").disabled = now === "chat" && Boolean(own) && !own.can.ask;
  if ($("prompt").disabled) {
    $("named").textContent = "Question";
    $("prompt").placeholder = "This checkpoint describes pictures, and was not trained to answer";
  }
  sized();
  slid();
}

function sized() {
  $("custom").hidden = $("size").value !== "custom" || !$("custom").classList.contains(mode());
}

function slid() {
  const named = (value) => (Number(value) === 1 ? "1 (none)" : value);
  $("guided").textContent = named($("guidance").value);
  $("held").textContent = named($("image_guidance").value);
}

function fail(message) {
  $("error").textContent = message;
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

// --- what is given -----------------------------------------------------------------------

function give(blob) {
  const own = model?.unimodal;
  if (blob && own && blob.size > own.limits.upload) {
    fail(`The file has ${blob.size.toLocaleString("en")} bytes; the limit is ${own.limits.upload.toLocaleString("en")}.`);
    return;
  }
  fail("");
  const old = $("shown").firstElementChild;
  if (old?.src) URL.revokeObjectURL(old.src);
  upload = blob;
  $("given").hidden = !blob;
  $("choose").hidden = Boolean(blob);
  $("file").value = "";
  $("shown").replaceChildren();
  if (blob) $("shown").append(shown(URL.createObjectURL(blob), blob.type, "what you gave"));
}

function shown(url, type, alt) {
  if (type.startsWith("video/")) {
    return el("video", { src: url, loop: true, muted: true, autoplay: true, playsInline: true, controls: true, title: alt });
  }
  return el("img", { src: url, alt, onload() { this.classList.toggle("fine", this.naturalWidth < 200); } });
}

function take(files) {
  const file = [...files].find((one) => /^(image|video)\//.test(one.type));
  if (!file) return files.length ? fail("Only pictures and videos can be given.") : undefined;
  const moving = file.type.startsWith("video/");
  const can = model?.unimodal.can ?? {};
  if (!["edit", "extend", "chat"].includes(mode())) {
    const to = moving && can.extend ? "extend" : "chat";
    document.querySelector(`[name=mode][value=${to}]`).checked = true;
    choose();
  }
  give(file);
}

// --- asking ------------------------------------------------------------------------------

/** The settings as the endpoints take them; throws what is wrong with them. */
function settings(now) {
  const own = { progress: true, stream: true };
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  for (const id of ["n", "frames", "fps", "tokens", "guidance", "image_guidance", "negative", "seed", "temperature", "top_k", "top_p"]) {
    const field = $(id);
    if (field.closest(".needs:not(." + now + ")")) continue;
    if (field.validity.badInput) throw new Error(`${labelled(field)}: write a number`);
    own[id] = field.type === "text" ? field.value || undefined : number(id);
  }
  if (now !== "chat") {
    own.prompt = $("prompt").value;
    const size = $("size").value;
    if (now !== "extend") own.size = size === "custom" ? `${$("width").value}x${$("height").value}` : size;
    if (now === "videos" || now === "extend") own.output_format = $("form").value;
    if (own.temperature === 0) throw new Error("Temperature must be above 0 for pictures");
    if (now === "images" && !own.prompt.trim()) throw new Error("Say what is to be drawn");
    if (now === "edit" && !own.prompt.trim()) throw new Error("Say what is to be done to the picture");
  } else {
    own.max_tokens = own.tokens;
    delete own.tokens;
  }
  if (now === "edit" && !upload) throw new Error("Give a picture to be edited");
  if (now === "extend" && !upload) throw new Error("Give a video to be continued");
  if (now === "chat" && !upload && !question()) throw new Error("Give a picture, or ask something");
  return own;
}

function question() {
  return $("prompt").disabled ? "" : $("prompt").value.trim();
}

function labelled(field) {
  return field.labels[0]?.firstChild.textContent.trim() ?? field.id;
}

async function body(now, own) {
  if (now === "images" || now === "videos") return JSON.stringify(own);
  if (now === "chat") {
    const content = [];
    if (upload) {
      const kind = upload.type.startsWith("video/") ? "video_url" : "image_url";
      content.push({ type: kind, [kind]: { url: await dataURL(upload) } });
    }
    if (question()) content.push({ type: "text", text: question() });
    return JSON.stringify({ ...own, model: model.id, messages: [{ role: "user", content }] });
  }
  const form = new FormData();
  form.append(now === "edit" ? "image" : "video", upload, "upload");
  for (const [name, value] of Object.entries(own)) if (value !== undefined) form.append(name, value);
  return form;
}

function dataURL(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

async function ask(event) {
  event?.preventDefault();
  if (running || !model) return;
  const now = mode();
  let own;
  try {
    own = settings(now);
  } catch (error) {
    return fail(error.message);
  }
  fail("");
  const mine = (running = new AbortController());
  busy(true);
  const work = now === "chat" ? new Talk() : new Drawing(now, own);
  work.begin();
  if (innerWidth < 800) $("stage").scrollIntoView({ block: "start" });
  try {
    const sent = await body(now, own);
    const more = typeof sent === "string" ? { "Content-Type": "application/json" } : {};
    const answer = await fetch(ENDPOINT[now], { method: "POST", headers: headers(more), body: sent, signal: mine.signal });
    if (!answer.ok) throw new Error(await reason(answer));
    for await (const one of events(answer.body)) {
      if (one.error) throw new Error(one.error.message);
      if (one.type === "unimodal.queued") tell(one.before ? `Waiting: ${one.before} before you` : "Starting");
      else if (one.type === "unimodal.progress") pace(one);
      else await work.take(one);
    }
    work.end();
  } catch (error) {
    work.drop();
    if (error.name !== "AbortError") fail(mine.signal.aborted ? "" : spoken(error));
  } finally {
    running = null;
    busy(false);
  }
}

function spoken(error) {
  return error instanceof TypeError ? "The server does not answer: is it still running?" : error.message;
}

/** Server-sent events of a response, as the objects in them. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").find((line) => line.startsWith("data: "));
      if (data && data !== "data: [DONE]") yield JSON.parse(data.slice(6));
    }
  }
}

function busy(on) {
  $("go").disabled = on;
  $("cancel").hidden = !on;
  $("pace").hidden = !on;
  $("bar").removeAttribute("value");
  if (on) tell("Sending");
}

function tell(message) {
  $("told").textContent = message;
}

function pace(event) {
  const parts = [];
  const count = (value) => value.toLocaleString("en");
  if (event.total_tokens) {
    $("bar").max = event.total_tokens;
    $("bar").value = event.tokens;
    parts.push(`${count(event.tokens)} of ${count(event.total_tokens)} tokens`);
  } else {
    parts.push(`${count(event.tokens)} tokens`);
  }
  parts.push(`${count(Math.round(event.tokens_per_second))} a second`);
  if (event.seconds_left !== null) parts.push(`${duration(event.seconds_left)} left`);
  tell(parts.join(" · "));
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

// --- what comes back ---------------------------------------------------------------------

const TYPES = { png: "image/png", webp: "image/webp", jpeg: "image/jpeg", gif: "image/gif", mp4: "video/mp4" };

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: TYPES[event.output_format] });
}

/** Pictures or clips: a card each, which grow. */
class Drawing {
  constructor(now, own) {
    this.mode = now;
    this.own = own;
    this.cards = [];
  }

  begin() {
    const count = this.own.n ?? 1;
    $("results").className = count === 1 ? "one" : "";
    this.cards = Array.from({ length: count }, () => {
      const mat = el("div", { className: "mat" });
      return { mat, card: el("figure", { className: "card" }, mat), url: "" };
    });
    const size = this.own.size && this.own.size !== "auto" ? this.own.size : this.usual();
    if (size) for (const { mat } of this.cards) mat.style.aspectRatio = size.replace("x", " / ");
    $("results").replaceChildren(...this.cards.map((one) => one.card));
  }

  usual() {
    const own = model.unimodal;
    return this.mode === "images" ? own.sizes[0] : this.mode === "videos" ? own.video_sizes[0] : undefined;
  }

  async take(event) {
    const one = this.cards[event.index ?? 0];
    const blob = blobOf(event);
    const url = URL.createObjectURL(blob);
    const made = shown(url, blob.type, `${this.own.prompt || "continued"}`);
    if (made.decode) await made.decode().catch(() => {});
    one.mat.style.aspectRatio = event.size.replace("x", " / ");
    one.mat.replaceChildren(made);
    if (one.url) URL.revokeObjectURL(one.url);
    one.url = url;
    if (event.type.endsWith(".completed")) {
      const item = { kind: this.mode, prompt: this.own.prompt, own: { ...this.own, seed: event.seed }, copy: event.index, blob, url, size: event.size, form: event.output_format };
      one.done = true;
      one.card.append(caption(item));
      remember(item);
    }
  }

  end() {
    if (!this.cards.every((one) => one.done)) throw new Error("the server ended before it was done");
  }

  drop() {
    for (const one of this.cards) {
      if (one.done) continue;
      if (one.url) URL.revokeObjectURL(one.url);
      one.card.remove();
    }
    settle();
  }
}

/** A question and its answer, which grows. */
class Talk {
  begin() {
    this.blob = upload;
    this.url = upload ? URL.createObjectURL(upload) : "";
    this.item = { kind: "chat", prompt: question(), blob: this.blob, url: this.url, answer: "" };
    this.answer = el("p", { className: "answer", textContent: "…" });
    $("results").className = "words";
    $("results").replaceChildren((this.card = talk(this.item, this.answer)));
  }

  async take(event) {
    const piece = event.choices?.[0]?.delta?.content;
    if (!piece) return;
    this.item.answer += piece;
    this.answer.textContent = this.item.answer;
  }

  end() {
    if (!this.item.answer.trim()) this.answer.textContent = "(the model says nothing)";
    remember(this.item);
  }

  drop() {
    if (this.item.answer) return this.end(); // what is said is said
    this.card.remove();
    if (this.url) URL.revokeObjectURL(this.url);
    settle();
  }
}

function settle() {
  if (!$("results").childElementCount) {
    $("results").append(el("p", { className: "empty", textContent: "What you ask for is drawn here, row by row." }));
  }
}

function talk(item, answer) {
  const words = el("figcaption", {}, el("p", { className: "words-of", textContent: item.prompt || "Described" }), answer);
  const card = el("figure", { className: "card" });
  if (item.blob) {
    card.classList.add("talk");
    card.append(el("div", { className: "mat" }, shown(item.url, item.blob.type, "what was asked about")));
  }
  card.append(words);
  return card;
}

function caption(item) {
  const can = model.unimodal.can;
  const moving = item.kind === "videos" || item.kind === "extend";
  const said = [item.size.replace("x", " × "), `seed ${item.own.seed}`];
  if (item.own.guidance) said.push(`guidance ${item.own.guidance}`);
  if (item.copy) said.push(`number ${item.copy + 1}`);
  const tools = el("div", { className: "tools" });
  const tool = (name, does) => tools.append(el("button", { type: "button", textContent: name, onclick: does }));
  tools.append(el("a", { href: item.url, download: filename(item), textContent: "Download" }));
  if (moving && can.extend) tool("Continue", () => turn("extend", item));
  if (!moving && can.edit) tool("Edit", () => turn("edit", item));
  if (can.describe) tool(can.ask ? "Ask" : "Describe", () => turn("chat", item));
  tool("Same settings", () => again(item));
  return el("figcaption", {},
    el("p", { className: "words-of", textContent: item.prompt || "(continued)" }),
    el("small", { textContent: said.join(" · ") }), tools);
}

function filename(item) {
  const words = (item.prompt || "continued").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 48);
  return `${words || "picture"}-s${item.own.seed}-${item.copy ?? 0}.${item.form}`;
}

/** Go on with something that was made. */
function turn(to, item) {
  document.querySelector(`[name=mode][value=${to}]`).checked = true;
  if (to !== "extend") $("prompt").value = "";
  choose();
  give(item.blob);
  $("prompt").focus();
}

/** Put back what a picture was asked with. */
function again(item) {
  document.querySelector(`[name=mode][value=${item.kind}]`).checked = true;
  choose();
  $("prompt").value = item.prompt;
  for (const [name, value] of Object.entries(item.own)) {
    const field = $(name);
    if (field && field !== $("size") && field !== $("form")) field.value = value ?? "";
  }
  const size = item.own.size ?? "auto";
  $("size").value = size;
  if ($("size").selectedIndex < 0) {
    $("size").value = "custom";
    [$("width").value, $("height").value] = size.split("x");
  }
  $("more").open = true;
  sized();
  slid();
  $("prompt").focus();
}

function remember(item) {
  past.unshift(item);
  for (const old of past.splice(KEPT)) if (old.url) setTimeout(() => URL.revokeObjectURL(old.url));
  $("past").hidden = false;
  const thumb = (one) => {
    if (!one.blob) return el("span", { textContent: one.answer });
    return shown(one.url, one.blob.type, "");
  };
  $("strip").replaceChildren(...past.map((one) => {
    const name = one.kind === "chat" ? `Answer: ${one.answer}` : one.prompt || "continued";
    const button = el("button", { type: "button", title: name, onclick: () => look(one) }, thumb(one));
    button.setAttribute("aria-label", name);
    return el("li", {}, button);
  }));
}

/** Show something of the strip again. */
function look(item) {
  if (running) return;
  if (item.kind === "chat") {
    $("results").className = "words";
    $("results").replaceChildren(talk(item, el("p", { className: "answer", textContent: item.answer })));
  } else {
    const mat = el("div", { className: "mat" }, shown(item.url, item.blob.type, item.prompt));
    mat.style.aspectRatio = item.size.replace("x", " / ");
    $("results").className = "one";
    $("results").replaceChildren(el("figure", { className: "card" }, mat, caption(item)));
  }
  $("stage").scrollIntoView({ block: "nearest" });
}

// --- hands -------------------------------------------------------------------------------

function cancel() {
  running?.abort(); // the server sees that nobody listens, and goes on with the next in the queue
}

$("ask").addEventListener("submit", ask);
$("key").addEventListener("submit", (event) => { event.preventDefault(); key = $("secret").value; open(); });
$("modes").addEventListener("change", choose);
$("size").addEventListener("change", sized);
$("guidance").addEventListener("input", slid);
$("image_guidance").addEventListener("input", slid);
$("cancel").addEventListener("click", cancel);
$("remove").addEventListener("click", () => { give(null); $("file").focus(); });
$("file").addEventListener("change", () => take($("file").files));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") cancel();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
});
addEventListener("paste", (event) => { if (event.clipboardData?.files.length) take(event.clipboardData.files); });
let depth = 0;
addEventListener("dragenter", (event) => {
  if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
  depth += 1;
  document.body.classList.add("over");
});
addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) document.body.classList.remove("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
});
start();
