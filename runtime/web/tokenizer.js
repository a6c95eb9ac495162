/**
 * tokenizer.json (of Hugging Face's tokenizers) as far as captioners use it: words, byte-level BPE and Unigram.
 * BOS, EOS and the rest are never added here: they belong to session and decoder.
 */

import { BundleError, reason } from "./errors.js";
import { decoderOf, normalizerOf, preTokenizerOf } from "./tokenizer_parts.js";

// Words as captions are learnt: "don't" is "do n't", "dog's" is "dog 's"; "t-shirt" and "2.5" stay whole.
const Z = String.raw`[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]`; // its spaces
const W = String.raw`[\p{L}\p{N}_]`; // Python's \w
const WORD = new RegExp(
  String.raw`n't(?!${W})|'(?:s|re|ve|ll|d|m)(?!${W})|${W}+?(?=n't(?!${W}))|(?<!${W})can(?=not(?!${W}))|${W}+(?:[-.,/]${W}+)*|[#&]`,
  "gu",
);

/** Leading and trailing spaces as Python strips them. */
const SPACES = new RegExp(String.raw`^${Z}+|${Z}+$`, "gu");

/** A token that is one byte, of which several make a character. */
const BYTE = /^<0x[0-9A-F]{2}>$/u;

/** Text in the form captions are learnt in: lower case, single spaces, no punctuation. @param {string} text */
export function plainWords(text) {
  return (text.toLowerCase().replaceAll("’", "'").match(WORD) ?? []).join(" ");
}

export class Tokenizer {
  /** @type {string[]} */ #tokens = [];
  /** @type {Set<number>} */ #special = new Set();
  /** @type {Map<string, number>} */ #added = new Map();
  /** @type {any} */ #tree;
  /** @type {((text: string) => number[]) | undefined} */ #encode;

