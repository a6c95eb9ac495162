/** The page: a photo from a file, a drop, the clipboard or the camera; its caption as it is said; what it took. */

/** @param {string} id @returns {any} */
const get = (id) => document.getElementById(id);

const worker = new Worker("worker.js", { type: "module" });
/** @type {Map<number, { resolve: (value: any) => void, reject: (error: Error) => void, onPartial?: (partial: any) => void }>} */
const waiting = new Map();
let last = 0;
/** @type {MediaStream | null} */
let camera = null;
let ready = false;
let newest = 0; // the photo that was chosen last: what earlier ones say is not shown

worker.addEventListener("message", ({ data: { id, partial, answer, problem } }) => {
  const call = waiting.get(id);
  if (partial !== undefined) {
    call?.onPartial?.(partial);
    return;
  }
  waiting.delete(id);
  if (problem === undefined) call?.resolve(answer);
  else call?.reject(new Error(problem));
});
worker.addEventListener("error", (event) => failed(new Error(event.message || "the captioner cannot be started")));

/**
 * @param {string} request
 * @param {any} [given]
 * @param {(partial: any) => void} [onPartial]
 * @param {Transferable[]} [transfer]
 * @returns {Promise<any>}
 */
function ask(request, given, onPartial, transfer = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++last, { resolve, reject, onPartial });
    worker.postMessage({ id: last, request, given }, transfer);
  });
}

/** @param {unknown} error */
function show(error) {
  get("problem").textContent = error instanceof Error ? error.message : String(error);
  document.body.classList.remove("busy");
}

/** What ends a start says so. @param {unknown} error */
function failed(error) {
  show(error);
  if (!ready) get("status").textContent = "Not started";
}

/** @param {boolean} busy @param {number} [progress] */
function setBusy(busy, progress) {
  document.body.classList.toggle("busy", busy);
  if (progress === undefined) get("progress").removeAttribute("value");
  else get("progress").value = progress;
}

/** @param {number} bytes */
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

async function start() {
  const { searchParams } = new URL(location.href);
  const threads =
    Number(searchParams.get("threads")) || (crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1);
  const bundle = `${(searchParams.get("bundle") ?? "bundle").replace(/\/$/u, "")}/`;
  setBusy(true, 0);
  const manifest = await fetch(`${bundle}bundle.json`).then((response) => (response.ok ? response.json() : null));
  const sizes = Object.entries(manifest?.files ?? {}).filter(([name]) => /^(encoder|decoder|tokenizer)\./u.test(name));
  const total = sizes.reduce((sum, [, file]) => sum + /** @type {any} */ (file).bytes, 1);
  const loaded = await ask("load", { bundle, threads, total }, ({ progress }) => setBusy(true, progress));
  describe(loaded, threads);
  offer(loaded.budgets);
  ready = true;
  for (const id of ["file", "camera", "verify"]) get(id).disabled = false;
  get("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  setBusy(false);
  get("status").textContent = "Ready";
}

/** @param {any} loaded @param {number} threads */
function describe(loaded, threads) {
  const more = crossOriginIsolated ? "" : " (more after a reload, over HTTPS or on localhost)";
  const rows = {
    Name: loaded.name,
    Target: `${loaded.target}, ${megabytes(loaded.bytes)}`,
    Engine: loaded.engine,
    Threads: `${threads}${more}`,
    "SHA-256": loaded.sha256.slice(0, 16),
  };
  get("about").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]),
  );
}

/** SmolVLM's choices of how much it sees. @param {[string, Record<string, any>][]} budgets name and options of each */
function offer(budgets) {
  get("sees").hidden = !budgets.length;
  for (const [name, options] of budgets) {
    const choice = element("option", name);
    choice.setAttribute("value", JSON.stringify(options));
    get("size").append(choice);
  }
}

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const found = document.createElement(tag);
  found.textContent = text;
  return found;
}

