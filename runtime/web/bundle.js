/** The bundle: a folder on a server or on this machine's disk, each file checked when it is read. */

import { BundleError, EdgecapError, UsageError, reason } from "./errors.js";
import { parseManifest } from "./manifest.js";
import { sha256 } from "./sha256.js";

export const MANIFEST = "bundle.json";
const MAX_MANIFEST_BYTES = 2 * 2 ** 20;
const MAX_FILE_BYTES = 4 * 2 ** 30;
const MAX_FILES = 256;

/** @typedef {typeof globalThis.fetch} Fetch */

export class Bundle {
  /** @type {Source} */ #source;
  /** @type {"hash" | "sizes"} */ #verify;

  /**
   * @param {Source} source
   * @param {import("./manifest.js").Manifest} manifest
   * @param {"hash" | "sizes"} verify
   * @param {string} sha of bundle.json
   */
  constructor(source, manifest, verify, sha) {
    this.#source = source;
    this.#verify = verify;
    this.manifest = manifest;
    /** Hash of bundle.json, which holds the hash of every other file: it identifies the bundle. */
    this.sha256 = sha;
  }

  /**
   * Read and check bundle.json. Other files are read, and compared with it, when they are needed.
   * @param {string | URL} location the bundle's folder: a URL, in Node also a path
   * @param {{ verify?: "hash" | "sizes", fetch?: Fetch }} [options] each file's size and SHA-256, or its size alone
   */
  static async open(location, { verify = "hash", fetch = globalThis.fetch } = {}) {
    if (verify !== "hash" && verify !== "sizes") {
      throw new UsageError(`verify must be "hash" or "sizes", not ${JSON.stringify(verify)}`);
    }
    const source = await sourceOf(location, fetch);
    const data = await source.read(MANIFEST, MAX_MANIFEST_BYTES);
    const manifest = parseManifest(data, source.name(MANIFEST));
    const files = Object.entries(manifest.files);
    if (files.length > MAX_FILES) {
      throw new BundleError(`${source.where}: ${files.length} files, more than the limit of ${MAX_FILES}`);
    }
    const large = files.find(([, entry]) => entry.bytes > MAX_FILE_BYTES);
    if (large) throw new BundleError(`${source.where}: ${large[0]} is larger than a file of a bundle may be`);
    return new Bundle(source, manifest, verify, await sha256(data));
  }

  /** Where it lies, for messages. */
  get location() {
    return this.#source.where;
  }

  /** Size of all its files but bundle.json. */
  get bytes() {
    return Object.values(this.manifest.files).reduce((sum, entry) => sum + entry.bytes, 0);
  }

  /**
   * Contents of a listed file, which are what was exported.
   * @param {string} name
   * @returns {Promise<Uint8Array>}
   */
  async read(name) {
    const where = this.#source.name(name);
    if (!Object.hasOwn(this.manifest.files, name)) {
      throw new BundleError(`${this.location}: ${name} is not a file of this bundle`);
    }
    const entry = this.manifest.files[name];
    const data = await this.#source.read(name, entry.bytes);
    const again = "copy the bundle again or export it again";
    if (data.length !== entry.bytes) {
      const found = data.length.toLocaleString("en");
      throw new BundleError(`${where} has ${found} bytes instead of ${entry.bytes.toLocaleString("en")}; ${again}`);
    }
    if (this.#verify === "hash" && (await sha256(data)) !== entry.sha256) {
      throw new BundleError(`${where} is not the file that was exported (SHA-256 differs); ${again}`);
    }
    return data;
  }
}

/**
 * @typedef {{ where: string, name: (file: string) => string,
 *   read: (file: string, bytes: number) => Promise<Uint8Array> }} Source
 */

/**
 * @param {string | URL} location
 * @param {Fetch} fetch
 * @returns {Promise<Source>}
 */
