/** edgecap: captions for photos, on the device. `Captioner.load(bundle)`, then `captioner.caption(photo)`. */

export { Bundle } from "./bundle.js";
export { Captioner } from "./captioner.js";
export { BundleError, EdgecapError, UsageError } from "./errors.js";
export { readPng } from "./png.js";
