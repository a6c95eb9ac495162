/** The golden pair: a photo and what the bundle must make of it, reproduced on whatever device this is. */

import { BundleError, reason } from "./errors.js";
import { readNpy } from "./npy.js";
import { readPng } from "./png.js";

/**
 * Caption the bundle's golden photo greedily, and compare teacher-forced logits with those it recorded. Cosines compare
 * each position's logits with the fp32 reference's; the tolerance is the bundle's own.
 * @param {import("./captioner.js").Captioner} captioner
 * @param {import("./onnx.js").OnnxModel} model
 * @param {(photo: any, options: Record<string, any>) => Promise<{ text: string, tokenIds: number[] }>} say
 */
export async function verifyGolden(captioner, model, say) {
  const { bundle, tokens } = captioner;
  const { golden } = bundle.manifest;
  const expected = golden.token_ids;
  const photo = await readPng(await bundle.read(golden.image), `${bundle.location}: ${golden.image}`);
  const reference = await referenceRows(bundle, expected.length + 1, tokens.vocab_size);

  // The reference's caption is plain greedy, whatever the bundle's own decoding. One token more than it has is asked for,
  // so that a missing EOS shows, unless the reference was itself cut off there.
  const plain = { beam: 1, minLength: 0, lengthPenalty: 0, noRepeatNgram: 0, deadlineMs: 0 };
  const caption = await say(photo, { ...plain, maxLength: expected.length + 1 });
  let found = caption.tokenIds;
  if (largest(reference[expected.length]) !== tokens.eos) found = found.slice(0, expected.length);
  const longest = Math.max(found.length, expected.length);
  let differ = 0;
  while (differ < longest && found[differ] === expected[differ]) differ += 1;
  const sameTokens = differ === longest;

  const pixels = await captioner.view(photo);
  const rows = await captioner.teacherForced(model, pixels, expected);
  const { same_tokens: needsSameTokens, min_cosine: needsMinCosine } = golden.tolerance;
  const minCosine = Math.min(...rows.map((row, i) => cosine(row, reference[i])));
  return {
    ok: minCosine >= needsMinCosine && (sameTokens || !needsSameTokens),
    caption: caption.text,
    sameTokens,
    tokensDifferAt: sameTokens ? null : differ,
    minCosine,
    maxDifference: Math.max(...rows.map((row, i) => difference(row, reference[i]))),
    needsSameTokens,
    needsMinCosine,
  };
}

/**
 * @param {import("./bundle.js").Bundle} bundle
 * @param {number} rows
 * @param {number} vocab
 * @returns {Promise<Float64Array[]>}
 */
async function referenceRows(bundle, rows, vocab) {
  const name = bundle.manifest.golden.logits;
  const bytes = await bundle.read(name);
  let found;
  try {
    found = readNpy(bytes);
  } catch (error) {
    throw new BundleError(
      `${bundle.location}: ${name} is not what it should be (${reason(error)}); export the bundle again`,
    );
  }
  if (found.shape.length !== 2 || found.shape[0] !== rows || found.shape[1] !== vocab) {
    throw new BundleError(`${bundle.location}: ${name} must be floats [${rows}, ${vocab}]; export the bundle again`);
  }
  return Array.from({ length: rows }, (_, row) => found.data.subarray(row * vocab, (row + 1) * vocab));
}

/** @param {ArrayLike<number>} values */
function largest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** @param {ArrayLike<number>} a @param {ArrayLike<number>} b */
function cosine(a, b) {
  let [dot, first, second] = [0, 0, 0];
  for (let i = 0; i < b.length; i++) {
    dot += a[i] * b[i];
    first += a[i] * a[i];
    second += b[i] * b[i];
  }
  return dot / Math.max(Math.sqrt(first) * Math.sqrt(second), 1e-30);
}

/** @param {ArrayLike<number>} a @param {ArrayLike<number>} b */
function difference(a, b) {
  let most = 0;
  for (let i = 0; i < b.length; i++) most = Math.max(most, Math.abs(a[i] - b[i]));
  return most;
}
