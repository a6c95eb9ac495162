/** edgecap: captions for photos, on the device. */

/** Pixels, three (RGB) or four (RGBA) bytes each, row by row. An ImageData is one. */
export interface PixelImage {
  data: Uint8Array | Uint8ClampedArray;
  width: number;
  height: number;
}

/** A photo: pixels, or a PNG's bytes (8 bits, not interlaced); in browsers also any image file or its bytes, or whatever
 * a canvas draws (images, videos, bitmaps). */
export type Photo = PixelImage | Uint8Array | ArrayBuffer | Blob | CanvasImageSource;

/** onnxruntime-web or onnxruntime-node: hand over the module, `import * as ort from "onnxruntime-web"`. */
export interface Ort {
  Tensor: unknown;
  InferenceSession: unknown;
  env: unknown;
}

export interface LoadOptions {
  /** The engine. Default: the installed onnxruntime-node in Node, onnxruntime-web elsewhere (by its bare name). */
  ort?: Ort;
  /** Threads of an operator; the engine chooses by default. In a page the first model's number stays. */
  threads?: number;
  /** "hash" (default): each file's size and SHA-256; "sizes": sizes alone, for a bundle that was verified before. */
  verify?: "hash" | "sizes";
  /** In the place of the global fetch, for headers or a cache of your own. */
  fetch?: typeof globalThis.fetch;
  /** onnxruntime's, ["wasm"] or ["webgpu"] for example. */
  executionProviders?: readonly unknown[];
}

export interface CaptionOptions {
  /** Hypotheses kept, 1 to 64; 1 is greedy. This and the next four default to the bundle's. */
  beam?: number;
  /** Tokens of a caption at most. */
  maxLength?: number;
  minLength?: number;
  /** Hypotheses are ranked by logprob / length ** lengthPenalty. */
  lengthPenalty?: number;
  /** No n-gram of this many tokens twice; 0 allows any. */
  noRepeatNgram?: number;
  /** Milliseconds from the call after which the best caption so far is given, `cut`. 0 is none. */
  deadlineMs?: number;
  /** SmolVLM: pixels a side of the frames it sees, 256 for example: less time. A smaller one alone means no tiles. */
  imageSize?: number;
  /** SmolVLM: look at a photo in tiles, or as a whole only. Default: as the bundle does. */
  tiles?: boolean;
  /** Text that the caption continues; its case and punctuation do not count. */
  prompt?: string;
  /** Ends the call with the signal's reason before its next step. */
  signal?: AbortSignal;
  /**
   * Called after each step with the best hypothesis that lives on: with a beam, its words may still change. Its text
   * has no half characters: what a token only begins is shown when the next ones have ended it.
   */
  onToken?: (partial: { text: string; tokenIds: number[] }) => void;
}

export interface Hypothesis {
  /** The caption, the prompt included. */
  text: string;
  /** Without BOS, prompt and EOS. */
  tokenIds: number[];
  /** Natural logarithm, EOS included where it was emitted. */
  logprob: number;
  score: number;
  /** The deadline ended it. */
  cut: boolean;
}

/** Milliseconds. total: of the call, without waiting for earlier ones. */
export interface Timings {
  /** Decoding the file, and resizing to the encoder's size. */
  preprocess: number;
  /** The encoder graph. */
  encode: number;
  /** The decoder's first run: BOS and prompt. */
  firstToken: number;
  /** The mean of each further step, search included; 0 where there was none. */
  perToken: number;
  total: number;
}

export interface Caption extends Hypothesis {
  /** With a beam: the other hypotheses, best first. */
  alternatives: Hypothesis[];
  timings: Timings;
}

/** What the golden photo gave. Cosines compare each position's logits with the fp32 reference's. */
export interface Verification {
  ok: boolean;
  caption: string;
  sameTokens: boolean;
  tokensDifferAt: number | null;
  minCosine: number;
  maxDifference: number;
  needsSameTokens: boolean;
  needsMinCosine: number;
}

/** A bundle whose bundle.json was read and checked; its other files are checked when they are read. */
export class Bundle {
  static open(location: string | URL, options?: Pick<LoadOptions, "verify" | "fetch">): Promise<Bundle>;
  private constructor();
  readonly manifest: Readonly<Record<string, any>>;
  /** Hash of bundle.json, which holds the hashes of all other files. */
  readonly sha256: string;
  readonly location: string;
  /** Size of all its files but bundle.json. */
  readonly bytes: number;
  read(name: string): Promise<Uint8Array>;
}

/** A loaded bundle. Calls may overlap: they run one after the other. */
export class Captioner {
  /** location: the bundle's folder, a URL, or in Node a path. */
  static load(location: string | URL, options?: LoadOptions): Promise<Captioner>;
  private constructor();
  readonly bundle: Bundle;
  /** The engine's name and version. */
  readonly engine: string;
  caption(image: Photo, options?: CaptionOptions): Promise<Caption>;
  /** Reproduce the golden pair: the same tokens (fp32), or logits near the reference's (int8, int4). */
  verify(): Promise<Verification>;
  /** Free the engine's memory, when calls already begun have finished. */
  close(): Promise<void>;
}

/** A failure that is told in one line. */
export class EdgecapError extends Error {}
/** What was asked for cannot be done as asked. */
export class UsageError extends EdgecapError {}
/** A bundle that is refused: incomplete, changed, unsafe or from a newer edgecap. */
export class BundleError extends UsageError {}

/** A PNG of 8 bits → RGB, or RGBA where it has transparency, upright. */
export function readPng(bytes: Uint8Array, name?: string): Promise<PixelImage & { data: Uint8Array }>;
