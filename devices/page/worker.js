// One captioner in a Web Worker of its own, as fresh as a process: benchmarks/worker.py's "load", "time" and "caption",
// with the same meaning. Times are seconds.

let captioner = null;
let options = {};

async function load({ at, bundle, ort: files, threads, decoding, webgpu }) {
  const begin = performance.now();
  const base = new URL("./", self.location.href);
  const [ort, { Captioner, DECODING }] = await Promise.all([
    import(new URL(files.script, base).href),
    import(new URL("edgecap/captioner.js", base).href),
  ]);
  const imported = performance.now();
  const used = self.crossOriginIsolated ? Math.max(1, Math.min(threads, navigator.hardwareConcurrency ?? 1)) : 1;
  ort.env.wasm.numThreads = used;
  ort.env.wasm.wasmPaths = new URL("ort/", base).href;
  ort.env.wasm.wasmBinary = await files.wasm.arrayBuffer();
  if (webgpu && !(await navigator.gpu?.requestAdapter())) throw new Error("this browser has no WebGPU here");
  captioner = await Captioner.load(new URL(at, base).href, {
    ort,
    threads: used,
    executionProviders: webgpu ? ["webgpu"] : ["wasm"],
    fetch: fromBlobs(base, bundle),
  });
  options = Object.fromEntries(Object.entries(DECODING).map(([option, name]) => [option, decoding[name]]));
  const loaded = performance.now();
  return {
    facts: {
      import_s: (imported - begin) / 1000,
      load_s: (loaded - imported) / 1000,
      threads: used,
      engine: webgpu ? "webgpu" : "wasm",
      versions: { "onnxruntime-web": String(ort.env.versions?.web ?? "unknown") },
    },
  };
}

/** A fetch that knows the bundle's files alone, already on the device. */
function fromBlobs(base, bundle) {
  return async (address) => {
    const path = decodeURIComponent(new URL(address, base).href.slice(base.href.length));
    const found = bundle[path];
    return found ? new Response(found) : new Response(null, { status: 404 });
  };
}

async function decoded(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

async function timeWhole(file) {
  const begin = performance.now();
  const { tokenIds, timings } = await captioner.caption(file, options);
  const run = { end_to_end: (performance.now() - begin) / 1000, tokens: tokenIds.length };
  const { preprocess, encode, firstToken, perToken, total } = timings;
  const stages = { preprocess, encode, first_token: firstToken, next_token: perToken, decode: total - preprocess - encode };
  if (perToken <= 0 && tokenIds.length < 2) delete stages.next_token; // there was none; 0 may also be a coarse clock's
  for (const [stage, ms] of Object.entries(stages)) if (Number.isFinite(ms)) run[stage] = Math.max(0, ms) / 1000;
  return run;
}

async function timePicture(file) {
  const picture = await decoded(file);
  const begin = performance.now();
  await captioner.caption(picture, options);
  return { picture_to_text: (performance.now() - begin) / 1000 };
}

/** Each photo from its file and as a decoded picture; the two take turns at going first. once: slow captioners, one
 *  caption a photo, from its file. */
async function time({ photos, once }) {
  if (once) {
    const whole = [];
    for (const file of photos) whole.push(await timeWhole(file));
    return { runs: whole };
  }
  await captioner.caption(photos[0], options); // untimed: the caches still hold what ran before this turn
  const runs = [];
  for (const [i, file] of photos.entries()) {
    const parts = i % 2 ? [timePicture, timeWhole] : [timeWhole, timePicture];
    const run = {};
    for (const part of parts) Object.assign(run, await part(file));
    runs.push(run);
  }
  return { runs };
}

async function caption({ photos }) {
  const captions = [];
  for (const file of photos) {
    const { text, logprob, tokenIds } = await captioner.caption(file, options);
    captions.push({ text, logprob, tokens: tokenIds.length, ids: Array.from(tokenIds, Number) });
  }
  return { captions };
}

const OPERATIONS = { load, time, caption };

self.onmessage = async ({ data }) => {
  try {
    self.postMessage({ ok: true, value: await OPERATIONS[data.op](data) });
  } catch (error) {
    self.postMessage({ ok: false, error: String(error?.message ?? error) });
  }
};