/** @param {Blob | ImageBitmap} image */
async function caption(image) {
  const number = ++newest;
  const beam = get("beam").value;
  get("problem").textContent = "";
  get("caption").textContent = "";
  get("figures").hidden = true;
  get("status").textContent = "Looking…";
  setBusy(true);
  try {
    const options = { ...(beam ? { beam: Number(beam) } : {}), ...JSON.parse(get("size").value || "{}") };
    const transfer = image instanceof Blob ? [] : [image];
    const found = await ask("caption", { image, options }, (partial) => say(number, partial.text), transfer);
    say(number, found.text);
    if (number === newest) figures(found);
  } catch (error) {
    if (number === newest) show(error);
  } finally {
    if (number === newest) {
      setBusy(false);
      get("status").textContent = "Ready";
    }
  }
}

/** @param {number} number @param {string} text */
function say(number, text) {
  if (number === newest) get("caption").textContent = text;
}

/** @param {any} found */
function figures({ timings, tokenIds, logprob, alternatives }) {
  const rows = [
    ["Decode and resize", timings.preprocess],
    ["Encoder", timings.encode],
    ["First token", timings.firstToken],
    [`Each further token (of ${tokenIds.length})`, timings.perToken],
    ["Photo to caption", timings.total],
  ];
  get("timings").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = document.createElement("tr");
      row.append(element("th", String(name)), element("td", `${Number(value).toFixed(1)} ms`));
      return row;
    }),
  );
  const others = alternatives.map((/** @type {any} */ other) =>
    element("li", `${other.text} (${other.logprob.toFixed(2)})`),
  );
  get("others").hidden = !others.length;
  get("others")
    .querySelector("ol")
    .replaceChildren(...others);
  get("caption").title = `log-probability ${logprob.toFixed(3)}`;
  get("figures").hidden = false;
}

/** @param {Blob | undefined | null} file */
function take(file) {
  if (!file || !ready) return;
  stopCamera();
  const { photo } = stage("photo");
  URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(file);
  photo.alt = "The chosen photo";
  void caption(file);
}

/** Show one of the stage's parts. @param {"empty" | "photo" | "video"} part */
function stage(part) {
  for (const id of ["empty", "photo", "video"]) get(id).hidden = id !== part;
  return { photo: get("photo"), video: get("video") };
}

async function toggleCamera() {
  if (camera) {
    stopCamera();
    return;
  }
  const photo = newest;
  get("camera").disabled = true; // one camera is asked for at a time
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
    if (photo !== newest) {
      stopCamera(); // a photo was chosen meanwhile
      return;
    }
    const { video } = stage("video");
    video.srcObject = camera;
    await video.play();
    get("shot").hidden = false;
    get("camera").textContent = "Stop";
  } catch (error) {
    stopCamera();
    show(new Error(`no camera: ${error instanceof Error ? error.message : error}`));
  } finally {
    get("camera").disabled = false;
  }
}

function stopCamera() {
  for (const track of camera?.getTracks() ?? []) track.stop();
  camera = null;
  get("shot").hidden = true;
  get("camera").textContent = "Camera";
}

get("photo").addEventListener("error", () => stage("empty"));
get("file").addEventListener("change", (/** @type {any} */ event) => {
  take(event.target.files[0]);
  event.target.value = "";
});
get("camera").addEventListener("click", toggleCamera);
get("shot").addEventListener("click", () => createImageBitmap(get("video")).then(caption).catch(show));
get("verify").addEventListener("click", async () => {
  get("verified").textContent = "Verifying…";
  try {
    const { ok, minCosine, sameTokens } = await ask("verify");
    const tokens = sameTokens ? "the same tokens" : "other tokens";
    get("verified").textContent =
      `${ok ? "As exported" : "Not as exported"}: ${tokens}, cosine ${minCosine.toFixed(6)}`;
  } catch (error) {
    get("verified").textContent = "";
    show(error);
  }
});
document.addEventListener("paste", (event) => take(event.clipboardData?.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  get("stage").classList.add("over");
});
document.addEventListener("dragleave", () => get("stage").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  get("stage").classList.remove("over");
  take(event.dataTransfer?.files[0]);
});

start().catch(failed);
if ("serviceWorker" in navigator) {
  navigator.serviceWorker
    .register("sw.js")
    .then(() => navigator.serviceWorker.ready)
    .then(() => document.documentElement.setAttribute("data-offline", "ready"))
    .catch((error) => console.warn(`not kept for offline use: ${error}`));
}
