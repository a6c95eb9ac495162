/** ONNX Runtime (-web or -node): a session built from the manifest's roles, as runtime/backends/onnx.py builds it. */

import { BundleError, EdgecapError, UsageError, reason } from "./errors.js";
import { half } from "./npy.js";

/** @typedef {import("./manifest.js").Manifest} Manifest */
/** @typedef {import("./decode.js").Logits} Logits */
/** @typedef {Float32Array | Uint16Array | BigInt64Array | Int32Array | Uint8Array} Values */
/** @typedef {{ type: string, data: Values, dims: readonly number[] }} Tensor what an ort.Tensor is */
/**
 * @typedef {{ run: (feed: Record<string, any>, fetches: string[]) => Promise<Record<string, any>>,
 *   release?: () => Promise<void> }} EngineSession
 */
/**
 * What of onnxruntime-web and onnxruntime-node is used here.
 * @typedef {{ Tensor: new (type: any, data: any, dims: readonly number[]) => any, env: any,
 *   InferenceSession: { create: (model: Uint8Array, options?: any) => Promise<EngineSession> } }} Ort
 */
/** @typedef {{ threads?: number, executionProviders?: readonly any[] }} EngineOptions */

const TOGETHER = 512 * 512; // pixels of frames that go through the vision graph in one run
const OPENINGS = 16; // fixed texts that a model remembers

/** Name and version of the engine, for messages. @param {Ort} ort */
export function engineName({ env }) {
  const { versions } = env;
  const engine = versions?.node ? "node" : "web";
  return `onnxruntime-${engine} ${versions?.[engine] ?? versions?.common ?? ""}`.trim();
}

/** Encoder and decoder graphs, shared by all sessions. */
export class OnnxModel {
  /**
   * @param {Ort} ort
   * @param {Manifest} manifest
   * @param {EngineSession} encoder
   * @param {EngineSession} decoder
   */
  constructor(ort, manifest, encoder, decoder) {
    this.ort = ort;
    this.encoder = encoder;
    this.decoder = decoder;
    this.roles = manifest.session;
    this.bos = manifest.tokens.bos;
    this.pixels = Object.keys(manifest.graphs.encoder.inputs)[0];
    this.carried = [...(this.roles.state ?? []), ...(this.roles.kv ?? [])];
    const sources = [...Object.values(this.roles.photo ?? {}), ...(this.roles.state ?? []).map(({ init }) => init)];
    if (this.roles.prefix) sources.push(this.roles.prefix.from);
    this.encoderOutputs = [...new Set(sources)];
    this.decoderOutputs = [this.roles.logits, ...this.carried.map(({ output }) => output)];
    this.types = Object.fromEntries(
      Object.entries(manifest.graphs.decoder.inputs).map(([name, { dtype }]) => [name, dtype]),
    );
    /**
     * Fixed texts → what one row holds behind them.
     * @type {Map<string, { rows: Map<string, Tensor>, length: number }>}
     */
    this.openings = new Map();
  }

  /**
   * @param {import("./bundle.js").Bundle} bundle
   * @param {Ort} ort
   * @param {EngineOptions} options
   * @throws {BundleError} where the engine cannot load a graph
   */
  static async load(bundle, ort, { threads, executionProviders }) {
    checkEngine(bundle, ort);
    if (threads !== undefined) {
      if (!Number.isInteger(threads) || threads < 1 || threads > 1024) {
        throw new UsageError(`threads must be a whole number from 1 to 1024, not ${JSON.stringify(threads)}`);
      }
      if (ort.env.wasm) ort.env.wasm.numThreads = threads; // counts until the first session of the page
    }
    /** @type {EngineSession[]} */
    const sessions = [];
    try {
      for (const name of ["encoder", "decoder"]) {
        sessions.push(await sessionOf(bundle, ort, bundle.manifest.graphs[name], { threads, executionProviders }));
      }
    } catch (error) {
      await Promise.all(sessions.map((each) => each.release?.()));
      throw error;
    }
    return new OnnxModel(ort, bundle.manifest, sessions[0], sessions[1]);
  }

  session() {
    return new OnnxSession(this);
  }

  /** @param {string} type @param {Values} data @param {readonly number[]} dims @returns {Tensor} */
  tensor(type, data, dims) {
    return new this.ort.Tensor(type, data, dims);
  }

  /**
   * One run of a graph.
   * @param {EngineSession} graph
   * @param {Record<string, Tensor>} feed
   * @param {string[]} outputs
   * @returns {Promise<Record<string, Tensor>>}
   */
  async run(graph, feed, outputs) {
    try {
      return await graph.run(feed, outputs);
    } catch (error) {
      throw new EdgecapError(`${engineName(this.ort)} failed in the bundle's graph: ${reason(error)}`);
    }
  }

  /** Free the engine's memory. */
  async release() {
    await this.encoder.release?.();
    await this.decoder.release?.();
  }
}

