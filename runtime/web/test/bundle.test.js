/** Bundles that are refused, each in one clear line, and what a captioner does besides captions. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import * as ort from "onnxruntime-node";

import { BundleError, Captioner, EdgecapError, UsageError, readPng } from "../index.js";
import { toRgb } from "../preprocess.js";
import { ownSha256 } from "../sha256.js";
import { Tokenizer } from "../tokenizer.js";
import { bundle, json, missing, noise } from "./fixture.js";

let home = "";
before(() => {
  home = mkdtempSync(join(tmpdir(), "edgecap-web-"));
});
after(() => rmSync(home, { recursive: true }));

/** A copy of a bundle that is spoilt. @param {(folder: string, manifest: any) => void} spoil @param {string} [name] */
function spoilt(spoil, name = "gru") {
  const folder = mkdtempSync(join(home, "b-"));
  cpSync(bundle(name), folder, { recursive: true });
  const place = join(folder, "bundle.json");
  const manifest = JSON.parse(readFileSync(place, "utf8"));
  spoil(folder, manifest);
  if (manifest.format !== undefined) writeFileSync(place, JSON.stringify(manifest));
  return folder;
}

/** @param {Promise<unknown>} promise @param {RegExp} pattern @param {any} [kind] */
async function refused(promise, pattern, kind = BundleError) {
  await assert.rejects(promise, (/** @type {any} */ error) => {
    assert.ok(error instanceof kind, `${error?.stack}`);
    assert.match(error.message, pattern);
    assert.ok(!error.message.includes("\n"));
    return true;
  });
}

