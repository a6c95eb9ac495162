/** What an app may hand over as a photo → RGB: pixels anywhere; in browsers also files, bitmaps, images, videos. */

import { EdgecapError, UsageError, reason } from "./errors.js";
import { isPng, readPng } from "./png.js";
import { toRgb } from "./preprocess.js";

const MOST = 16e6; // pixels that a canvas holds on every phone; larger photos are drawn smaller

/** @typedef {import("./resample.js").Rgb} Rgb */

/**
 * @param {any} image { data, width, height } of RGB or RGBA, an ImageData, a PNG file's bytes; in browsers any image
 *   file's bytes, a Blob, an ImageBitmap, or whatever a canvas draws
 * @returns {Promise<Rgb>}
 */
export async function rgbOf(image) {
  if (image === null || typeof image !== "object")
    throw new UsageError(`a photo must be pixels or a picture, not ${typeof image}`);
  if (image instanceof ArrayBuffer) return rgbOf(new Uint8Array(image));
  if (image instanceof Uint8Array) {
    return isPng(image) ? toRgb(await readPng(image)) : ofBlob(new Blob([/** @type {any} */ (image)]));
  }
  if ("data" in image && "width" in image && "height" in image) return toRgb(image);
  if (globalThis.Blob && image instanceof Blob) return ofBlob(image);
  if (typeof createImageBitmap === "function") return drawn(image);
  throw new UsageError("a photo must be { data, width, height } with RGB or RGBA bytes, or the bytes of a PNG");
}

/** Upright, in the file's own colour values, as the Python runtime reads them. @param {Blob} blob */
async function ofBlob(blob) {
  if (typeof createImageBitmap !== "function") {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    if (isPng(bytes)) return toRgb(await readPng(bytes));
    throw new UsageError("photos are decoded by browsers; in Node, decode them first, or hand over a PNG");
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
  } catch (error) {
    throw new EdgecapError(`the image: broken, or of a format that this browser does not read (${reason(error)})`);
  }
  try {
    return drawn(bitmap);
  } finally {
    bitmap.close();
  }
}

/** @param {any} picture @returns {Rgb} */
function drawn(picture) {
  const wide = picture.naturalWidth ?? picture.videoWidth ?? picture.displayWidth ?? picture.width;
  const high = picture.naturalHeight ?? picture.videoHeight ?? picture.displayHeight ?? picture.height;
  if (!(wide > 0 && high > 0)) throw new UsageError("the picture has no pixels yet; wait until it is loaded");
  const scale = Math.min(1, Math.sqrt(MOST / (wide * high)));
  const [width, height] = [Math.max(1, Math.floor(wide * scale)), Math.max(1, Math.floor(high * scale))];
  const canvas =
    typeof OffscreenCanvas === "function" ? new OffscreenCanvas(width, height) : document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = /** @type {OffscreenCanvasRenderingContext2D | null} */ (
    canvas.getContext("2d", { willReadFrequently: true })
  );
  if (!context) throw new EdgecapError("this browser gives no canvas to read a picture with");
  try {
    context.drawImage(picture, 0, 0, width, height);
    return toRgb(context.getImageData(0, 0, width, height));
  } catch (error) {
    throw new EdgecapError(`the picture cannot be read (${reason(error)})`);
  }
}
