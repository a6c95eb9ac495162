/** What bundle.json may say, checked so that a malformed one is a single clear line. Mirrors runtime/manifest.py. */

import { decodeOptions } from "./decode.js";
import { BundleError, UsageError, reason } from "./errors.js";
import { MAX_SIDE } from "./preprocess.js";

export const FORMAT = "edgecap";
export const VERSION = 1;
const DTYPES = ["uint8", "int32", "int64", "float16", "float32", "bool"];
const AGAIN = "export the bundle again";

/** What is wrong, without the name of the file. */
class Bad extends Error {}

/** @typedef {(value: any, at: string) => void} Check */
/** @typedef {{ dtype: string, shape: (number | string)[] }} Tensor */
/** @typedef {Record<string, Tensor>} Tensors */
/** @typedef {{ file: string, weights?: string, inputs: Tensors, outputs: Tensors }} Graph */
/** @typedef {{ input: string, output: string, init: string }} State */
/** @typedef {{ input: string, output: string, heads: number, dim: number }} Kv */
/**
 * @typedef {{ ids: { input: string, rank: number }, logits: string, photo_index?: string,
 *   photo?: Record<string, string>, state?: State[], prefix?: { input: string, from: string, dim: number },
 *   kv?: Kv[], positions?: number,
 *   cache?: { filled: string } }} Roles
 */
/**
 * @typedef {{ bos: number, eos: number, pad?: number, unk?: number, bos_is_word?: number, vocab_size: number }} Tokens
 */
/**
 * @typedef {{ image: string, token_ids: number[], logits: string,
 *   tolerance: { same_tokens: boolean, min_cosine: number } }} Golden
 */
/**
 * @typedef {{ format: string, version: number, name: string, backend: string, target: string, precision: string,
 *   requires: Record<string, string>, files: Record<string, { bytes: number, sha256: string }>,
 *   preprocess: { size: number[], mode: string, resample: string }, tokens: Tokens, decoding: Record<string, number>,
 *   golden: Golden, graphs: Record<string, Graph>, session: Roles, frames?: any, [key: string]: any }} Manifest
 */

/**
 * Decode and check a bundle.json.
 * @param {Uint8Array} data
 * @param {string} where
 * @returns {Manifest}
 * @throws {BundleError} naming `where` and the key that is wrong
 */
export function parseManifest(data, where) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
  } catch (error) {
    throw new BundleError(`${where} is not valid JSON (${reason(error).slice(0, 120)}); ${AGAIN}`);
  }
  try {
    check(manifest);
  } catch (error) {
    if (!(error instanceof Bad || error instanceof UsageError)) throw error;
    throw new BundleError(`${where}: ${error.message}`);
  }
  return manifest;
}

/** @param {any} manifest */
function check(manifest) {
  if (kind(manifest) !== "an object") throw new Bad(`must be an object, not ${kind(manifest)}`);
  if (manifest.format !== FORMAT) throw new Bad(`"format" must be "${FORMAT}"; this is not an edgecap bundle`);
  integer(1)(manifest.version, '"version"');
  if (manifest.version > VERSION) {
    throw new Bad(`has format version ${manifest.version}; this edgecap reads up to ${VERSION}: upgrade edgecap`);
  }
  MANIFEST(manifest, "");
  for (const name of Object.keys(manifest.files)) path(name, "files");
  checkUsed(manifest);
  checkValues(manifest);
  if (manifest.backend !== "onnx") {
    throw new Bad(
      `needs the backend "${manifest.backend}", in JavaScript there is onnx alone: export it with --target ` +
        "onnx-fp32 or onnx-int8",
    );
  }
  if (!manifest.session || !manifest.graphs) throw new Bad(`session or graphs is missing; ${AGAIN}`);
  checkSession(manifest);
}

/** @param {unknown} value */
function kind(value) {
  if (value === null) return "null";
  if (Array.isArray(value)) return "a list";
  if (value === undefined) return "nothing";
  const names = { object: "an object", string: "a text", boolean: "true/false", number: "a number" };
  return names[/** @type {keyof names} */ (typeof value)] ?? typeof value;
}

// --- the shape: small checks that combine ----------------------------------------------------------------------

/** @type {Check} */
const text = (value, at) => {
  if (typeof value !== "string") throw new Bad(`${at} must be a text, not ${kind(value)}`);
};

/** @type {Check} */
const boolean = (value, at) => {
  if (typeof value !== "boolean") throw new Bad(`${at} must be true or false, not ${kind(value)}`);
};

/** @type {Check} */
const number = (value, at) => {
  if (typeof value !== "number" || !Number.isFinite(value)) {
    throw new Bad(`${at} must be a finite number, not ${kind(value)}`);
  }
};

/** @param {number} low @param {number} [high] @returns {Check} */
const integer =
  (low, high = Number.MAX_SAFE_INTEGER) =>
  (value, at) => {
    if (!Number.isInteger(value)) throw new Bad(`${at} must be a whole number, not ${kind(value)}`);
    if (value < low || value > high) throw new Bad(`${at} must be from ${low} to ${high}, not ${value}`);
  };

