/** PNG → upright pixels, exactly and everywhere: a bundle's golden photo, and photos in Node. 8 bits, not interlaced. */

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
  let orientation = 1;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (data.length !== length) throw new Error("truncated");
    if (kind === "PLTE") palette = new Uint8Array(data);
    if (kind === "tRNS") opacity = new Uint8Array(data);
    if (kind === "IDAT") parts.push(data);
    if (kind === "eXIf") orientation = orientationOf(data);
    if (kind === "IEND") break;
    at += 12 + length;
  }
  const lines = await inflated(parts, (width * channels + 1) * height);
  const rows = unfiltered(lines, width * channels, height, channels);
  return upright({ data: coloured(rows, type, palette, opacity), width, height }, orientation);
}

/** EXIF's orientation, 1 to 8; 1 where it says none, or nonsense. @param {Uint8Array} exif a TIFF's header and tags */
function orientationOf(exif) {
  const view = new DataView(exif.buffer, exif.byteOffset, exif.byteLength);
  try {
    const little = view.getUint16(0) === 0x4949; // "II"
    const start = view.getUint32(4, little);
    for (let at = start + 2, end = at + 12 * view.getUint16(start, little); at < end; at += 12) {
      if (view.getUint16(at, little) === 0x0112) return view.getUint16(at + 8, little);
    }
  } catch {
    // cut off: must not cost the photo
  }
  return 1;
}

/**
 * @param {{ data: Uint8Array, width: number, height: number }} image
 * @param {number} orientation
 */
function upright(image, orientation) {
  if (!(orientation > 1 && orientation <= 8)) return image;
  const { data, width, height } = image;
  const channels = data.length / (width * height);
  const [right, bottom] = [width - 1, (height - 1) * width];
  // Where the first pixel lies, and how far it is from there to the next one and to the next row's.
  const [start, across, down] = /** @type {[number, number, number][]} */ ([
    [right, -1, width],
    [bottom + right, -1, -width],
    [bottom, 1, -width],
    [0, width, 1],
    [bottom, -width, 1],
    [bottom + right, -width, -1],
    [right, width, -1],
  ])[orientation - 2];
  const [wide, high] = orientation > 4 ? [height, width] : [width, height];
  const turned = new Uint8Array(data.length);
  let to = 0;
  for (let y = 0; y < high; y++) {
    for (let x = 0; x < wide; x++) {
      const from = (start + x * across + y * down) * channels;
      for (let channel = 0; channel < channels; channel++) turned[to++] = data[from + channel];
    }
  }
  return { data: turned, width: wide, height: high };
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
  let above = new Uint8Array(width);
  for (let y = 0; y < height; y++) {
    const filter = lines[y * (width + 1)];
    const line = lines.subarray(y * (width + 1) + 1, (y + 1) * (width + 1));
    const row = rows.subarray(y * width, (y + 1) * width);
    if (filter > 4) throw new Error(`filter ${filter}`);
    if (filter === 0) row.set(line);
    else if (filter === 2) for (let x = 0; x < width; x++) row[x] = line[x] + above[x];
    else {
      const first = filter === 1 ? 0 : filter === 3 ? 1 : 2; // nothing is left of the first pixel
      for (let x = 0; x < step; x++) row[x] = line[x] + (first === 2 ? above[x] : first ? above[x] >> 1 : 0);
      if (filter === 1) for (let x = step; x < width; x++) row[x] = line[x] + row[x - step];
      else if (filter === 3) for (let x = step; x < width; x++) row[x] = line[x] + ((row[x - step] + above[x]) >> 1);
      else for (let x = step; x < width; x++) row[x] = line[x] + paeth(row[x - step], above[x], above[x - step]);
    }
    above = row;
  }
  return rows;
}

/** @param {number} left @param {number} up @param {number} corner */
function paeth(left, up, corner) {
  const guess = left + up - corner;
  const a = Math.abs(guess - left);
  const b = Math.abs(guess - up);
  const c = Math.abs(guess - corner);
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/** @param {Uint8Array} rows @param {number} type @param {Uint8Array} palette @param {Uint8Array} opacity */
function coloured(rows, type, palette, opacity) {
  if (type === 6 || (type === 2 && !opacity.length)) return rows;
  const count = rows.length / CHANNELS[/** @type {keyof typeof CHANNELS} */ (type)];
  const data = new Uint8Array(count * 4).fill(255);
  if (type === 2) {
    const [, red, , green, , blue] = opacity; // the colour that is transparent
    for (let i = 0, from = 0; i < count; i++, from += 3) {
      for (let channel = 0; channel < 3; channel++) data[i * 4 + channel] = rows[from + channel];
      if (rows[from] === red && rows[from + 1] === green && rows[from + 2] === blue) data[i * 4 + 3] = 0;
    }
  } else if (type === 3) {
    for (let i = 0; i < count; i++) {
      for (let channel = 0; channel < 3; channel++) data[i * 4 + channel] = palette[3 * rows[i] + channel];
      data[i * 4 + 3] = opacity[rows[i]] ?? 255;
    }
  } else {
    const step = rows.length / count;
    for (let i = 0; i < count; i++) {
      const grey = rows[i * step];
      for (let channel = 0; channel < 3; channel++) data[i * 4 + channel] = grey;
      if (type === 4) data[i * 4 + 3] = rows[i * step + 1];
      else if (opacity.length && grey === opacity[1]) data[i * 4 + 3] = 0;
    }
  }
  return data;
}
