/** The captioner beside the page, so that the page stays awake: one request, any number of partial texts, one answer. */

// @ts-ignore: both lie there once the site is written
import * as ort from "./ort/ort.wasm.min.mjs";
// @ts-ignore
import { Captioner } from "./edgecap/index.js";

/** @type {Promise<import("../index.js").Captioner> | undefined} */
let captioner;
let newest = new AbortController(); // of the photo that came last

/** @type {Record<string, (given: any, onToken: (partial: any) => void) => Promise<any>>} */
const requests = {
  async load({ bundle, threads, total }, onProgress) {
    let bytes = 0;
    /** @type {Promise<import("../index.js").Captioner>} */
    const loading = Captioner.load(new URL(bundle, self.location.href), {
      ort,
      threads,
      fetch: async (/** @type {any} */ url) => {
        const response = await fetch(url);
        if (!response.ok || !response.body) return response;
        const counted = new TransformStream({
          transform(chunk, controller) {
            bytes += chunk.length;
            onProgress({ progress: Math.min(1, bytes / total) });
            controller.enqueue(chunk);
          },
        });
        return new Response(response.body.pipeThrough(counted));
      },
    });
    captioner = loading;
    const { bundle: loaded, engine } = await loading;
    const { name, target, precision, measured, lineage } = loaded.manifest;
    return {
      name,
      target,
      precision,
      measured,
      data: lineage?.data,
      budgets: budgets(loaded.manifest),
      bytes: loaded.bytes,
      engine,
      sha256: loaded.sha256,
    };
  },

  async caption({ image, options }, onToken) {
    newest.abort(); // nobody waits for an earlier photo's caption
    const { signal } = (newest = new AbortController());
    const loaded = await captioner;
    try {
      return await loaded?.caption(image, { ...options, onToken, signal });
    } finally {
      if (image instanceof ImageBitmap) image.close();
    }
  },

  async verify() {
    return (await captioner)?.verify();
  },
};

/** How much a SmolVLM may see: names, and options of a call. @param {any} manifest @returns {[string, any][]} */
function budgets({ frames, graphs }) {
  if (!frames) return [];
  const [pixels] = Object.values(graphs.encoder.inputs);
  const oneSide = pixels.shape.slice(1, 3).some((/** @type {any} */ side) => typeof side === "number");
  const fits = (/** @type {number} */ side) =>
    side <= frames.native && side % (frames.patch * frames.scale) === 0 && !(oneSide && side !== frames.side);
  const whole = [256, 384, 512].filter(fits).map((side) => [`${side} px`, { imageSize: side, tiles: false }]);
  return /** @type {any} */ (frames.split ? [...whole, ["tiles", { tiles: true }]] : whole);
}

self.addEventListener("message", async ({ data: { id, request, given } }) => {
  try {
    const answer = await requests[request](given, (partial) => self.postMessage({ id, partial }));
    self.postMessage({ id, answer });
  } catch (error) {
    self.postMessage({ id, problem: error instanceof Error ? error.message : String(error) });
  }
});
