/** In a real Chromium: the same captions as Python, pages on plain HTTP, and the demo page with its server gone. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createReadStream, existsSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join } from "node:path";
import { after, before, test } from "node:test";

import { camel, folder, json, missing } from "./fixture.js";

/** @returns {string} the browser's program, "" where there is none */
function chromium() {
  const given = process.env.EDGECAP_CHROMIUM;
  if (given) return given;
  for (const name of ["chromium", "chromium-browser", "google-chrome"]) {
    try {
      return execFileSync("which", [name], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
    } catch {
      // the next one
    }
  }
  return "";
}

const program = chromium();
const skip = missing || (program ? false : "no chromium on this machine: the browser is not tested");
const TYPES = { ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".css": "text/css" };

/** The fixture's folder on a free port. @param {Record<string, string>} headers @returns {Promise<import("node:http").Server>} */
function serve(headers) {
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url ?? "", "http://x").pathname);
    const file = join(folder, path.endsWith("/") ? `${path}index.html` : path);
    const type = /** @type {Record<string, string>} */ (TYPES)[extname(file)] ?? "text/html";
    if (path !== "/" && !existsSync(file)) response.writeHead(404).end();
    else {
      response.writeHead(200, { "Content-Type": type, ...headers });
      if (path === "/") response.end("<!doctype html><title>empty</title>");
      else createReadStream(file).pipe(response);
    }
  });
  return new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(server)));
}

/** @param {import("node:http").Server} server */
const port = (server) => /** @type {import("node:net").AddressInfo} */ (server.address()).port;

const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
/** @type {import("playwright-core").Browser} */
let browser;
/** @type {import("node:http").Server} */
let isolated;
/** @type {import("node:http").Server} */
let plain;

before(async () => {
  if (skip) return;
  const { chromium: launcher } = await import("playwright-core");
  const camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]; // one that shows a drawing
  const rules = "--host-resolver-rules=MAP edgecap.test 127.0.0.1";
  browser = await launcher.launch({
    executablePath: program,
    args: ["--no-sandbox", "--disable-dev-shm-usage", rules, ...camera],
  });
  [isolated, plain] = await Promise.all([serve(ISOLATED), serve({})]);
});
after(async () => {
  await browser?.close();
  for (const server of [isolated, plain]) {
    server?.closeAllConnections();
    server?.close();
  }
});

/** Run in the page: captions of a bundle's photos. @param {any} given */
async function inPage({ name, sizes, searches, threads }) {
  const load = (/** @type {string} */ path) => import(path);
  const ort = await load("/site/ort/ort.wasm.min.mjs");
  const { Captioner } = await load("/site/edgecap/index.js");
  const captioner = await Captioner.load(`/${name}.edgecap`, { ort, threads });
  const bytes = new Uint8Array(await (await fetch(`/${name}.bin`)).arrayBuffer());
  let at = 0;
  const found = [];
  for (const [width, height] of sizes) {
    const data = bytes.subarray(at, (at += width * height * 3));
    const each = [];
    for (const options of searches) each.push(await captioner.caption({ data, width, height }, options));
    found.push(each);
  }
  const { ok, sameTokens } = await captioner.verify();
  await captioner.close();
  const secure = globalThis.isSecureContext && Boolean(crypto.subtle);
  return { found, ok: ok && sameTokens, isolated: crossOriginIsolated, secure, engine: captioner.engine };
}

for (const [name, within] of /** @type {const} */ ([
  ["gru", 2e-4], // WebAssembly sums in another order than x86
  ["in_place", 5e-4], // and random attention makes more of it
  ["concatenated", 5e-4],
  ["framed", 5e-4],
  ["budget", 5e-4],
])) {
  test(`Chromium says what Python says: ${name}`, { skip }, async () => {
    const { sizes, searches } = json("captions.json")[name];
    const page = await browser.newPage();
    await page.goto(`http://localhost:${port(isolated)}/`);
    const options = searches.map((/** @type {any} */ each) => camel(each.options));
    const got = await page.evaluate(inPage, { name, sizes, searches: options, threads: 1 });
    assert.ok(got.ok && got.isolated && got.secure && got.engine.startsWith("onnxruntime-web"));
    assert.equal(got.found.length, sizes.length);
    for (const [photo, each] of got.found.entries()) {
      for (const [number, caption] of each.entries()) {
        const expected = searches[number].captions[photo];
        assert.deepEqual(caption.tokenIds, expected.tokens, `${name} ${photo} ${number}`);
        assert.equal(caption.text, expected.caption);
        const off = Math.abs(caption.logprob - expected.logprob);
        assert.ok(off <= within, `${name} ${photo} ${number}: log-probability off by ${off}`);
      }
    }
    await page.close();
  });
}

test("weights in a file beside the graph, and two threads, in Chromium", { skip }, async () => {
  const page = await browser.newPage();
  await page.goto(`http://localhost:${port(isolated)}/`);
  const got = await page.evaluate(inPage, { name: "beside", sizes: [], searches: [], threads: 2 });
  assert.ok(got.ok);
  await page.close();
});

test("a page on plain HTTP: no crypto.subtle, no threads, the same caption", { skip }, async () => {
  const { sizes, searches } = json("captions.json").gru;
  const page = await browser.newPage();
  await page.goto(`http://edgecap.test:${port(plain)}/`);
  const got = await page.evaluate(inPage, { name: "gru", sizes: sizes.slice(0, 2), searches: [{}], threads: 2 });
  assert.ok(got.ok && !got.secure && !got.isolated);
  assert.deepEqual(got.found[1][0].tokenIds, searches[0].captions[1].tokens);
  await page.close();
});

