/**
 * Photos as the frames a SmolVLM's vision graph takes, whole or in tiles with an overview, and the prompt around them:
 * runtime/frames.py and prompt.py, value for value.
 */

import { EdgecapError, UsageError } from "./errors.js";
import { MAX_PIXELS, MAX_SIDE } from "./preprocess.js";
import { isResample, resize } from "./resample.js";

/** @typedef {import("./resample.js").Rgb} Rgb */
/** @typedef {{ before: number[], after: number[][] }} Segments ids before the first frame, and behind each */
/** @typedef {{ pixels: Uint8Array, frames: number, width: number, height: number, segments: Segments }} Framed */

const MAX_EDGE = 4096; // pixels of a side after the first resize

/**
 * How photos become frames: bundle.json's "frames". side: pixels a side of a frame; native: of what the model learnt.
 * @typedef {{ side: number, native: number, patch: number, scale: number, longest_edge?: number, split?: boolean,
 *   resample?: import("./resample.js").Resample }} Sizes
 */
export class Framing {
  /** @param {Sizes} sizes @param {ReturnType<typeof checkedPrompt>} prompt @throws {UsageError} for bad ones */
  constructor(sizes, prompt) {
    const { side, native, patch, scale, longest_edge = 0, split = false, resample = "lanczos" } = sizes;
    for (const [name, value, low] of /** @type {[string, any, number][]} */ ([
      ["native", native, 1],
      ["patch", patch, 1],
      ["scale", scale, 1],
      ["side", side, 1],
      ["longest_edge", longest_edge, 0],
    ])) {
      const high = low ? MAX_SIDE : 2 ** 16;
      if (!Number.isInteger(value) || value < low || value > high) {
        throw new UsageError(
          `framing ${name} must be a whole number from ${low} to ${high}, not ${JSON.stringify(value)}`,
        );
      }
    }
    if (typeof split !== "boolean") throw new UsageError("framing split must be true or false");
    if (typeof resample !== "string" || !isResample(resample))
      throw new UsageError(`framing resample ${resample} is not known`);
    const step = patch * scale;
    if (native < step || Math.floor(native / patch) % scale) {
      throw new UsageError(`framing native must be whole groups of ${scale} patches of ${patch} px`);
    }
    if (side > native || (side % step && side !== native)) {
      throw new UsageError(`this model sees photos of ${multiples(side, native, step)}, not ${side}`);
    }
    this.sizes = sizes;
    this.side = side;
    this.longestEdge = longest_edge;
    this.split = split;
    this.resample = resample;
    this.prompt = prompt;
  }

  /** @param {any} values @param {number} vocab @throws {UsageError} for what is none */
  static of(values, vocab) {
    const framing = new Framing(values, checkedPrompt(values.prompt, vocab));
    if (framing.split && !framing.prompt.tiles.length) {
      throw new UsageError("framing splits photos into tiles, which the prompt has no words for");
    }
    return framing;
  }

  /** The same for frames of another size. @param {number} side @param {boolean} split */
  at(side, split) {
    return new Framing({ ...this.sizes, side, split }, this.prompt);
  }

  /** Tiles a side that a photo can have at most; 0 where none is split, or where its own size decides. */
  get most() {
    if (!this.split || !this.longestEdge) return 0;
    const edge = Math.min(this.longestEdge + (this.longestEdge % 2), MAX_EDGE); // the shorter side may be 1 more
    const count = Math.ceil(edge / this.side);
    return count > 1 ? count : 0;
  }

  /** @param {Rgb} image of any size @returns {Framed} */
  cut(image) {
    const { side } = this;
    let now = image;
    for (const [width, height] of this.#sizes(image.width, image.height)) now = this.#resized(now, width, height);
    const [rows, columns] = now.width === side && now.height === side ? [0, 0] : [now.height / side, now.width / side];
    const segments = this.#segments(rows, columns);
    if (!rows) return { pixels: now.data, frames: 1, width: side, height: side, segments };
    const frames = rows * columns + 1;
    const line = side * 3;
    const pixels = new Uint8Array(frames * side * line);
    let to = 0;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        for (let y = row * side; y < (row + 1) * side; y++, to += line) {
          const from = (y * columns + column) * line;
          pixels.set(now.data.subarray(from, from + line), to);
        }
      }
    }
    pixels.set(this.#resized(now, side, side).data, to);
    return { pixels, frames, width: side, height: side, segments };
  }

