/**
 * Keeps the page working offline: everything it needs is stored at the first visit. It also says that the page is its
 * own process, which threads in WebAssembly ask for, where the server does not say so.
 */

const VERSION = "development"; // the hash of files.json, written in when the site is made
const NAME = "edgecap-";
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

const worker = /** @type {any} */ (self);

worker.addEventListener("install", (/** @type {any} */ event) => event.waitUntil(install()));
worker.addEventListener("activate", (/** @type {any} */ event) => event.waitUntil(activate()));
worker.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (
    request.method === "GET" &&
    url.origin === worker.location.origin &&
    url.href.startsWith(worker.registration.scope)
  ) {
    event.respondWith(answer(request));
  }
});

/** Store every file; those that an earlier version holds are not fetched again. */
async function install() {
  const { files } = await (await fetch("files.json", { cache: "no-store" })).json();
  const cache = await caches.open(NAME + VERSION);
  for (const { path, sha256 } of files) {
    const url = new URL(path, worker.registration.scope).href;
    const key = `${url}?${sha256}`;
    if (await cache.match(key)) continue;
    const response = (await caches.match(key)) ?? (await fetch(url, { cache: "no-cache" }));
    if (!response.ok) throw new Error(`${path}: ${response.status}`);
    await cache.put(key, response);
  }
  await cache.put("files.json", new Response(JSON.stringify(files)));
  await worker.skipWaiting();
}

async function activate() {
  for (const name of await caches.keys()) {
    if (name.startsWith(NAME) && name !== NAME + VERSION) await caches.delete(name);
  }
  await worker.clients.claim();
}

/** @param {Request} request */
async function answer(request) {
  const cache = await caches.open(NAME + VERSION);
  const scope = worker.registration.scope;
  const path = new URL(request.url).pathname.slice(new URL(scope).pathname.length);
  const files = await (await cache.match("files.json"))?.json();
  const known = files?.find((/** @type {any} */ file) => file.path === decodeURIComponent(path || "index.html"));
  const kept = known && (await cache.match(`${new URL(known.path, scope).href}?${known.sha256}`));
  const response = kept ?? (await fetch(request));
  if (response.status === 0) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