/** @param {string[]} choices @returns {Check} */
const oneOf =
  (...choices) =>
  (value, at) => {
    if (!choices.includes(value)) {
      throw new Bad(`${at} must be one of ${choices.join(", ")}, not ${String(JSON.stringify(value)).slice(0, 40)}`);
    }
  };

/** @param {Check} item @returns {Check} */
const list = (item) => (value, at) => {
  if (!Array.isArray(value)) throw new Bad(`${at} must be a list, not ${kind(value)}`);
  value.forEach((each, index) => item(each, `${at}[${index}]`));
};

/** @param {Check} item @returns {Check} */
const mapping = (item) => (value, at) => {
  if (kind(value) !== "an object") throw new Bad(`${at} must be an object, not ${kind(value)}`);
  for (const [key, each] of Object.entries(value)) item(each, at ? `${at}.${key}` : key);
};

/**
 * An object with these keys; others are allowed, so that a later edgecap may add some.
 * @param {Record<string, Check>} required
 * @param {Record<string, Check>} [optional]
 * @returns {Check}
 */
const object =
  (required, optional = {}) =>
  (value, at) => {
    if (kind(value) !== "an object") throw new Bad(`${at || "it"} must be an object, not ${kind(value)}`);
    const prefix = at ? `${at}.` : "";
    for (const [key, each] of Object.entries(required)) {
      if (!Object.hasOwn(value, key)) throw new Bad(`${prefix}${key} is missing; ${AGAIN}`);
      each(value[key], prefix + key);
    }
    for (const [key, each] of Object.entries(optional)) {
      if (Object.hasOwn(value, key)) each(value[key], prefix + key);
    }
  };

