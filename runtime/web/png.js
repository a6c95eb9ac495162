/** PNG → pixels, exactly and everywhere: a bundle's golden photo, and photos in Node. 8 bits, not interlaced. */

import { EdgecapError, reason } from "./errors.js";
import { MAX_PIXELS } from "./preprocess.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // by colour type: grey, RGB, palette, grey and alpha, RGBA

/** @param {Uint8Array} bytes */
export const isPng = (bytes) => SIGNATURE.every((byte, i) => bytes[i] === byte);

/**
 * @param {Uint8Array} bytes a PNG file
 * @param {string} [name] for messages
 * @returns {Promise<{ data: Uint8Array, width: number, height: number }>} RGB, or RGBA where it has transparency
 */
export async function readPng(bytes, name = "the image") {
  try {
    return await decoded(bytes);
  } catch (error) {
    throw new EdgecapError(`${name}: broken image, or a PNG of a kind that is not read here (${reason(error)})`);
  }
}

/** @param {Uint8Array} bytes */
async function decoded(bytes) {
  if (!isPng(bytes)) throw new Error("not a PNG");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const width = view.getUint32(16);
  const height = view.getUint32(20);
  const [depth, type, , , interlaced] = bytes.subarray(24, 29);
  const channels = CHANNELS[/** @type {keyof typeof CHANNELS} */ (type)];
  if (depth !== 8 || !channels || interlaced) throw new Error(`${depth} bits, type ${type}, interlaced ${interlaced}`);
  if (!width || !height || width * height > MAX_PIXELS) throw new Error(`${width}×${height} pixels`);
  const parts = [];
  let palette = new Uint8Array();
  let opacity = new Uint8Array();
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (data.length !== length) throw new Error("truncated");
    if (kind === "PLTE") palette = new Uint8Array(data);
    if (kind === "tRNS") opacity = new Uint8Array(data);
    if (kind === "IDAT") parts.push(data);
    if (kind === "IEND") break;
    at += 12 + length;
  }
  const lines = await inflated(parts, (width * channels + 1) * height);
  const rows = unfiltered(lines, width * channels, height, channels);
  return { data: coloured(rows, type, palette, opacity), width, height };
}

/** @param {Uint8Array[]} parts @param {number} size that it must have */
async function inflated(parts, size) {
  const stream = new Blob(/** @type {BlobPart[]} */ (parts)).stream().pipeThrough(new DecompressionStream("deflate"));
  const found = new Uint8Array(size);
  let at = 0;
  const reader = stream.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    const part = /** @type {Uint8Array} */ (value);
    if (at + part.length > size) throw new Error("more pixels than it says");
    found.set(part, at);
    at += part.length;
  }
  if (at !== size) throw new Error("truncated");
  return found;
}

/**
 * Undo the filters of PNG's lines (its specification, section 9).
 * @param {Uint8Array} lines @param {number} width in bytes @param {number} height @param {number} step bytes a pixel
 */
function unfiltered(lines, width, height, step) {
  const rows = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const filter = lines[y * (width + 1)];
    if (filter > 4) throw new Error(`filter ${filter}`);
    const from = y * (width + 1) + 1;
    const to = y * width;
    for (let x = 0; x < width; x++) {
      const left = x >= step ? rows[to + x - step] : 0;
      const up = y ? rows[to + x - width] : 0;
      const corner = y && x >= step ? rows[to + x - width - step] : 0;
      const guess = [0, left, up, (left + up) >> 1, filter === 4 ? paeth(left, up, corner) : 0][filter];
      rows[to + x] = lines[from + x] + guess;
    }
  }
  return rows;
}

/** @param {number} left @param {number} up @param {number} corner */
function paeth(left, up, corner) {
  const guess = left + up - corner;
  const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/** @param {Uint8Array} rows @param {number} type @param {Uint8Array} palette @param {Uint8Array} opacity */
function coloured(rows, type, palette, opacity) {
  if (type === 6) return rows;
  if (type === 2 && !opacity.length) return rows;
  /** @type {(at: number) => number[]} */
  let pixel;
  if (type === 2) {
    const [red, green, blue] = [opacity[1], opacity[3], opacity[5]]; // the colour that is transparent
    pixel = (at) => [
      rows[at],
      rows[at + 1],
      rows[at + 2],
      rows[at] === red && rows[at + 1] === green && rows[at + 2] === blue ? 0 : 255,
    ];
  } else if (type === 3) {
    pixel = (at) => [...palette.subarray(3 * rows[at], 3 * rows[at] + 3), opacity[rows[at]] ?? 255];
  } else {
    pixel = (at) => [
      rows[at],
      rows[at],
      rows[at],
      type === 4 ? rows[at + 1] : opacity.length && rows[at] === opacity[1] ? 0 : 255,
    ];
  }
  const step = CHANNELS[/** @type {keyof typeof CHANNELS} */ (type)];
  const data = new Uint8Array((rows.length / step) * 4);
  for (let i = 0; i < rows.length / step; i++) data.set(pixel(i * step), i * 4);
  return data;
}