test("files of photos in the browser: the pixels of Pillow, alpha over white", { skip }, async () => {
  const page = await browser.newPage();
  await page.goto(`http://localhost:${port(isolated)}/`);
  const pngs = json("pngs.json").filter((/** @type {any} */ each) => each.rgb);
  const found = await page.evaluate(
    async (files) => {
      const { rgbOf } = await import(/** @type {any} */ (["/site/edgecap/image.js"].join()));
      const all = [];
      for (const file of files) {
        const blob = await (await fetch(`data:image/png;base64,${file}`)).blob();
        all.push(Array.from((await rgbOf(blob)).data));
      }
      return all;
    },
    pngs.map((/** @type {any} */ each) => each.png),
  );
  for (const [i, { mode, rgb }] of pngs.entries()) {
    const expected = Buffer.from(rgb, "base64");
    const off = Math.max(...expected.map((value, at) => Math.abs(value - /** @type {number[]} */ (found[i])[at])));
    assert.ok(off <= (/A/u.test(mode) ? 1 : 0), `${mode}: off by ${off}`); // canvases keep colours times alpha
  }
  await page.close();
});

test("the demo page captions a file, and goes on without its server", { skip }, async () => {
  const server = await serve({}); // the service worker adds what threads need
  const context = await browser.newContext();
  const page = await context.newPage();
  const problems = /** @type {string[]} */ ([]);
  page.on("pageerror", (error) => problems.push(String(error)));
  const address = `http://localhost:${port(server)}/site/`;
  const expected = json("captions.json").gru.golden.caption;
  const golden = join(folder, "gru.edgecap", "golden.png");
  const caption = async () => {
    await page.waitForFunction(() => document.getElementById("status")?.textContent === "Ready");
    await page.setInputFiles("#file", golden);
    await page.waitForSelector("#figures:not([hidden])", { timeout: 20_000 });
    assert.equal(await page.textContent("#caption"), expected);
  };
  await page.goto(address);
  await caption();
  await page.click("#verify");
  await page.waitForFunction(() => document.getElementById("verified")?.textContent?.startsWith("As exported"));
  await page.setInputFiles("#file", { name: "x.jpg", mimeType: "image/jpeg", buffer: Buffer.from("no photo") });
  await page.waitForFunction(() => document.getElementById("problem")?.textContent?.includes("broken"));
  await page.waitForSelector("#empty:not([hidden])");
  assert.ok(await page.isHidden("#sees"));
  await page.waitForSelector("html[data-offline]", { state: "attached" });
  server.closeAllConnections();
  await new Promise((done) => server.close(done));
  await assert.rejects(fetch(address));
  await page.reload();
  await caption();
  assert.ok(await page.evaluate(() => crossOriginIsolated));
  assert.deepEqual(problems, []);
  await context.close();
});

test("the demo page captions what the camera sees, and lets go of it", { skip }, async () => {
  const page = await browser.newPage();
  const problems = /** @type {string[]} */ ([]);
  page.on("pageerror", (error) => problems.push(String(error)));
  await page.goto(`http://localhost:${port(isolated)}/site/?bundle=/gru.edgecap&threads=1`);
  await page.waitForFunction(() => document.getElementById("status")?.textContent === "Ready");
  const states = () =>
    page.evaluate(() => {
      const { srcObject } = /** @type {HTMLVideoElement} */ (document.getElementById("video"));
      return /** @type {MediaStream} */ (srcObject).getTracks().map((track) => track.readyState);
    });
  await page.click("#camera");
  await page.waitForSelector("#shot:not([hidden])");
  assert.ok(await page.isVisible("#video"));
  assert.deepEqual(await states(), ["live"]);
  const expected = await page.evaluate(async () => {
    const video = /** @type {HTMLVideoElement} */ (document.getElementById("video"));
    video.pause(); // at this frame, which the package captions, too
    const load = (/** @type {string} */ path) => import(path);
    const [ort, { Captioner }] = await Promise.all([
      load("/site/ort/ort.wasm.min.mjs"),
      load("/site/edgecap/index.js"),
    ]);
    const captioner = await Captioner.load("/gru.edgecap", { ort, threads: 1 });
    return [video.videoWidth > 0, (await captioner.caption(video)).text];
  });
  await page.click("#shot");
  await page.waitForSelector("#figures:not([hidden])", { timeout: 20_000 });
  assert.deepEqual([true, await page.textContent("#caption")], expected);
  await page.click("#camera");
  await page.waitForSelector("#shot", { state: "hidden" });
  assert.deepEqual(await states(), ["ended"]);
  assert.equal(await page.textContent("#problem"), "");
  assert.deepEqual(problems, []);
  await page.close();
});

test("the demo page lets a SmolVLM see more or less", { skip }, async () => {
  const page = await browser.newPage();
  await page.goto(`http://localhost:${port(isolated)}/site/?bundle=/budget.edgecap&threads=1`);
  await page.waitForFunction(() => document.getElementById("status")?.textContent === "Ready");
  assert.deepEqual(await page.locator("#size option").allTextContents(), ["default", "tiles"]); // 256 px are too many
  await page.selectOption("#size", { label: "tiles" });
  await page.setInputFiles("#file", join(folder, "budget.edgecap", "golden.png"));
  await page.waitForSelector("#figures:not([hidden])", { timeout: 20_000 });
  assert.equal(await page.textContent("#caption"), json("captions.json").budget.golden.caption);
  await page.close();
});
