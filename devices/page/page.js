// The page of a bench: asks the program that served it for commands, has Web Workers carry them out, posts what came of
// them. See devices/browser.py (the server) and benchmarks/browser.py (who sends the commands).

const MAX_PHOTOS = 64; // kept, the oldest first to go
const RETRIES = 8;
const MEMORY_WAIT = 30000; // ms; browsers answer at their next garbage collection, or after 20 s

const byId = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const base = new URL("./", location.href);
const page = ownId();
const query = `page=${page}`;
const blobs = new Map(); // path below the address → Blob: what the device holds, as an app would
const photos = new Map();
const workers = new Map(); // id → {thread, begun, queue, name, threads}

/** An id that a reload keeps, so that the same device may come back. */
function ownId() {
  let id = null;
  try {
    id = sessionStorage.getItem("edgecap-page");
  } catch {
    // storage is switched off: a reload is another device then
  }
  id ??= [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");
  try {
    sessionStorage.setItem("edgecap-page", id);
  } catch {
    // as above
  }
  return id;
}

function say(text, { bad = false, done = null } = {}) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("bad", bad);
  const bar = byId("progress");
  if (done === null) bar.removeAttribute("value");
  else bar.value = done; // of 1, within this phase
}

// --- what this device is ---

async function gpu() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    if (!adapter) return null;
    const { vendor = "", architecture = "", description = "" } = adapter.info ?? {};
    return { vendor, architecture, description };
  } catch {
    return null;
  }
}

async function facts() {
  return {
    user_agent: navigator.userAgent,
    cores: navigator.hardwareConcurrency ?? null,
    memory_gb: navigator.deviceMemory ?? null,
    secure: isSecureContext,
    isolated: globalThis.crossOriginIsolated === true,
    webgpu: await gpu(),
    memory_api: typeof performance.measureUserAgentSpecificMemory === "function",
  };
}

function showDevice(device) {
  const checks = [
    [device.secure, "Secure page", "No secure page (plain HTTP): one thread, no WebGPU, and the screen may go dark"],
    [device.isolated, "Threads", "No threads: this page is not isolated from others, so one is used"],
    [device.webgpu !== null, "WebGPU", "No WebGPU in this browser"],
    ["wakeLock" in navigator, "The screen stays on", "The screen may go dark: touch it now and then"],
    [device.memory_api, "Memory can be measured", "This browser does not tell how much memory the page takes"],
  ];
  byId("checks").replaceChildren(
    ...checks.map(([there, good, missing]) => {
      const item = document.createElement("li");
      item.textContent = there ? good : missing;
      item.classList.toggle("missing", !there);
      return item;
    }),
  );
  const parts = [device.user_agent];
  if (device.cores) parts.push(`${device.cores} cores`);
  if (device.memory_gb) parts.push(`${device.memory_gb} GB or more`);
  if (device.webgpu) parts.push(Object.values(device.webgpu).filter(Boolean).join(" "));
  byId("device").textContent = parts.filter(Boolean).join(" · ");
}

async function stayAwake() {
  try {
    if (document.visibilityState === "visible") await navigator.wakeLock?.request("screen");
  } catch {
    // a low battery may forbid it
  }
}

// --- talking to the program ---

async function post(name, value) {
  for (let tried = 0; ; tried++) {
    try {
      const reply = await fetch(new URL(name, base), {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(value),
      });
      return reply;
    } catch (error) {
      if (tried >= RETRIES) throw error;
      await sleep(250 * 2 ** Math.min(tried, 4));
    }
  }
}

/** Ask for commands until there are no more. */
async function listen() {
  let failed = 0;
  let last = 0; // the id of the last command that came
  for (;;) {
    let reply, said;
    try {
      reply = await fetch(new URL(`next?${query}&after=${last}`, base), { cache: "no-store" });
      said = reply.status === 200 ? await reply.json() : await reply.text();
      failed = 0;
    } catch {
      if (++failed > RETRIES) return over("The bench is gone: it was stopped, or the network was lost.", true);
      await sleep(500 * failed);
      continue;
    }
    if (reply.status === 204) continue;
    if (reply.status !== 200) return over(said, true);
    if (said.op === "end") return finish(said);
    if (said.id <= last) continue; // it came twice
    last = said.id;
    carryOut(said); // not awaited: the next one may be for another worker
  }
}

async function carryOut(command) {
  let value;
  try {
    value = { ok: true, ...(await done(command)) };
  } catch (error) {
    value = { ok: false, error: String(error?.message ?? error).slice(0, 500) };
  }
  const worker = workers.get(command.worker);
  if (worker) value.since_start = (performance.now() - worker.begun) / 1000;
  try {
    await post(`answer?${query}&id=${command.id}`, value);
  } catch {
    // listen() finds that out, too
  }
}

function done(command) {
  if (command.op === "memory") return memory();
  if (command.op === "close") return close(command.worker);
  if (command.op === "load") return load(command);
  const worker = workers.get(command.worker);
  if (!worker) throw new Error("this worker was ended");
  return inTurn(worker, async () => {
    say(`${command.op === "time" ? "Timing" : "Captioning"}: ${worker.name}`, { done: command.done });
    const files = await Promise.all(command.photos.map(photo));
    const answer = await ask(worker, { op: command.op, photos: files, once: command.once });
    if (command.op === "caption") showCaption(files.at(-1), answer.captions.at(-1));
    return answer;
  });
}