/**
 * @param {import("./bundle.js").Bundle} bundle
 * @param {Ort} ort
 * @param {{ file: string, weights?: string }} graph
 * @param {EngineOptions} engine
 */
async function sessionOf(bundle, ort, graph, { threads, executionProviders }) {
  /** @type {Record<string, any>} */
  const options = { logSeverityLevel: 3, interOpNumThreads: 1 };
  if (threads !== undefined) options.intraOpNumThreads = threads;
  if (executionProviders) options.executionProviders = executionProviders;
  if (graph.weights) {
    options.externalData = [{ path: graph.weights.split("/").at(-1), data: await bundle.read(graph.weights) }];
    options.enableMemPattern = false;
  }
  const model = await bundle.read(graph.file);
  try {
    return await ort.InferenceSession.create(model, options);
  } catch (error) {
    throw new BundleError(`${bundle.location}: ${graph.file} cannot be loaded by ${engineName(ort)}: ${reason(error)}`);
  }
}

/** @param {import("./bundle.js").Bundle} bundle @param {Ort} ort */
function checkEngine(bundle, ort) {
  if (!ort?.InferenceSession || !ort.Tensor) {
    throw new UsageError("ort must be the module onnxruntime-web or onnxruntime-node: import * as ort from …");
  }
  const needed = bundle.manifest.requires.onnxruntime;
  const found = /(\d+)\.(\d+)/u.exec(engineName(ort));
  const wanted = /^(\d+)\.(\d+)/u.exec(needed ?? "");
  if (found && wanted && (Number(found[1]) - Number(wanted[1]) || Number(found[2]) - Number(wanted[2])) < 0) {
    throw new UsageError(
      `${bundle.location} needs ONNX Runtime ${needed} or newer, this is ${engineName(ort)}: update it`,
    );
  }
}

/** The state of one photo being captioned: what belongs to the photo once, hidden states and KV cache for each row. */
export class OnnxSession {
  /** @param {OnnxModel} model */
  constructor(model) {
    this.model = model;
    /** @type {Map<string, Tensor>} */
    this.fixed = new Map(); // decoder inputs that stay as they are
    /** @type {Map<string, Tensor>} */
    this.rows = new Map(); // decoder inputs whose axis 0 is the rows
    this.count = 0;
    this.length = 0; // positions that each row has read
    /** @type {Record<string, Tensor>} */
    this.encoded = {};
  }