/** Plain names joined by "/": a file inside the bundle on any system, and on any server. @type {Check} */
const path = (value, at) => {
  text(value, at);
  const parts = value.split("/");
  const shown = JSON.stringify(value.slice(0, 80));
  if (parts.length > 6) throw new Bad(`${at}: ${shown} lies deeper than 5 folders`);
  for (const part of parts) {
    const odd = !part || part.startsWith(".") || part !== part.trim() || part.length > 200;
    if (odd || /[\\:*?"<>|\u0000-\u001f]/u.test(part)) {
      throw new Bad(`${at}: ${shown} is not a plain file name inside the bundle`);
    }
  }
};

/** @type {Check} */
const sha256 = (value, at) => {
  text(value, at);
  if (!/^[0-9a-f]{64}$/u.test(value)) throw new Bad(`${at} must be 64 hexadecimal digits`);
};

/** @type {Check} */
const dimension = (value, at) => {
  if (typeof value !== "string") integer(0)(value, at);
};

/** @type {Check} */
const any = () => {};

/** @param {string[]} dtypes @returns {Check} */
const graph = (...dtypes) => {
  const tensors = mapping(object({ dtype: oneOf(...dtypes), shape: list(dimension) }));
  return object({ file: path, inputs: tensors, outputs: tensors }, { weights: path });
};

/** @type {Check} */
const graphs = (value, at) => {
  object({ encoder: graph(...DTYPES), decoder: graph(...DTYPES) })(value, at);
  mapping(graph(...DTYPES, "string"))(value, at); // a fused graph may give the text itself
};

const size = integer(1, 2 ** 31 - 1);
const SESSION = object(
  { ids: object({ input: text, rank: integer(1, 2) }), logits: text },
  {
    photo_index: text,
    photo: mapping(text),
    state: list(object({ input: text, output: text, init: text })),
    prefix: object({ input: text, from: text, dim: size }),
    kv: list(object({ input: text, output: text, heads: size, dim: size })),
    positions: size,
    cache: object({ filled: text }),
  },
);
const MANIFEST = object(
  {
    name: text,
    backend: text,
    target: text,
    precision: text,
    requires: mapping(text),
    files: mapping(object({ bytes: integer(0), sha256 })),
    preprocess: object({
      size: list(integer(1)),
      mode: oneOf("squash", "crop", "keep"),
      resample: oneOf("bilinear", "bicubic"),
    }),
    tokens: object({ bos: integer(0), eos: integer(0), vocab_size: integer(1) }, { pad: integer(0), unk: integer(0) }),
    decoding: mapping(number),
    golden: object({
      image: path,
      token_ids: list(integer(0)),
      logits: path,
      tolerance: object({ same_tokens: boolean, min_cosine: number }),
    }),
  },
  { graphs, session: SESSION, frames: mapping(any) },
);

// --- that the parts agree --------------------------------------------------------------------------------------

/** @param {Manifest} manifest */
function checkUsed(manifest) {
  const { files, golden } = manifest;
  /** @type {Record<string, string>} */
  const used = { "the tokenizer": "tokenizer.json", "golden.image": golden.image, "golden.logits": golden.logits };
  for (const [name, each] of Object.entries(manifest.backend === "onnx" ? (manifest.graphs ?? {}) : {})) {
    used[`graphs.${name}.file`] = each.file;
    if (each.weights) used[`graphs.${name}.weights`] = each.weights;
  }
  for (const [at, name] of Object.entries(used)) {
    if (!Object.hasOwn(files, name)) throw new Bad(`${at} names ${name}, which is not among its files; ${AGAIN}`);
  }
}

/** @param {Manifest} manifest */
function checkValues({ preprocess, decoding, frames, tokens, golden }) {
  if (preprocess.size.length !== 2 || preprocess.size.some((side) => side > MAX_SIDE)) {
    throw new Bad(`preprocessing size must be (height, width) from 1 to ${MAX_SIDE}, not ${preprocess.size}`);
  }
  if (preprocess.mode === "keep" && !frames) {
    throw new Bad("preprocess.mode keep needs frames, which say how photos are cut");
  }
  decodeOptions(decoding);
  const vocab = tokens.vocab_size;
  for (const [name, value] of Object.entries(tokens)) {
    if (name !== "vocab_size" && value >= vocab) {
      throw new Bad(`tokens.${name} is ${value}, outside the vocabulary of ${vocab}`);
    }
  }
  if (golden.token_ids.some((token) => token >= vocab)) {
    throw new Bad(`golden.token_ids has an id outside the vocabulary of ${vocab}`);
  }
}

/**
 * Every role names a tensor that its graph declares, and every declared input has exactly one role.
 * @param {Manifest} manifest
 */
function checkSession(manifest) {
  const { session, frames } = manifest;
  const { encoder, decoder } = manifest.graphs;
  const inputs = Object.values(encoder.inputs);
  if (inputs.length !== 1) throw new Bad("graphs.encoder must have one input, the pixels");
  const [pixels] = inputs;
  if (frames) checkFrames(manifest, pixels);
  const shape = frames ? pixels.shape.slice(1) : [...manifest.preprocess.size, 3];
  if (pixels.dtype !== "uint8" || pixels.shape.length !== 4 || shape.some((side, i) => pixels.shape[i + 1] !== side)) {
    throw new Bad(`graphs.encoder must take uint8 pixels [batch, ${shape.join(", ")}], as preprocess says`);
  }
  sameNames(decoderInputs(session), Object.keys(decoder.inputs));
  const carried = [...(session.state ?? []), ...(session.kv ?? [])];
  const sources = [...Object.values(session.photo ?? {}), ...(session.state ?? []).map((state) => state.init)];
  if (session.prefix) sources.push(session.prefix.from);
  const outputs = [session.logits, ...carried.map((each) => each.output)];
  for (const [name, tensors, names] of /** @type {const} */ ([
    ["decoder", decoder.outputs, outputs],
    ["encoder", encoder.outputs, sources],
  ])) {
    const lost = names.find((each) => !Object.hasOwn(tensors, each));
    if (lost !== undefined) throw new Bad(`session names ${lost}, which is not among graphs.${name}.outputs`);
  }
  if (Object.keys(session.photo ?? {}).length && !session.photo_index) {
    throw new Bad("session.photo needs session.photo_index, the input that says which photo a row belongs to");
  }
  if (session.cache && (!session.kv?.length || !session.positions || session.ids.rank !== 2 || session.state?.length)) {
    throw new Bad("session.cache needs kv, positions and ids of rank 2, and no state");
  }
}

/** @param {Manifest} manifest @param {Tensor} pixels */
function checkFrames({ frames, session }, pixels) {
  const { side } = frames;
  const sides = pixels.shape.slice(1, 3);
  if (pixels.shape.length !== 4 || pixels.shape[3] !== 3 || sides.some((s) => typeof s === "number" && s !== side)) {
    throw new Bad(`graphs.encoder must take frames [frames, ${side}, ${side}, 3], as frames says`);
  }
  if (!session.prefix || session.ids.rank !== 2) throw new Bad("frames needs session.prefix, and ids of rank 2");
}

/** The decoder inputs that the roles feed. @param {Roles} session */
function decoderInputs(session) {
  const names = [session.ids.input, ...Object.keys(session.photo ?? {})];
  for (const each of [...(session.state ?? []), ...(session.kv ?? [])]) names.push(each.input);
  if (session.photo_index) names.push(session.photo_index);
  if (session.cache) names.push(session.cache.filled);
  if (session.prefix) names.push(session.prefix.input);
  return names;
}

/** @param {string[]} left @param {string[]} right */
function sameNames(left, right) {
  if (new Set(left).size !== left.length) throw new Bad("session gives one input two roles");
  const only = [...left.filter((name) => !right.includes(name)), ...right.filter((name) => !left.includes(name))];
  if (only.length) throw new Bad(`session and graphs.decoder.inputs disagree about ${only.sort().join(", ")}`);
}