  /**
   * @param {Uint8Array} data tokenizer.json
   * @param {string} where for messages
   * @throws {BundleError} if it is none, or of a kind that is not known here
   */
  constructor(data, where) {
    this.where = where;
    try {
      this.#tree = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
      const { model, added_tokens: added = [], decoder } = this.#tree;
      this.#vocab = idsOf(model);
      for (const [token, id] of this.#vocab) this.#tokens[id] = token;
      for (const { id, content, special } of added) {
        this.#tokens[id] = content;
        this.#added.set(content, id);
        if (special) this.#special.add(id);
      }
      this.#join = decoder ? decoderOf(decoder) : (tokens) => tokens.join(" ");
    } catch (error) {
      throw new BundleError(`${where} is not a tokenizer that is known here: ${reason(error)}`);
    }
  }

  /** @type {Map<string, number>} */ #vocab;
  /** @type {(tokens: string[]) => string} */ #join;

  /** Text of `ids`; special tokens are skipped. @param {Iterable<number>} ids */
  decode(ids) {
    const tokens = [];
    for (const id of ids) if (!this.#special.has(id) && this.#tokens[id] !== undefined) tokens.push(this.#tokens[id]);
    return this.#join(tokens).replace(SPACES, "");
  }

  /** Their text while more may follow: without the beginning of a character at its end. @param {number[]} ids */
  settled(ids) {
    let end = ids.length;
    while (end && BYTE.test(this.#tokens[ids[end - 1]] ?? "")) end -= 1;
    return this.decode(ids.slice(0, end))
      .replace(/\ufffd+$/u, "")
      .replace(SPACES, "");
  }

  /**
   * Ids of `text`, without BOS or EOS.
   * @param {string} text
   * @returns {number[]}
   */
  encode(text) {
    try {
      this.#encode ??= this.#encoder();
      return this.#encode(text);
    } catch (error) {
      throw new BundleError(`${this.where} cannot encode a prompt here: ${reason(error)}`);
    }
  }

  #encoder() {
    const { normalizer, pre_tokenizer: cutter, model } = this.#tree;
    const normalized = normalizerOf(normalizer);
    const cut = preTokenizerOf(cutter);
    const idsOfWord = modelOf(model, this.#vocab);
    // Added tokens stand for themselves wherever they are written, the longest first.
    const written = [...this.#added.keys()].sort((a, b) => b.length - a.length).map(escaped);
    const split = written.length ? new RegExp(`(${written.join("|")})`, "u") : null;
    return (/** @type {string} */ text) => {
      const parts = split ? text.split(split) : [text];
      return parts.flatMap((part, i) => {
        if (!part) return [];
        if (i % 2) return [/** @type {number} */ (this.#added.get(part))];
        return cut(normalized(part)).flatMap(idsOfWord);
      });
    };
  }
}

/** @param {string} text */
const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/-]/gu, String.raw`\$&`);

/** A model's vocabulary. @param {any} model @returns {Map<string, number>} */
function idsOf({ type, vocab }) {
  if (type === "Unigram")
    return new Map(vocab.map((/** @type {[string, number]} */ [token], /** @type {number} */ id) => [token, id]));
  if (type !== "WordLevel" && type !== "BPE") throw new Error(`its model is ${type}, not WordLevel, BPE or Unigram`);
  return new Map(Object.entries(vocab));
}

/**
 * A word → its ids.
 * @param {any} model
 * @param {Map<string, number>} vocab
 * @returns {(word: string) => number[]}
 */
function modelOf(model, vocab) {
  if (model.type === "Unigram") return unigram(model);
  const unknown = vocab.get(model.unk_token);
  if (model.type === "BPE") return bpe(model, vocab, unknown);
  return (word) => {
    const id = vocab.get(word) ?? unknown;
    return id === undefined ? [] : [id];
  };
}

/**
 * Byte-pair encoding (Sennrich et al. 2016): the neighbours that were merged first in training are merged first.
 * @param {any} model
 * @param {Map<string, number>} vocab
 * @param {number | undefined} unknown
 */
function bpe(
  { merges, continuing_subword_prefix: prefix, end_of_word_suffix: suffix, byte_fallback: bytes, ignore_merges: whole },
  vocab,
  unknown,
) {
  if (prefix || suffix) throw new Error("its BPE marks where words continue or end");
  const ranks = new Map(
    merges.map((/** @type {any} */ pair, /** @type {number} */ rank) => [
      typeof pair === "string" ? pair : pair.join(" "),
      rank,
    ]),
  );
  return (/** @type {string} */ word) => {
    const known = whole ? vocab.get(word) : undefined;
    if (known !== undefined) return [known];
    const parts = [...word];
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts.flatMap((part) => {
      const id = vocab.get(part);
      if (id !== undefined) return [id];
      const spelt = bytes ? Array.from(new TextEncoder().encode(part), (byte) => vocab.get(`<0x${hex(byte)}>`)) : [];
      if (spelt.length && spelt.every((each) => each !== undefined)) return /** @type {number[]} */ (spelt);
      return unknown === undefined ? [] : [unknown];
    });
  };
}

/** @param {number} byte */
const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

/**
 * The likeliest cut of a word into pieces (Kudo 2018), by Viterbi. What no piece covers is unknown, 10 below the
 * least likely piece; unknowns that follow each other are one.
 * @param {any} model
 */
function unigram({ vocab, unk_id: unknown }) {
  const pieces = new Map(
    vocab.map((/** @type {[string, number]} */ [piece, gain], /** @type {number} */ id) => [piece, { gain, id }]),
  );
  let longest = 1;
  let least = Infinity;
  for (const [piece, gain] of vocab) {
    longest = Math.max(longest, [...piece].length);
    least = Math.min(least, gain);
  }
  return (/** @type {string} */ word) => {
    const letters = [...word];
    const best = [{ gain: 0, from: -1, id: -1 }];
    for (let end = 1; end <= letters.length; end++) {
      let found = { gain: -Infinity, from: -1, id: -1 };
      for (let from = Math.max(0, end - longest); from < end; from++) {
        const piece = pieces.get(letters.slice(from, end).join(""));
        const gain = piece ? piece.gain : from === end - 1 ? least - 10 : -Infinity;
        if (best[from].gain + gain > found.gain)
          found = { gain: best[from].gain + gain, from, id: piece ? piece.id : unknown };
      }
      best.push(found);
    }
    const ids = [];
    for (let end = letters.length; end > 0; end = best[end].from) {
      const { id } = best[end];
      if (id === null || id === undefined) throw new Error("it has no token for what it does not know");
      if (id !== unknown || ids.at(-1) !== unknown) ids.push(id);
    }
    return ids.reverse();
  };
}
