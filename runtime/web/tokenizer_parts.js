/** The small steps in front of and behind a tokenizer's model, as tokenizer.json names them. */

/** @typedef {(text: string) => string} Normalizer */
/** @typedef {(text: string) => string[]} Cutter */
/** @typedef {(tokens: string[]) => string[]} Chain tokens → tokens, which are joined in the end */

/** GPT-2's bytes as letters: printable ones stand for themselves, the others for letters from U+0100 on. */
const LETTERS = (() => {
  const letters = /** @type {string[]} */ ([]);
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters.push(String.fromCodePoint(printable ? byte : next++));
  }
  return letters;
})();
const BYTES = new Map(LETTERS.map((letter, byte) => [letter, byte]));

/** How GPT-2 cuts text: contractions, and words, numbers and signs with the space before them. */
const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** Words (Rust's \w) and what is neither word nor space. */
const WHITESPACE = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d\s]+/gu;

/** @param {string} kind @param {any} tree @returns {never} */
function unknown(kind, tree) {
  throw new Error(`its ${kind} ${tree?.type} is not known here`);
}

/** A tokenizer's pattern: a plain text, or a regular expression. @param {any} pattern @param {string} [flags] */
function regex(pattern, flags = "gu") {
  const source = pattern.Regex ?? String(pattern.String).replace(/[\\^$.*+?()[\]{}|/-]/gu, String.raw`\$&`);
  return new RegExp(source.replaceAll("(?i:", "(?:"), source.includes("(?i:") ? `${flags}i` : flags);
}

/** @param {any} tree @returns {Normalizer} */
export function normalizerOf(tree) {
  switch (tree?.type) {
    case undefined:
      return (text) => text;
    case "Sequence": {
      const parts = /** @type {Normalizer[]} */ (tree.normalizers.map(normalizerOf));
      return (text) => parts.reduce((now, part) => part(now), text);
    }
    case "Lowercase":
      return (text) => text.toLowerCase();
    case "NFC":
    case "NFD":
    case "NFKC":
    case "NFKD":
      return (text) => text.normalize(tree.type);
    case "Prepend":
      return (text) => (text ? tree.prepend + text : text);
    case "Replace": {
      const pattern = regex(tree.pattern);
      return (text) => text.replace(pattern, () => tree.content);
    }
    case "Strip":
      return (text) => {
        const left = tree.strip_left ? text.trimStart() : text;
        return tree.strip_right ? left.trimEnd() : left;
      };
    default:
      return unknown("normalizer", tree);
  }
}

/** @param {any} tree @returns {Cutter} */
export function preTokenizerOf(tree) {
  switch (tree?.type) {
    case undefined:
      return (text) => [text];
    case "Sequence": {
      const parts = /** @type {Cutter[]} */ (tree.pretokenizers.map(preTokenizerOf));
      return (text) => parts.reduce((words, part) => words.flatMap(part), [text]);
    }
    case "WhitespaceSplit":
      return (text) => text.match(/\S+/gu) ?? [];
    case "Whitespace":
      return (text) => text.match(WHITESPACE) ?? [];
    case "Digits":
      return (text) => text.match(tree.individual_digits ? /\p{N}|\P{N}+/gu : /\p{N}+|\P{N}+/gu) ?? [];
    case "ByteLevel":
      return (text) => {
        const whole = tree.add_prefix_space && !text.startsWith(" ") ? ` ${text}` : text;
        const words = tree.use_regex === false ? [whole] : (whole.match(GPT2) ?? []);
        return words.map((word) => Array.from(new TextEncoder().encode(word), (byte) => LETTERS[byte]).join(""));
      };
    case "Metaspace":
      return metaspace(tree);
    case "Split": {
      const pattern = regex(tree.pattern);
      if (!["Isolated", "Removed"].includes(tree.behavior)) return unknown("Split", { type: tree.behavior });
      return (text) => {
        const parts = [];
        let at = 0;
        for (const { 0: found, index } of text.matchAll(pattern)) {
          // Inverted, what matches is the words, and what lies between them goes.
          parts.push(
            tree.invert ? "" : text.slice(at, index),
            tree.behavior === "Isolated" || tree.invert ? found : "",
          );
          at = index + found.length;
        }
        return [...parts, tree.invert ? "" : text.slice(at)].filter(Boolean);
      };
    }
    default:
      return unknown("pre-tokenizer", tree);
  }
}

/** @param {any} tree @returns {Cutter} */
function metaspace({ replacement, prepend_scheme: scheme = "always", split = true }) {
  return (text) => {
    let marked = text.replaceAll(" ", replacement);
    if (scheme !== "never" && !marked.startsWith(replacement)) marked = replacement + marked;
    if (!split) return [marked];
    const words = marked.split(replacement);
    return [words[0], ...words.slice(1).map((word) => replacement + word)].filter(Boolean);
  };
}

/** @param {any} tree @returns {(tokens: string[]) => string} */
export function decoderOf(tree) {
  const chain = chainOf(tree);
  return (tokens) => chain(tokens).join("");
}

/** @param {any} tree @returns {Chain} */
function chainOf(tree) {
  switch (tree?.type) {
    case "Sequence": {
      const parts = /** @type {Chain[]} */ (tree.decoders.map(chainOf));
      return (tokens) => parts.reduce((now, part) => part(now), tokens);
    }
    case "ByteLevel":
      return (tokens) => {
        const bytes = tokens.flatMap((token) => {
          const found = Array.from(token, (letter) => BYTES.get(letter));
          return found.every((byte) => byte !== undefined) ? found : [...new TextEncoder().encode(token)];
        });
        return [new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(/** @type {number[]} */ (bytes)))];
      };
    case "Metaspace":
      return (tokens) =>
        tokens.map((token, i) => {
          const spaces = i === 0 && (tree.prepend_scheme ?? "always") !== "never" ? "" : " ";
          return token.replaceAll(tree.replacement, spaces);
        });
    case "Strip":
      return (tokens) => tokens.map((token) => stripped(token, tree));
    case "Replace": {
      const pattern = regex(tree.pattern);
      return (tokens) => tokens.map((token) => token.replace(pattern, () => tree.content));
    }
    case "Fuse":
      return (tokens) => [tokens.join("")];
    case "ByteFallback":
      return byteFallback;
    default:
      return unknown("decoder", tree);
  }
}

/** @param {string} token @param {{ content: string, start: number, stop: number }} tree */
function stripped(token, { content, start, stop }) {
  let from = 0;
  let to = token.length;
  while (from < start && token[from] === content) from++;
  while (token.length - to < stop && to > from && token[to - 1] === content) to--;
  return token.slice(from, to);
}

/** Runs of <0x41> become what their bytes spell. @type {Chain} */
function byteFallback(tokens) {
  const found = [];
  let bytes = /** @type {number[]} */ ([]);
  const flush = () => {
    if (!bytes.length) return;
    try {
      found.push(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes)));
    } catch {
      found.push(..."\ufffd".repeat(bytes.length));
    }
    bytes = [];
  };
  for (const token of tokens) {
    const byte = /^<0x([0-9A-F]{2})>$/u.exec(token);
    if (byte) bytes.push(Number.parseInt(byte[1], 16));
    else {
      flush();
      found.push(token);
    }
  }
  flush();
  return found;
}
