/** The demo page's service worker, on caches and a server that are objects here. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { runInNewContext } from "node:vm";

const SCRIPT = readFileSync(new URL("../demo/sw.js", import.meta.url), "utf8");
const sha256 = (/** @type {string} */ text) => createHash("sha256").update(text).digest("hex");

/** An origin: caches of all its sites, and what its server has. */
function origin() {
  const stores = /** @type {Map<string, Map<string, Response>>} */ (new Map());
  const served = /** @type {Record<string, string>} */ ({});
  const asked = /** @type {string[]} */ ([]);

  /** @param {string} scope @param {string} version */
  function site(scope, version) {
    const url = (/** @type {string} */ path) => new URL(path, scope).href;
    const open = (/** @type {string} */ name) => {
      const store = stores.get(name) ?? new Map();
      stores.set(name, store);
      return {
        match: async (/** @type {string} */ key) => store.get(url(key))?.clone(),
        put: async (/** @type {string} */ key, /** @type {Response} */ value) => void store.set(url(key), value),
      };
    };
    const caches = {
      open: async (/** @type {string} */ name) => open(name),
      keys: async () => [...stores.keys()],
      delete: async (/** @type {string} */ name) => stores.delete(name),
      match: async (/** @type {string} */ key) =>
        [...stores.values()]
          .find((each) => each.has(key))
          ?.get(key)
          ?.clone(),
    };
    const fetch = async (/** @type {any} */ what) => {
      const place = url(what.url ?? what);
      asked.push(place);
      return place in served ? new Response(served[place]) : new Response("", { status: 404 });
    };
    const listeners = /** @type {Record<string, (event: any) => void>} */ ({});
    const self = {
      addEventListener: (/** @type {string} */ name, /** @type {any} */ listener) => (listeners[name] = listener),
      location: new URL(scope),
      registration: { scope },
      clients: { claim: async () => {} },
    };
    const script = SCRIPT.replace('"development"', JSON.stringify(version));
    runInNewContext(script, { self, caches, fetch, crypto, URL, Response, Headers, Error, Uint8Array });
    return {
      /** @param {Record<string, string>} files @param {Record<string, string>} [sent] what the server has instead */
      serve(files, sent = files) {
        for (const [path, text] of Object.entries(sent)) served[url(path)] = text;
        const list = Object.entries(files).map(([path, text]) => ({ path, sha256: sha256(text) }));
        served[url("files.json")] = JSON.stringify({ files: list });
      },
      /** @param {string} name */
      fire: (name) => new Promise((resolve) => listeners[name]({ waitUntil: resolve })),
      /** @param {string} path @returns {Promise<Response>} */
      get: (path) =>
        new Promise((resolve) => listeners.fetch({ request: { method: "GET", url: url(path) }, respondWith: resolve })),
    };
  }
  return { site, stores, asked };
}

test("two sites of one origin keep their files, an update its unchanged ones, and what was dropped comes back", async () => {
  const { site, stores, asked } = origin();
  const outer = site("https://x.test/", "1");
  outer.serve({ "index.html": "outer", "a.js": "same" });
  await outer.fire("install");
  await outer.fire("activate");
  const inner = site("https://x.test/inner/", "1");
  inner.serve({ "index.html": "inner" });
  await inner.fire("install");
  await inner.fire("activate");
  assert.equal(stores.size, 2);

  asked.length = 0;
  const later = site("https://x.test/", "2");
  later.serve({ "index.html": "newer", "a.js": "same" });
  await later.fire("install");
  assert.deepEqual(asked, ["https://x.test/files.json", "https://x.test/index.html"]);
  assert.equal(await (await outer.get("")).text(), "outer");
  await later.fire("activate");
  assert.equal(stores.size, 2);
  const page = await later.get("");
  assert.equal(await page.text(), "newer");
  assert.equal(page.headers.get("Cross-Origin-Embedder-Policy"), "require-corp");
  assert.equal(await (await inner.get("")).text(), "inner");

  for (const store of stores.values()) for (const key of store.keys()) if (key.includes("a.js")) store.delete(key);
  asked.length = 0;
  for (const _ of [1, 2]) assert.equal(await (await later.get("a.js")).text(), "same");
  assert.deepEqual(asked, ["https://x.test/a.js"]);
});

test("what is not the listed file is not kept", async () => {
  const { site, stores, asked } = origin();
  const one = site("https://x.test/", "1");
  one.serve({ "a.js": "right" }, { "a.js": "wrong" });
  await assert.rejects(one.fire("install"), /a.js: not the file that this site was written with/);
  one.serve({ "a.js": "right" });
  await one.fire("install");
  one.serve({ "a.js": "right" }, { "a.js": "newer" });
  for (const store of stores.values()) for (const key of store.keys()) if (key.includes("a.js")) store.delete(key);
  asked.length = 0;
  for (const _ of [1, 2]) assert.equal(await (await one.get("a.js")).text(), "newer");
  assert.equal(asked.length, 4);
});