  /**
   * The encoder graph, once for a photo.
   * @param {Uint8Array} pixels uint8 [height, width, 3], or as many frames one after the other
   * @param {{ width: number, height: number, frames?: number }} size
   */
  async encode(pixels, { width, height, frames = 1 }) {
    const { model } = this;
    const each = width * height * 3;
    const together = Math.max(1, Math.floor(TOGETHER / (width * height)));
    /** @type {Record<string, Tensor[]>} */
    const parts = {};
    for (let at = 0; at < frames; at += together) {
      const count = Math.min(together, frames - at);
      const part = pixels.subarray(at * each, (at + count) * each);
      const feed = { [model.pixels]: model.tensor("uint8", part, [count, height, width, 3]) };
      const found = await model.run(model.encoder, feed, model.encoderOutputs);
      for (const [name, value] of Object.entries(found)) (parts[name] ??= []).push(value);
    }
    this.encoded = Object.fromEntries(Object.entries(parts).map(([name, values]) => [name, this.#joined(values)]));
  }

  /**
   * Feed BOS and the prompt to the decoder, or a framed prompt's segments with the encoded frames between them.
   * @param {number[]} promptIds
   * @param {import("./framed.js").Segments} [segments]
   * @returns {Promise<Logits>} of one row
   */
  async prefill(promptIds, segments) {
    const { roles, bos } = this.model;
    const { encoded } = this;
    this.encoded = {};
    if (segments) return this.#between(encoded[/** @type {any} */ (roles.prefix).from], segments, promptIds);
    for (const [name, source] of Object.entries(roles.photo ?? {})) this.fixed.set(name, encoded[source]);
    for (const { input, init } of roles.state ?? []) this.rows.set(input, encoded[init]);
    if (roles.photo_index) this.rows.set(roles.photo_index, this.#ids(roles.photo_index, [0], [1]));
    this.#begin();
    const ids = [bos, ...promptIds];
    let prefix = roles.prefix && encoded[roles.prefix.from];
    if (roles.ids.rank === 2) return this.#run(ids, 1, prefix);
    let logits = await this.#run([ids[0]], 1, prefix);
    for (const id of ids.slice(1)) logits = await this.#run([id], 1);
    return logits;
  }

  /**
   * Feed one token per row: row i continues row parents[i] with ids[i].
   * @param {number[]} ids
   * @param {number[]} parents
   * @returns {Promise<Logits>}
   */
  async step(ids, parents) {
    if (parents.length !== this.count || parents.some((parent, row) => parent !== row)) {
      for (const [name, value] of this.rows) this.rows.set(name, this.#gathered(value, parents));
      this.count = parents.length;
    }
    return this.#run(ids, ids.length);
  }

  /** One row that has read nothing. */
  #begin() {
    const { model } = this;
    this.count = 1;
    this.length = 0;
    for (const { input, heads, dim } of model.roles.kv ?? []) {
      const type = model.types[input];
      this.rows.set(input, model.tensor(type, empty(type), [1, heads, 0, dim]));
    }
  }

  /**
   * @param {Tensor} seen [frames, places, dim]
   * @param {import("./framed.js").Segments} segments
   * @param {number[]} promptIds
   */
  async #between(seen, { before, after }, promptIds) {
    await this.#open(before);
    const [, places, dim] = seen.dims;
    let logits = /** @type {Logits | undefined} */ (undefined);
    for (const [frame, words] of after.entries()) {
      const data = seen.data.subarray(frame * places * dim, (frame + 1) * places * dim);
      const ids = frame + 1 === after.length ? [...words, ...promptIds] : words;
      logits = await this.#run(ids, 1, this.model.tensor(seen.type, data, [1, places, dim]));
    }
    return /** @type {Logits} */ (logits);
  }

  /** Begin with one row that has read the fixed text `ids`, which a model computes once. @param {number[]} ids */
  async #open(ids) {
    const { openings } = this.model;
    const key = ids.join(" ");
    const saved = openings.get(key);
    if (saved) {
      this.rows = new Map(saved.rows);
      this.count = 1;
      this.length = saved.length;
      return;
    }
    this.#begin();
    if (!ids.length) return;
    await this.#run(ids, 1);
    if (openings.size < OPENINGS) openings.set(key, { rows: new Map(this.rows), length: this.length });
  }

  /**
   * Read on: prefix [1, places, dim], then ids.
   * @param {number[]} ids of each row, one row after the other
   * @param {number} rows
   * @param {Tensor} [prefix]
   * @returns {Promise<Logits>}
   */
  async #run(ids, rows, prefix) {
    const { model } = this;
    const { roles } = model;
    const each = ids.length / rows;
    const count = each + (prefix ? prefix.dims[1] : 0);
    if (roles.positions && this.length + count > roles.positions) {
      throw new UsageError(
        `photo, prompt and caption need ${this.length + count} positions and the model has ${roles.positions}: ask for a ` +
          "smaller maxLength",
      );
    }
    const feed = Object.fromEntries([...this.fixed, ...this.rows]);
    const { input, rank } = roles.ids;
    feed[input] = this.#ids(input, ids, rank === 2 ? [rows, each] : [rows]);
    if (roles.cache) feed[roles.cache.filled] = this.#ids(roles.cache.filled, [this.length + count], []);
    if (roles.prefix) {
      const { input: name, dim } = roles.prefix;
      feed[name] = prefix ?? model.tensor(model.types[name], empty(model.types[name]), [rows, 0, dim]);
    }
    const found = await model.run(model.decoder, feed, model.decoderOutputs);
    for (const entry of model.carried) this.rows.set(entry.input, found[entry.output]);
    this.length += count;
    const { data, dims, type } = found[roles.logits];
    const logits = type === "float16" ? fromHalves(/** @type {any} */ (data)) : /** @type {Float32Array} */ (data);
    return { logits, rows, vocab: dims[dims.length - 1] };
  }

  /** @param {string} name @param {number[]} ids @param {number[]} dims */
  #ids(name, ids, dims) {
    const type = this.model.types[name];
    const data = type === "int64" ? BigInt64Array.from(ids, BigInt) : Int32Array.from(ids);
    return this.model.tensor(type, data, dims);
  }

  /** @param {Tensor} value @param {number[]} parents */
  #gathered(value, parents) {
    const { type, data, dims } = value;
    const each = data.length / dims[0];
    const moved = new /** @type {any} */ (data.constructor)(each * parents.length);
    parents.forEach((parent, row) => moved.set(data.subarray(parent * each, (parent + 1) * each), row * each));
    return this.model.tensor(type, moved, [parents.length, ...dims.slice(1)]);
  }

  /** @param {Tensor[]} values */
  #joined(values) {
    if (values.length === 1) return values[0];
    const { type, data, dims } = values[0];
    const joined = new /** @type {any} */ (data.constructor)(values.reduce((sum, value) => sum + value.data.length, 0));
    let at = 0;
    for (const value of values) {
      joined.set(value.data, at);
      at += value.data.length;
    }
    return this.model.tensor(type, joined, [values.reduce((sum, value) => sum + value.dims[0], 0), ...dims.slice(1)]);
  }
}

/** @param {string} type */
const empty = (type) => (type === "float16" ? new Uint16Array(0) : new Float32Array(0));

/** @param {Uint16Array | Float32Array} data bits of halves, or, where the platform has them, a Float16Array */
function fromHalves(data) {
  if (!(data instanceof Uint16Array)) return Float32Array.from(data);
  return Float32Array.from(data, half);
}
