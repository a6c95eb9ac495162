// Caption photos: node caption.mjs BUNDLE PHOTO...
//
//   npm pack /path/to/edgecap/runtime/web
//   npm install --ignore-scripts ./edgecap-0.1.0.tgz onnxruntime-node
//   npm install --ignore-scripts sharp          # for JPEG, WebP and the rest: edgecap itself reads PNGs alone

import { readFile } from "node:fs/promises";

import { Captioner, EdgecapError } from "edgecap";

const [bundle, ...photos] = process.argv.slice(2);
if (!photos.length) {
  console.error("usage: node caption.mjs BUNDLE PHOTO...");
  process.exit(1);
}

/** A photo as the captioner takes it: a PNG's bytes, or upright pixels. */
async function read(path) {
  if (path.toLowerCase().endsWith(".png")) return readFile(path);
  const { default: sharp } = await import("sharp");
  const upright = sharp(path).rotate().flatten({ background: "white" }).toColourspace("srgb");
  const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
  return { data, width: info.width, height: info.height };
}

try {
  const captioner = await Captioner.load(bundle);
  for (const path of photos) {
    try {
      const { text } = await captioner.caption(await read(path));
      console.log(text);
    } catch (error) {
      // broken, missing, or no photo at all: one line, and on with the next
      console.error(`${path}: ${error.message}`);
      process.exitCode = 1;
    }
  }
  await captioner.close();
} catch (error) {
  if (!(error instanceof EdgecapError)) throw error;
  console.error(error.message); // no such bundle, or not one to trust
  process.exitCode = 1;
}
