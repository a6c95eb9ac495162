/**
 * Keeps the page working offline: everything it needs is stored at the first visit. It also says that the page is its
 * own process, which threads in WebAssembly ask for, where the server does not say so.
 */

const VERSION = "development"; // the hash of files.json, written in when the site is made
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

const worker = /** @type {any} */ (self);
const NAME = `edgecap ${worker.registration.scope} `; // of this site: there may be others at the same origin

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

/** Store every file; those that an earlier version holds are not fetched again. It waits until no page shows the old. */
async function install() {
  const { files } = await (await fetch("files.json", { cache: "no-store" })).json();
  const cache = await caches.open(NAME + VERSION);
  for (const file of files) await kept(cache, file);
  await cache.put("files.json", new Response(JSON.stringify(files)));
}

async function activate() {
  for (const name of await caches.keys()) {
    if (name.startsWith(NAME) && name !== NAME + VERSION) await caches.delete(name);
  }
  await worker.clients.claim();
}

/**
 * A file of the site, stored if it was not; what is not the file that was listed is refused.
 * @param {Cache} cache
 * @param {{ path: string, sha256: string }} file
 */
async function kept(cache, { path, sha256 }) {
  const url = new URL(path, worker.registration.scope).href;
  const key = `${url}?${sha256}`;
  const found = await cache.match(key);
  if (found) return found;
  const response = (await caches.match(key)) ?? (await fetch(url, { cache: "no-cache" }));
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  const body = await response.arrayBuffer();
  const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", body));
  if (Array.from(sum, (byte) => byte.toString(16).padStart(2, "0")).join("") !== sha256) {
    throw new Error(`${path}: not the file that this site was written with`);
  }
  const checked = new Response(body, { headers: response.headers });
  await cache.put(key, checked.clone());
  return checked;
}

/** @param {Request} request */
async function answer(request) {
  const cache = await caches.open(NAME + VERSION);
  const path = new URL(request.url).pathname.slice(new URL(worker.registration.scope).pathname.length);
  const files = await (await cache.match("files.json"))?.json();
  const known = files?.find((/** @type {any} */ file) => file.path === decodeURIComponent(path || "index.html"));
  // A known file that the browser dropped is put back; a newer one at its place is shown, not kept.
  const response = known ? await kept(cache, known).catch(() => fetch(request)) : await fetch(request);
  if (response.status === 0) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
