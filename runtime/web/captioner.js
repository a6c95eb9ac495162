/** A bundle and a photo in, a caption out: the object an app holds. */

import { Bundle } from "./bundle.js";
import { decode, decodeOptions, neverSaid } from "./decode.js";
import { EdgecapError, UsageError, reason } from "./errors.js";
import { rgbOf } from "./image.js";
import { OnnxModel, engineName } from "./onnx.js";
import { Tokenizer, plainWords } from "./tokenizer.js";
import { verifyGolden } from "./verify.js";
import { View } from "./view.js";

/** @typedef {import("./resample.js").Rgb} Rgb */
/** @typedef {import("./framed.js").Framed} Framed */

/** Options of `caption` → names in bundle.json's "decoding". */
export const DECODING = {
  beam: "beam",
  maxLength: "max_length",
  minLength: "min_length",
  lengthPenalty: "length_penalty",
  noRepeatNgram: "no_repeat_ngram",
  deadlineMs: "deadline_ms",
};
const OTHERS = ["imageSize", "tiles", "prompt", "signal", "onToken"];

/** A loaded bundle. Calls may overlap: they run one after the other. */
export class Captioner {
  /** @type {OnnxModel | null} */ #model;
  /** @type {Promise<unknown>} */ #last = Promise.resolve();
  /** @type {number[]} */ #suppress;

  /** @type {View} */ #view;

  /** @param {Bundle} bundle @param {OnnxModel} model @param {Tokenizer} tokenizer @param {View} view */
  constructor(bundle, model, tokenizer, view) {
    this.bundle = bundle;
    this.tokenizer = tokenizer;
    this.tokens = bundle.manifest.tokens;
    /** The engine's name and version. */
    this.engine = engineName(model.ort);
    this.#model = model;
    this.#view = view;
    this.#suppress = neverSaid(this.tokens);
  }

  /**
   * Read, check and load a bundle.
   * @param {string | URL} location its folder: a URL, in Node also a path
   * @param {{ ort?: any, threads?: number, verify?: "hash" | "sizes", fetch?: typeof globalThis.fetch,
   *   executionProviders?: readonly any[] }} [options]
   */
  static async load(location, { ort, verify, fetch, ...engine } = {}) {
    const bundle = await Bundle.open(location, { verify, fetch });
    const view = View.of(bundle.manifest);
    const tokenizer = new Tokenizer(await bundle.read("tokenizer.json"), `${bundle.location}: tokenizer.json`);
    const model = await OnnxModel.load(bundle, ort ?? (await installed()), engine);
    return new Captioner(bundle, model, tokenizer, view);
  }

  /**
   * Caption one photo.
   * @param {any} image see `rgbOf`
   * @param {Record<string, any>} [options]
   */
  async caption(image, options = {}) {
    const settings = this.settings(options);
    const { deadline_ms: deadline } = settings.decoding;
    const end = deadline ? performance.now() + deadline : Infinity;
    return this.#alone((model) => this.#search(model, image, settings, options, end));
  }

  /**
   * @param {OnnxModel} model
   * @param {any} image
   * @param {ReturnType<Captioner["settings"]>} settings
   * @param {Record<string, any>} options
   * @param {number} [end]
   */
  async #search(model, image, { decoding, promptIds, view }, { signal, onToken }, end = Infinity) {
    signal?.throwIfAborted();
    const began = performance.now();
    const pixels = view.see(await rgbOf(image));
    const session = model.session();
    const times = [performance.now()];
    await this.#encode(session, pixels);
    times.push(performance.now());
    signal?.throwIfAborted();
    const logits = await session.prefill(promptIds, "segments" in pixels ? pixels.segments : undefined);
    times.push(performance.now());
    let steps = 0;
    const hypotheses = await decode(
      {
        step: (ids, parents) => {
          steps += 1;
          return session.step(ids, parents);
        },
      },
      logits,
      decoding,
      {
        eos: this.tokens.eos,
        suppress: this.#suppress,
        end,
        check: () => signal?.throwIfAborted(),
        onStep:
          onToken &&
          ((tokenIds) =>
            onToken({ text: this.tokenizer.settled([...promptIds, ...tokenIds]), tokenIds: [...tokenIds] })),
      },
    );
    signal?.throwIfAborted();
    const [best, ...others] = hypotheses.map((each) => this.#toCaption(each, promptIds));
    const now = performance.now();
    const timings = {
      preprocess: times[0] - began,
      encode: times[1] - times[0],
      firstToken: times[2] - times[1],
      perToken: steps ? (now - times[2]) / steps : 0,
      total: now - began,
    };
    return { ...best, alternatives: others, timings };
  }

