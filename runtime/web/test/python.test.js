/** The same pixels, ids, texts and captions as the Python runtime. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { Captioner } from "../index.js";
import { Preprocess, toRgb } from "../preprocess.js";
import { resize } from "../resample.js";
import { Tokenizer, plainWords } from "../tokenizer.js";
import { bundle, bytes, camel, json, missing, photos } from "./fixture.js";

test("pixels are equal byte by byte", { skip: missing }, () => {
  const data = bytes("pixels.bin");
  let at = 0;
  const take = (/** @type {number} */ count) => data.subarray(at, (at += count));
  for (const [number, each] of json("pixels.json").entries()) {
    const { width, height, channels, size, mode, resample } = each;
    const photo = toRgb({ data: take(width * height * channels), width, height });
    const expected = take(size[0] * size[1] * 3);
    const found =
      resample === "lanczos"
        ? resize(photo, size[1], size[0], "lanczos")
        : new Preprocess({ size, mode, resample }).apply(photo);
    assert.deepEqual([found.width, found.height], [size[1], size[0]]);
    assert.ok(Buffer.from(found.data).equals(expected), `case ${number}: ${JSON.stringify(each)}`);
  }
  assert.equal(at, data.length);
});

test("tokenizers cut and join alike", { skip: missing }, () => {
  const { tokenizers, words } = json("tokenizers.json");
  for (const [text, expected] of words) assert.equal(plainWords(text), expected);
  for (const { tokenizer, encoded, decoded } of tokenizers) {
    const found = new Tokenizer(new TextEncoder().encode(JSON.stringify(tokenizer)), "tokenizer.json");
    for (const [text, ids] of encoded) assert.deepEqual(found.encode(text), ids, `${tokenizer.model.type}: ${text}`);
    for (const [ids, text] of decoded) assert.equal(found.decode(ids), text, `${tokenizer.model.type}: ${ids}`);
  }
});

for (const name of ["gru", "crop", "concatenated", "in_place", "framed", "budget", "squashed"]) {
  test(`captions are the same: ${name}`, { skip: missing }, async () => {
    const { sizes, searches, verify } = json("captions.json")[name];
    const captioner = await Captioner.load(bundle(name), { threads: 1 });
    const all = photos(name, sizes);
    for (const { options, captions } of searches) {
      for (const [number, expected] of captions.entries()) {
        const found = await captioner.caption(all[number], camel(options));
        same(found, expected, `${name} ${number} ${JSON.stringify(options)}`);
        // Of the others the scores: two that are as good as equal may change places.
        const [others, scores] = [found.alternatives, expected.alternatives].map((all) =>
          all.map(({ score }) => score),
        );
        assert.equal(others.length, scores.length);
        others.forEach((score, i) => assert.ok(Math.abs(score - scores[i]) <= 1e-4, `${name} ${number}, ${i}`));
      }
    }
    const golden = await captioner.verify();
    assert.ok(golden.ok && golden.sameTokens && golden.minCosine > 0.99999);
    assert.equal(golden.caption, verify.caption);
    await captioner.close();
  });
}

/** @param {import("../index.js").Hypothesis} found @param {any} expected @param {string} where */
function same(found, expected, where) {
  assert.deepEqual(found.tokenIds, expected.tokens, where);
  assert.equal(found.text, expected.caption, where);
  assert.ok(Math.abs(found.logprob - expected.logprob) <= 1e-4, where);
  assert.ok(Math.abs(found.score - expected.score) <= 1e-4, where);
}