/** One worker does one thing at a time, in the order of the commands. */
function inTurn(worker, job) {
  const mine = worker.queue.then(job);
  worker.queue = mine.catch(() => {});
  return mine;
}

// --- workers ---

/** What it needs is fetched first; then the clock starts with the worker. */
async function load(command) {
  const worker = { thread: null, begun: performance.now(), queue: Promise.resolve(), name: command.name };
  workers.set(command.worker, worker);
  return inTurn(worker, async () => {
    const wanted = [...Object.entries(command.files), [command.ort.wasm, command.ort.bytes]];
    await fetchAll(command.name, wanted);
    say(`Starting: ${command.name}`, { done: command.done });
    worker.begun = performance.now();
    worker.thread = new Worker(new URL("worker.js", base), { type: "module" });
    const bundle = Object.fromEntries(Object.keys(command.files).map((path) => [path, blobs.get(path)]));
    const ort = { script: command.ort.script, wasm: blobs.get(command.ort.wasm) };
    const { threads, decoding, webgpu, bundle: at } = command;
    const answer = await ask(worker, { op: "load", at, bundle, ort, threads, decoding, webgpu });
    worker.threads = answer.facts.threads;
    return answer;
  });
}

function ask(worker, message) {
  return new Promise((answered, failed) => {
    worker.failed = failed; // for close()
    worker.thread.onmessage = ({ data }) => (data.ok ? answered(data.value) : failed(new Error(data.error)));
    worker.thread.onmessageerror = () => failed(new Error("the worker's answer cannot be read"));
    worker.thread.onerror = (event) => failed(new Error(event.message || "the worker could not be started"));
    worker.thread.postMessage(message);
  });
}

function close(id) {
  const worker = workers.get(id);
  workers.delete(id);
  worker?.thread?.terminate();
  worker?.failed?.(new Error("this worker was ended"));
  return {};
}

/** Bytes of everything that this page and its workers hold; null where the browser does not tell. */
async function memory() {
  if ([...workers.values()].some(({ threads }) => threads > 1)) return { bytes: null }; // threads that wait never answer
  try {
    const measured = performance.measureUserAgentSpecificMemory();
    return { bytes: (await Promise.race([measured, sleep(MEMORY_WAIT)]))?.bytes ?? null };
  } catch {
    return { bytes: null };
  }
}

// --- files ---

async function fetchAll(name, wanted) {
  const missing = wanted.filter(([path]) => !blobs.has(path));
  const total = missing.reduce((sum, [, bytes]) => sum + bytes, 0);
  let here = 0;
  for (const [path] of missing) {
    const reply = await fetched(path);
    const parts = [];
    const reader = reply.body.getReader();
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      parts.push(read.value);
      here += read.value.length;
      const mb = (bytes) => (bytes / 1e6).toFixed(1);
      say(`Fetching: ${name}, ${mb(here)} of ${mb(total)} MB`, { done: total ? Math.min(here / total, 1) : null });
    }
    blobs.set(path, new Blob(parts, { type: reply.headers.get("Content-Type") ?? "" }));
  }
}

async function photo(path) {
  if (!photos.has(path)) {
    photos.set(path, await (await fetched(path)).blob());
    if (photos.size > MAX_PHOTOS) photos.delete(photos.keys().next().value);
  }
  return photos.get(path);
}

async function fetched(path) {
  const reply = await fetch(new URL(path, base));
  if (!reply.ok) throw new Error(`${path}: ${reply.status} ${(await reply.text()).slice(0, 200)}`);
  return reply;
}

// --- what is shown ---

let shown = null;

function showCaption(file, caption) {
  if (shown) URL.revokeObjectURL(shown);
  shown = URL.createObjectURL(file);
  byId("photo").src = shown;
  byId("photo").alt = caption.text;
  byId("caption").textContent = caption.text || "(no words)";
  byId("last").hidden = false;
}

function over(text, bad = false) {
  say(text, { bad, done: 1 });
  byId("hint").hidden = true;
  for (const id of [...workers.keys()]) close(id);
}

function finish({ text, columns = [], rows = [] }) {
  over(text);
  if (!rows.length) return;
  const cells = (tag, values) => values.map((value) => Object.assign(document.createElement(tag), { textContent: value }));
  const table = byId("results").querySelector("table");
  table.tHead.rows[0].replaceChildren(...cells("th", ["", ...columns]));
  for (const { name, values = [], error } of rows) {
    const row = table.tBodies[0].insertRow();
    row.append(...cells("td", error ? [name, error] : [name, ...values]));
    if (error) {
      row.cells[1].colSpan = columns.length;
      row.cells[1].className = "bad";
    }
  }
  byId("results").hidden = false;
}

async function main() {
  const device = await facts();
  showDevice(device);
  document.addEventListener("visibilitychange", stayAwake);
  addEventListener("pagehide", () => navigator.sendBeacon(new URL(`bye?${query}`, base)));
  await stayAwake();
  const reply = await post(`hello?${query}`, device);
  if (!reply.ok) return over(await reply.text(), true);
  say("Waiting for the bench…");
  await listen();
}

main().catch((error) => over(`This page failed: ${error?.message ?? error}`, true));
