/** RGB or RGBA pixels → the uint8 pixels a graph takes, as the Python runtime makes them; normalised in the graph. */

import { EdgecapError, UsageError } from "./errors.js";
import { resize } from "./resample.js";

/** @typedef {import("./resample.js").Rgb} Rgb */

export const MAX_PIXELS = 89_478_485; // as in Python, where it is Pillow's limit
export const MAX_SIDE = 4096; // of what a graph may ask for

/**
 * Pixels as an app has them (an ImageData, or anything of its shape) → RGB. Transparency is laid over white.
 * @param {{ data: ArrayLike<number> & { length: number }, width: number, height: number }} image
 * @returns {Rgb}
 */
export function toRgb(image) {
  const { data, width, height } = image;
  if (!Number.isInteger(width) || !Number.isInteger(height) || width < 1 || height < 1) {
    throw new UsageError(`an image must have a width and a height from 1, not ${width} and ${height}`);
  }
  if (width * height > MAX_PIXELS) {
    throw new EdgecapError(
      `the image: ${width}×${height} pixels, more than ${MAX_PIXELS.toLocaleString("en")}; make it smaller first`,
    );
  }
  const bytes = data instanceof Uint8Array || data instanceof Uint8ClampedArray;
  const channels = bytes ? data.length / (width * height) : 0;
  if (!bytes || (channels !== 3 && channels !== 4)) {
    throw new UsageError(
      `an image of ${width}×${height} must have ${width * height * 3} bytes of RGB or ${width * height * 4} of RGBA in ` +
        `a Uint8Array or Uint8ClampedArray, not ${data?.length} values`,
    );
  }
  if (channels === 3) return { data: new Uint8Array(data.buffer, data.byteOffset, data.length), width, height };
  return { data: overWhite(data), width, height };
}

/** RGBA over white, rounded as Pillow's alpha_composite rounds. @param {Uint8Array | Uint8ClampedArray} rgba */
function overWhite(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    const alpha = rgba[from + 3];
    const white = 255 * (255 - alpha);
    for (let channel = 0; channel < 3; channel++) {
      const value = (rgba[from + channel] * alpha + white + 128) << 7;
      rgb[to + channel] = ((value >> 8) + value) >> 15;
    }
  }
  return rgb;
}

/** A bundle's preprocessing: "squash" to size, "crop" the largest centred part of its aspect ratio, or "keep". */
export class Preprocess {
  /** @param {{ size: number[], mode: string, resample: string }} values of bundle.json, which is checked */
  constructor({ size, mode, resample }) {
    this.height = size[0];
    this.width = size[1];
    this.mode = mode;
    this.resample = /** @type {import("./resample.js").Resample} */ (resample);
  }

  /**
   * RGB of any size → RGB of the encoder's. A photo that already has the size is not resampled.
   * @param {Rgb} image
   * @returns {Rgb}
   */
  apply(image) {
    const { width, height } = this;
    if (this.mode === "keep" || (image.width === width && image.height === height)) return image;
    return resize(image, width, height, this.resample, this.#box(image));
  }

  /** @param {Rgb} image @returns {[number, number, number, number]} */
  #box({ width, height }) {
    if (this.mode === "squash") return [0, 0, width, height];
    const scale = Math.min(width / this.width, height / this.height);
    const left = (width - this.width * scale) / 2;
    const top = (height - this.height * scale) / 2;
    return [
      Math.max(left, 0),
      Math.max(top, 0),
      Math.min(left + this.width * scale, width),
      Math.min(top + this.height * scale, height),
    ];
  }
}
