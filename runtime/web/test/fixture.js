/** What the Python runtime wrote down (tests/runtime/web_fixture.py), or the reason why it is not there. */

import { readFileSync } from "node:fs";
import { join } from "node:path";

export const folder = process.env.EDGECAP_WEB_FIXTURE ?? "";
export const missing = folder ? false : "EDGECAP_WEB_FIXTURE is not set; pytest tests/runtime/test_web.py sets it";

/** @param {string} name @returns {any} */
export const json = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));

/** @param {string} name */
export const bytes = (name) => new Uint8Array(readFileSync(join(folder, name)));

/** @param {string} name */
export const bundle = (name) => join(folder, `${name}.edgecap`);

/** The photos of a bundle's captions. @param {string} name @param {number[][]} sizes */
export function photos(name, sizes) {
  const all = bytes(`${name}.bin`);
  let at = 0;
  return sizes.map(([width, height]) => {
    const data = all.slice(at, (at += width * height * 3));
    return { data, width, height };
  });
}

/** Options of a call as Python names them → as JavaScript does. @param {Record<string, any>} options */
export function camel(options) {
  const renamed = (/** @type {string} */ name) => name.replace(/_(\w)/gu, (_, letter) => letter.toUpperCase());
  return Object.fromEntries(Object.entries(options).map(([name, value]) => [renamed(name), value]));
}

/** @param {number} seed @param {number} width @param {number} height */
export function noise(seed, width, height) {
  const data = Uint8Array.from({ length: width * height * 3 }, (_, i) => (i * 37 + seed * 101 + ((i * i) >> 3)) & 255);
  return { data, width, height };
}