  /** Reproduce the bundle's golden pair on this device. */
  async verify() {
    return this.#alone((model) =>
      verifyGolden(this, model, (photo, options) => this.#search(model, photo, this.settings(options), options)),
    );
  }

  /** Free the engine, when calls already begun have finished. Closing twice is fine. */
  async close() {
    const model = this.#model;
    this.#model = null;
    await this.#last.catch(() => {});
    await model?.release();
  }

  /**
   * The decoding options, prompt ids and view of a call with these options.
   * @param {Record<string, any>} options
   * @throws {UsageError} for bad ones
   */
  settings(options) {
    /** @type {Record<string, any>} */
    const given = {};
    for (const [name, value] of Object.entries(options)) {
      const known = Object.hasOwn(DECODING, name);
      if (!known && !OTHERS.includes(name)) {
        throw new UsageError(`unknown option "${name}"; there are ${[...Object.keys(DECODING), ...OTHERS].join(", ")}`);
      }
      if (known && value !== undefined && value !== null)
        given[DECODING[/** @type {keyof typeof DECODING} */ (name)]] = value;
    }
    const decoding = decodeOptions({ ...this.bundle.manifest.decoding, ...given });
    const words = plainWords(options.prompt ?? "");
    const promptIds = words ? this.tokenizer.encode(words) : [];
    if (this.tokens.unk !== undefined && promptIds.includes(this.tokens.unk)) {
      throw new UsageError(`the prompt "${options.prompt}" has words this model does not know; use others`);
    }
    return { decoding, promptIds, view: this.#view.within(options.imageSize ?? undefined, options.tiles ?? undefined) };
  }

  /** A photo as the encoder takes it. @param {any} image @returns {Promise<Rgb | Framed>} */
  async view(image) {
    return this.#view.see(await rgbOf(image));
  }

  /**
   * Logits before each of T given tokens and before EOS, one row each.
   * @param {OnnxModel} model
   * @param {Rgb | Framed} pixels
   * @param {number[]} tokenIds
   */
  async teacherForced(model, pixels, tokenIds) {
    const session = model.session();
    await this.#encode(session, pixels);
    const rows = [(await session.prefill([], "segments" in pixels ? pixels.segments : undefined)).logits];
    for (const token of tokenIds) rows.push((await session.step([token], [0])).logits);
    return rows;
  }

  /** @param {import("./onnx.js").OnnxSession} session @param {Rgb | Framed} pixels */
  #encode(session, pixels) {
    return "pixels" in pixels ? session.encode(pixels.pixels, pixels) : session.encode(pixels.data, pixels);
  }

  /**
   * Run when every earlier call has ended: an engine's session takes one run at a time.
   * @template T
   * @param {(model: OnnxModel) => Promise<T>} task
   * @returns {Promise<T>}
   */
  #alone(task) {
    const model = this.#model;
    if (!model) return Promise.reject(new UsageError(`the captioner of ${this.bundle.location} is closed`));
    const result = this.#last.then(() => task(model));
    this.#last = result.catch(() => {});
    return result;
  }

  /** @param {number[]} promptIds @param {number[]} tokenIds */
  #text(promptIds, tokenIds) {
    return this.tokenizer.decode([...promptIds, ...tokenIds]);
  }

  /** @param {import("./decode.js").Hypothesis} hypothesis @param {number[]} promptIds */
  #toCaption({ tokenIds, logprob, score, cut }, promptIds) {
    return { text: this.#text(promptIds, tokenIds), tokenIds, logprob, score, cut };
  }
}

/** The installed onnxruntime: -node in Node, -web in browsers. */
async function installed() {
  const name =
    typeof document === "undefined" && typeof process === "object" && process.versions?.node
      ? "onnxruntime-node"
      : "onnxruntime-web";
  let found;
  try {
    found = await import(name);
  } catch (error) {
    throw new EdgecapError(
      `${name} cannot be imported: npm install ${name}, or give the module as ort (${reason(error)})`,
    );
  }
  return found.InferenceSession ? found : found.default;
}