/** @type {[string, (folder: string, manifest: any) => void, RegExp][]} */
const SPOILT = [
  ["a newer format", (_, m) => (m.version = 2), /format version 2; this edgecap reads up to 1: upgrade/],
  ["no bundle at all", (_, m) => (m.format = "other"), /this is not an edgecap bundle/],
  ["a path that leaves it", (_, m) => (m.files["../x"] = m.files["decoder.onnx"]), /not a plain file name inside/],
  ["an absolute path", (_, m) => (m.files["/etc/passwd"] = m.files["decoder.onnx"]), /not a plain file name inside/],
  [
    "a graph elsewhere",
    (_, m) => (m.graphs.decoder.file = "..\\x.onnx"),
    /graphs.decoder.file.* not a plain file name/,
  ],
  ["a graph not listed", (_, m) => (m.graphs.decoder.file = "x.onnx"), /names x.onnx, which is not among its files/],
  ["another engine", (_, m) => (m.backend = "gguf"), /needs the backend "gguf", in JavaScript there is onnx alone/],
  ["a future engine", (_, m) => (m.requires.onnxruntime = "99.1"), /needs ONNX Runtime 99.1 or newer, this is onnxrun/],
  ["a key of another kind", (_, m) => (m.tokens.bos = "1"), /tokens.bos must be a whole number, not a text/],
  ["a key that is missing", (_, m) => delete m.golden.logits, /golden.logits is missing; export/],
  ["an id outside", (_, m) => (m.tokens.eos = 99), /tokens.eos is 99, outside the vocabulary of 14/],
  ["bad decoding", (_, m) => (m.decoding.beam = 0), /beam must be a whole number from 1 to 64, not 0/],
  ["unknown decoding", (_, m) => (m.decoding.warp = 1), /unknown decoding option "warp"/],
  ["roles twice", (_, m) => (m.session.photo_index = "h"), /session gives one input two roles/],
  ["roles that are none", (_, m) => (m.session.logits = "x"), /session names x, which is not among graphs.decoder.out/],
  ["inputs without a role", (_, m) => delete m.session.state, /disagree about h/],
  ["another photo size", (_, m) => (m.preprocess.size = [9, 9]), /must take uint8 pixels \[batch, 9, 9, 3\]/],
  ["a changed file", (f) => flip(join(f, "decoder.onnx")), /decoder.onnx is not the file that was exported \(SHA-256/],
  ["a cut file", (f) => cut(join(f, "encoder.onnx")), /encoder.onnx has [\d,]+ bytes instead of [\d,]+; copy/],
  ["a lost file", (f) => rmSync(join(f, "tokenizer.json")), /tokenizer.json is missing; copy the bundle again/],
  ["a link", (f) => linked(f), /tokenizer.json is not a plain file; a bundle holds no links/],
  ["a broken graph", (f, m) => replaced(f, m, "decoder.onnx", "not a graph"), /decoder.onnx cannot be loaded by onnxr/],
  ["a broken tokenizer", (f, m) => replaced(f, m, "tokenizer.json", "{}"), /tokenizer.json is not a tokenizer/],
];

for (const [what, spoil, pattern] of SPOILT) {
  test(`refused: ${what}`, { skip: missing }, async () => {
    await refused(Captioner.load(spoilt(spoil)), pattern, UsageError);
  });
}

/** @param {string} place */
function flip(place) {
  const data = readFileSync(place);
  data[data.length >> 1] ^= 1;
  writeFileSync(place, data);
}

/** @param {string} place */
const cut = (place) => writeFileSync(place, readFileSync(place).subarray(1));

/** @param {string} folder */
function linked(folder) {
  rmSync(join(folder, "tokenizer.json"));
  symlinkSync(join(bundle("gru"), "tokenizer.json"), join(folder, "tokenizer.json"));
}

/** @param {string} folder @param {any} manifest @param {string} name @param {string} text */
function replaced(folder, manifest, name, text) {
  const sha256 = createHash("sha256").update(text).digest("hex");
  manifest.files[name] = { bytes: text.length, sha256 };
  writeFileSync(join(folder, name), text);
}

test("refused: no bundle there, no JSON, a file", { skip: missing }, async () => {
  await refused(Captioner.load(join(home, "none")), /there is no such bundle/, UsageError);
  await refused(Captioner.load(home), /there is no bundle.json, so the bundle is incomplete/);
  await refused(Captioner.load(join(bundle("gru"), "bundle.json")), /is a file; a bundle is a folder/, UsageError);
  const broken = spoilt((folder, manifest) => {
    delete manifest.format;
    writeFileSync(join(folder, "bundle.json"), "{");
  });
  await refused(Captioner.load(broken), /bundle.json is not valid JSON/);
  await refused(Captioner.load(bundle("gru"), { verify: /** @type {any} */ ("no") }), /"hash" or "sizes"/, UsageError);
  await refused(Captioner.load(bundle("gru"), { ort: {} }), /ort must be the module onnxruntime/, UsageError);
});

test("sizes alone: a changed byte is not seen, a changed size is", { skip: missing }, async () => {
  const changed = spoilt((folder) => flip(join(folder, "decoder.bin")), "beside");
  await (await Captioner.load(changed, { verify: "sizes" })).close();
  const shorter = spoilt((folder) => cut(join(folder, "decoder.onnx")));
  await refused(Captioner.load(shorter, { verify: "sizes" }), /bytes instead of/);
});

test("the own SHA-256 is SHA-256", () => {
  for (const length of [0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 1000]) {
    const data = Uint8Array.from({ length }, (_, i) => i * 7 + length);
    assert.equal(Buffer.from(ownSha256(data)).toString("hex"), createHash("sha256").update(data).digest("hex"));
  }
});

test("over HTTP, with a fetch and a query of one's own", { skip: missing }, async () => {
  const asked = /** @type {string[]} */ ([]);
  const server = createServer((request, response) => {
    asked.push(request.url ?? "");
    try {
      const path = decodeURIComponent((request.url ?? "").split("?")[0]);
      response.end(readFileSync(join(bundle("gru"), path.slice("/a b/".length))));
    } catch {
      response.writeHead(404).end();
    }
  });
  await /** @type {Promise<void>} */ (new Promise((done) => server.listen(0, "127.0.0.1", done)));
  const { port } = /** @type {any} */ (server.address());
  const captioner = await Captioner.load(`http://127.0.0.1:${port}/a b?key=1`, {
    ort,
    fetch: (...all) => fetch(...all),
  });
  assert.equal((await captioner.caption(noise(1, 20, 30))).cut, false);
  await captioner.close();
  assert.ok(asked.length >= 4 && asked.every((url) => url.startsWith("/a%20b/") && url.endsWith("?key=1")));
  await refused(Captioner.load(`http://127.0.0.1:${port}/`, { ort }), /the server answers 404/, UsageError);
  server.close();
  await refused(Captioner.load(`http://127.0.0.1:${port}/`, { ort }), /cannot be fetched/, EdgecapError);
});

test("weights in a file beside the graph", { skip: missing }, async () => {
  const captioner = await Captioner.load(bundle("beside"), { threads: 1 });
  assert.ok((await captioner.verify()).ok);
  await captioner.close();
  const changed = spoilt((folder) => flip(join(folder, "decoder.bin")), "beside");
  await refused(Captioner.load(changed), /decoder.bin is not the file that was exported/);
});

test("streaming, cancelling, deadlines, and calls that overlap", { skip: missing }, async () => {
  const captioner = await Captioner.load(bundle("in_place"), { ort, threads: 1 });
  const photo = noise(3, 40, 30);
  const partial = /** @type {string[]} */ ([]);
  const whole = await captioner.caption(photo, { onToken: ({ text }) => partial.push(text) });
  assert.equal(partial.at(-1), whole.text);
  assert.equal(partial.length, whole.tokenIds.length);
  for (const part of ["preprocess", "encode", "firstToken", "perToken", "total"]) {
    assert.ok(/** @type {any} */ (whole.timings)[part] >= 0, part);
  }
  const stop = new AbortController();
  const stopped = captioner.caption(photo, { signal: stop.signal, onToken: () => stop.abort(new Error("enough")) });
  await assert.rejects(stopped, /enough/);
  await assert.rejects(captioner.caption(photo, { signal: AbortSignal.abort() }), { name: "AbortError" });
  const soon = await captioner.caption(photo, { deadlineMs: 0.001 });
  assert.ok(soon.cut && soon.tokenIds.length === 1);

  const together = await Promise.all([1, 2, 3, 4].map((seed) => captioner.caption(noise(seed, 40, 30), { beam: 2 })));
  for (const [i, found] of together.entries()) {
    const { tokenIds } = await captioner.caption(noise(i + 1, 40, 30), { beam: 2 });
    assert.deepEqual(found.tokenIds, tokenIds);
  }
  await refused(
    captioner.caption(photo, { minLength: 300, maxLength: 300 }),
    /need \d+ positions and the model has 200/,
    UsageError,
  );
  const last = captioner.caption(photo);
  await captioner.close();
  assert.deepEqual((await last).tokenIds, whole.tokenIds);
  await captioner.close();
  await refused(captioner.caption(photo), /is closed/, UsageError);
});

test("refused: a budget that the model does not take", { skip: missing }, async () => {
  for (const [name, options, pattern] of /** @type {[string, any, RegExp][]} */ ([
    ["gru", { imageSize: 256 }, /sees photos in one size: leave imageSize and tiles out/],
    ["gru", { tiles: false }, /sees photos in one size/],
    ["framed", { imageSize: 8 }, /sees frames of 16 px alone: leave imageSize out/],
    ["budget", { imageSize: 12 }, /a multiple of 8 px up to 16 \(the nearest: 16\), not 12/],
    ["budget", { imageSize: 24 }, /up to 16 \(the nearest: 16\), not 24/],
    ["budget", { imageSize: "16" }, /imageSize must be a whole number of pixels, not "16"/],
    ["budget", { tiles: 1 }, /tiles must be true or false, not 1/],
    ["budget", { imageSize: 8, tiles: true }, /would become 5 tiles a side, more than this captioner has words for/],
  ])) {
    const captioner = await Captioner.load(bundle(name), { ort, threads: 1 });
    await refused(captioner.caption(noise(1, 30, 20), options), pattern, UsageError);
    assert.ok(await captioner.caption(noise(1, 30, 20), { imageSize: undefined, tiles: null }));
    await captioner.close();
  }
});

test("closing lets a verification finish, and a load that fails frees what it loaded", { skip: missing }, async () => {
  const captioner = await Captioner.load(bundle("gru"), { ort, threads: 1 });
  const verification = captioner.verify();
  await captioner.close();
  assert.ok((await verification).ok);
  let alive = 0;
  const InferenceSession = {
    create: async () => {
      alive += 1;
      return { run: async () => ({}), release: async () => void (alive -= 1) };
    },
  };
  const lost = spoilt((folder) => rmSync(join(folder, "decoder.onnx")));
  await refused(Captioner.load(lost, { ort: { ...ort, InferenceSession } }), /decoder.onnx is missing/);
  assert.equal(alive, 0);
});

test("a body is read no further than bundle.json says", { skip: missing }, async () => {
  let sent = 0;
  const endless = () =>
    new ReadableStream({ pull: (controller) => controller.enqueue(new Uint8Array((sent += 2 ** 16) && 2 ** 16)) });
  for (const name of ["bundle.json", "decoder.onnx"]) {
    sent = 0;
    const fetch = async (/** @type {any} */ url) => {
      const file = String(url).split("/").at(-1) ?? "";
      return new Response(file === name ? endless() : readFileSync(join(bundle("gru"), file)));
    };
    await refused(Captioner.load("http://x.test/", { ort, fetch }), /has more than [\d,]+ bytes; copy/);
    assert.ok(sent < 2 ** 22);
  }
});

test("partial texts have no half characters", () => {
  const letters = ["<0xE2>", "<0x82>", "<0xAC>", "a"];
  const tree = {
    model: { type: "BPE", vocab: Object.fromEntries(letters.map((token, id) => [token, id])), merges: [] },
    decoder: { type: "Sequence", decoders: [{ type: "ByteFallback" }, { type: "Fuse" }] },
  };
  const spelt = new Tokenizer(new TextEncoder().encode(JSON.stringify(tree)), "t");
  assert.deepEqual(
    [1, 2, 3, 4, 5].map((count) => spelt.settled([3, 0, 1, 2, 3].slice(0, count))),
    ["a", "a", "a", "a", "a€a"],
  );
  const bytes = ["a", "â", "Ĥ", "¬"]; // as byte-level BPE writes them
  const level = {
    model: { type: "BPE", vocab: Object.fromEntries(bytes.map((token, id) => [token, id])), merges: [] },
    decoder: { type: "ByteLevel" },
  };
  const joined = new Tokenizer(new TextEncoder().encode(JSON.stringify(level)), "t");
  assert.deepEqual(
    [1, 2, 3, 4].map((count) => joined.settled([0, 1, 2, 3].slice(0, count))),
    ["a", "a", "a", "a€"],
  );
});

test("bad calls are one line", { skip: missing }, async () => {
  const captioner = await Captioner.load(bundle("gru"), { ort });
  const photo = noise(1, 9, 9);
  const call = (/** @type {any} */ image, /** @type {any} */ options) => captioner.caption(image, options);
  await refused(call(photo, { beams: 2 }), /unknown option "beams"/, UsageError);
  await refused(call(photo, { beam: 99 }), /beam must be a whole number from 1 to 64/, UsageError);
  await refused(call(photo, { prompt: "a zebra" }), /words this model does not know/, UsageError);
  await refused(call(null, {}), /pixels or a picture/, UsageError);
  for (const file of [new Uint8Array(9), new ArrayBuffer(9)]) {
    await refused(call(file, {}), /decode them first, or hand over a PNG/, UsageError);
  }
  await refused(call({ data: new Uint8Array(5), width: 9, height: 9 }, {}), /must have 243 bytes of RGB/, UsageError);
  await refused(call({ data: new Uint8Array(0), width: 0, height: 9 }, {}), /width and a height from 1/, UsageError);
  await refused(Captioner.load(bundle("gru"), { threads: 0 }), /threads must be a whole number/, UsageError);
  await captioner.close();
});

test("PNGs of every kind", { skip: missing }, async () => {
  for (const { mode, png, rgb } of json("pngs.json")) {
    const file = new Uint8Array(Buffer.from(png, "base64"));
    if (rgb) assert.equal(Buffer.from(toRgb(await readPng(file)).data).toString("base64"), rgb, mode);
    else await refused(readPng(file), /PNG of a kind that is not read here/, EdgecapError);
  }
  await refused(readPng(new Uint8Array(99)), /broken image/, EdgecapError);
  const half = new Uint8Array(readFileSync(join(bundle("gru"), "golden.png"))).subarray(0, 60);
  await refused(readPng(half, "x.png"), /x.png: broken image/, EdgecapError);
});