  /** @param {Rgb} image @param {number} width @param {number} height */
  #resized(image, width, height) {
    return image.width === width && image.height === height ? image : resize(image, width, height, this.resample);
  }

  /** The sizes a photo is given one after the other. @param {number} width @param {number} height */
  #sizes(width, height) {
    const sizes = /** @type {[number, number][]} */ ([]);
    if (this.longestEdge) {
      [width, height] = toEdge(width, height, this.longestEdge);
      sizes.push([width, height]);
    }
    if (!this.split) return [...sizes, /** @type {[number, number]} */ ([this.side, this.side])];
    [width, height] = toTiles(width, height, this.side);
    if (width * height > MAX_PIXELS) {
      throw new EdgecapError(
        `a photo of ${width}×${height} pixels in tiles, more than ${MAX_PIXELS}; make it smaller first`,
      );
    }
    return [...sizes, /** @type {[number, number]} */ ([width, height])];
  }

  /** @param {number} rows of tiles, 0 for one frame @param {number} columns @returns {Segments} */
  #segments(rows, columns) {
    const { before, after, whole, end, row, rows: last, tiles } = this.prompt;
    if (!rows) return { before: [...before, ...whole], after: [[...end, ...after]] };
    const wide = tiles[0]?.length ?? 0;
    if (rows > tiles.length || columns > wide) {
      throw new UsageError(`a photo in ${rows} × ${columns} tiles: this prompt knows up to ${tiles.length} × ${wide}`);
    }
    const starts = [...tiles.slice(0, rows).flatMap((cells) => cells.slice(0, columns)), whole];
    const between = starts.slice(1).map((start, place) => {
      const ends = place + 1 === rows * columns ? last : (place + 1) % columns ? [] : row;
      return [...ends, ...start];
    });
    return { before: [...before, ...starts[0]], after: [...between, [...end, ...after]] };
  }
}

/** What a side may be. @param {number} side @param {number} native @param {number} step */
function multiples(side, native, step) {
  const largest = Math.floor(native / step) * step;
  const near = Math.min(Math.max(Math.round(side / step), 1) * step, largest);
  const exact = largest < native ? ` or ${native}` : "";
  return `a multiple of ${step} px up to ${largest}${exact} (the nearest: ${near})`;
}

/** @param {any} prompt @param {number} vocab */
function checkedPrompt(prompt, vocab) {
  const { before, after, whole = [], end = [], row = [], rows = [], tiles = [] } = prompt ?? {};
  const lists = { before, after, whole, end, row, rows };
  /** @param {any} ids @param {string} name */
  const check = (ids, name) => {
    const good = Array.isArray(ids) && ids.every((id) => Number.isInteger(id) && id >= 0 && id < vocab);
    if (!good) throw new UsageError(`prompt ${name} must be a list of token ids below ${vocab}`);
  };
  for (const [name, ids] of Object.entries(lists)) check(ids, name);
  if (!after.length) throw new UsageError("prompt after must have the id that captions follow");
  if (!Array.isArray(tiles) || tiles.some((cells) => !Array.isArray(cells) || cells.length !== tiles[0].length)) {
    throw new UsageError("prompt tiles must be rows of one length");
  }
  tiles.forEach((cells) => cells.forEach((/** @type {any} */ ids) => check(ids, "tiles")));
  return { ...lists, tiles: /** @type {number[][][]} */ (tiles) };
}

/**
 * The longer side brought to `longest`, the other one in proportion, made even; both at most MAX_EDGE. Cut off, as in
 * transformers: 1 px more or less is another photo.
 * @param {number} width @param {number} height @param {number} longest
 */
function toEdge(width, height, longest) {
  let wide = width >= height;
  let ratio = width / height;
  let short = Math.trunc(wide ? longest / ratio : longest * ratio);
  short = Math.max(short + (short % 2), 1);
  [width, height] = wide ? [longest, short] : [short, longest];
  if (Math.max(width, height) > MAX_EDGE) {
    ratio = width / height;
    wide = width >= height;
    short = Math.max(Math.trunc(wide ? MAX_EDGE / ratio : MAX_EDGE * ratio), 1);
    [width, height] = wide ? [MAX_EDGE, short] : [short, MAX_EDGE];
  }
  return [width, height];
}

/**
 * The longer side up to whole tiles, the other in proportion and then, too.
 * @param {number} width @param {number} height @param {number} side
 */
function toTiles(width, height, side) {
  const ratio = width / height;
  const wide = width >= height;
  const longer = Math.ceil(Math.max(width, height) / side) * side;
  const scaled = Math.trunc(wide ? longer / ratio : longer * ratio);
  const short = Math.max(Math.ceil(scaled / side), 1) * side;
  return wide ? [longer, short] : [short, longer];
}
