/** The captioner beside the page, so that the page stays awake: one request, any number of partial texts, one answer. */

// @ts-ignore: both lie there once the site is written
import * as ort from "./ort/ort.wasm.min.mjs";
// @ts-ignore
import { Captioner, UsageError } from "./edgecap/index.js";

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
      budgets: budgets(await loading),
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

/** How much a SmolVLM may see, as far as it takes that: names, and options of a call. @param {any} captioner */
function budgets(captioner) {
  const whole = [256, 384, 512].map((side) => [`${side} px`, { imageSize: side, tiles: false }]);
  return [...whole, ["tiles", { tiles: true }]].filter(([, options]) => {
    try {
      captioner.settings(options);
      return true;
    } catch (error) {
      if (error instanceof UsageError) return false;
      throw error;
    }
  });
}

self.addEventListener("message", async ({ data: { id, request, given } }) => {
  try {
    const answer = await requests[request](given, (partial) => self.postMessage({ id, partial }));
    self.postMessage({ id, answer });
  } catch (error) {
    self.postMessage({ id, problem: error instanceof Error ? error.message : String(error) });
  }
});