async function sourceOf(location, fetch) {
  const text = String(location);
  if (!text) throw new UsageError("a bundle's location is empty; give the URL or the path of its folder");
  const node = typeof process === "object" && Boolean(process.versions?.node) && typeof document === "undefined";
  if (node && !/^https?:/iu.test(text)) return onDisk(text);
  const base = globalThis.document?.baseURI ?? globalThis.location?.href;
  let url;
  try {
    url = new URL(text, base);
  } catch {
    throw new UsageError(`${text}: not a URL of a bundle`);
  }
  if (!/^(https?|blob|data|file):$/u.test(url.protocol)) throw new UsageError(`${text}: not a URL of a bundle`);
  if (!url.pathname.endsWith("/")) url.pathname += "/";
  return onServer(url, fetch);
}

/** @param {URL} base @param {Fetch} fetch @returns {Source} */
function onServer(base, fetch) {
  const { search } = base; // a token, perhaps: every file wants it
  const where = base.href.slice(0, base.href.length - search.length - base.hash.length);
  /** @param {string} file */
  const name = (file) => where + file.split("/").map(encodeURIComponent).join("/");
  return {
    where,
    name,
    async read(file, bytes) {
      let response;
      try {
        response = await fetch(name(file) + search);
      } catch (error) {
        throw new EdgecapError(`${name(file)} cannot be fetched (${reason(error)})`);
      }
      if (!response.ok) {
        const what = file === MANIFEST ? "there is no such bundle" : "copy the bundle again";
        throw new UsageError(`${name(file)}: the server answers ${response.status}; ${what}`);
      }
      try {
        return await bodyOf(response, name(file), bytes);
      } catch (error) {
        if (error instanceof BundleError) throw error;
        throw new EdgecapError(`${name(file)} was broken off (${reason(error)}); try again`);
      }
    },
  };
}

/** A response's body, read no further than `bytes`. @param {Response} response @param {string} where @param {number} bytes */
async function bodyOf(response, where, bytes) {
  const reader = response.body?.getReader();
  if (!reader) return new Uint8Array(await response.arrayBuffer()); // a fetch of the caller's own
  const data = new Uint8Array(bytes);
  let at = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length > bytes) {
      await reader.cancel().catch(() => {});
      throw new BundleError(`${where} has more than ${bytes.toLocaleString("en")} bytes; copy the bundle again`);
    }
    data.set(part.value, at);
    at += part.value.length;
  }
  return at === bytes ? data : data.slice(0, at);
}

/** @param {string} location a path, or a file: URL @returns {Promise<Source>} */
async function onDisk(location) {
  const [{ lstat, readFile }, { join }, { fileURLToPath }] = await Promise.all([
    import("node:fs/promises"),
    import("node:path"),
    import("node:url"),
  ]);
  const folder = /^file:/iu.test(location) ? fileURLToPath(location) : location;
  const found = await lstat(join(folder, ".")).catch(() => null); // with the dot: a link to a bundle is one
  if (!found) throw new UsageError(`${folder}: there is no such bundle`);
  if (!found.isDirectory()) throw new UsageError(`${folder}: is a file; a bundle is a folder`);
  /** @param {string} file */
  const name = (file) => join(folder, ...file.split("/"));
  return {
    where: folder,
    name,
    async read(file, bytes) {
      const place = name(file);
      const info = await lstat(place).catch(() => null);
      if (!info && file === MANIFEST) {
        throw new BundleError(`${folder}: there is no ${MANIFEST}, so the bundle is incomplete; export it again`);
      }
      if (!info) throw new BundleError(`${place} is missing; copy the bundle again or export it again`);
      if (!info.isFile()) throw new BundleError(`${place} is not a plain file; a bundle holds no links`);
      if (file === MANIFEST && info.size > bytes) throw new BundleError(`${place} is larger than ${bytes} bytes`);
      try {
        const data = await readFile(place);
        return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
      } catch (error) {
        throw new BundleError(`${place} cannot be read (${reason(error)})`);
      }
    },
  };
}
