/** Greedy and beam search over any session, one photo at a time: the tokens of runtime/decode.py, ties included. */

import { EdgecapError, UsageError } from "./errors.js";

const MAX_BEAM = 64;
const MAX_LENGTH = 4096;
const MAX_DEADLINE = 1e9;

/**
 * How to search, named as in bundle.json. Lengths count tokens after BOS and prompt; EOS is not counted.
 * Hypotheses are ranked by logprob / length ** length_penalty, where length counts EOS.
 * @typedef {{ beam: number, max_length: number, min_length: number, length_penalty: number, no_repeat_ngram: number,
 *   deadline_ms: number }} DecodeOptions
 */
/**
 * One caption: ids without BOS, prompt and EOS. logprob: sum of the model's log softmax over the ids, and over EOS when
 * it was emitted, before anything was suppressed. finished: EOS was emitted; cut: the deadline ended it.
 * @typedef {{ tokenIds: number[], logprob: number, score: number, finished: boolean, cut: boolean }} Hypothesis
 */
/**
 * @typedef {{ logits: Float32Array, rows: number, vocab: number }} Logits row by row
 * @typedef {{ step: (ids: number[], parents: number[]) => Promise<Logits> }} Stepper
 */

const DEFAULTS = { beam: 1, max_length: 24, min_length: 0, length_penalty: 0, no_repeat_ngram: 0, deadline_ms: 0 };

/**
 * @param {Record<string, unknown>} values
 * @returns {DecodeOptions}
 * @throws {UsageError} for unknown names and values out of range
 */
export function decodeOptions(values) {
  for (const name of Object.keys(values)) {
    if (!Object.hasOwn(DEFAULTS, name)) {
      throw new UsageError(`unknown decoding option "${name}"; there are ${Object.keys(DEFAULTS).join(", ")}`);
    }
  }
  const chosen = /** @type {DecodeOptions} */ ({ ...DEFAULTS, ...values });
  /** @type {[keyof DecodeOptions, number, number][]} */
  const whole = [
    ["beam", 1, MAX_BEAM],
    ["max_length", 1, MAX_LENGTH],
    ["min_length", 0, chosen.max_length],
    ["no_repeat_ngram", 0, MAX_LENGTH],
  ];
  for (const [name, low, high] of whole) {
    const value = chosen[name];
    if (!Number.isInteger(value) || value < low || value > high) {
      throw new UsageError(`${name} must be a whole number from ${low} to ${high}, not ${JSON.stringify(value)}`);
    }
  }
  for (const [name, high] of /** @type {const} */ ([
    ["length_penalty", 10],
    ["deadline_ms", MAX_DEADLINE],
  ])) {
    const value = chosen[name];
    if (typeof value !== "number" || !(value >= 0 && value <= high)) {
      throw new UsageError(`${name} must be a number from 0 to ${high}, not ${JSON.stringify(value)}`);
    }
  }
  return chosen;
}

/**
 * The ids that no caption holds: bos, pad and unk, but not a BOS that is a word.
 * @param {import("./manifest.js").Tokens} tokens
 */
export function neverSaid(tokens) {
  const names = tokens.bos_is_word ? [tokens.pad, tokens.unk] : [tokens.bos, tokens.pad, tokens.unk];
  return /** @type {number[]} */ ([...new Set(names)].filter((id) => id !== undefined && id !== tokens.eos));
}

/**
 * @param {Stepper} session begun: `logits` is what it gave
 * @param {Logits} logits of the one row
 * @param {DecodeOptions} options
 * @param {{ eos: number, suppress: number[], end?: number, check?: () => void, onStep?: (ids: number[]) => void }} rest
 *   end: the performance.now() of the deadline; check: throws where the caller wants no more; onStep: called with the
 *   tokens of the best hypothesis that lives on
 * @returns {Promise<Hypothesis[]>} up to options.beam, best first
 */
export async function decode(session, logits, options, { eos, suppress, end = Infinity, check, onStep }) {
  const rules = new Rules(options, eos, suppress, end, check ?? (() => {}), onStep ?? (() => {}));
  return options.beam === 1 ? [await greedy(session, logits, rules)] : beam(session, logits, rules);
}

/** @param {number} logprob @param {number} length @param {number} penalty */
const score = (logprob, length, penalty) => (length ? logprob / length ** penalty : logprob);

/** What may follow a history, shared by both searches. */
class Rules {
  /**
   * @param {DecodeOptions} options
   * @param {number} eos
   * @param {number[]} suppress
   * @param {number} end
   * @param {() => void} check
   * @param {(ids: number[]) => void} onStep
   */
  constructor(options, eos, suppress, end, check, onStep) {
    this.options = options;
    this.eos = eos;
    this.suppress = suppress;
    this.end = end;
    this.check = check;
    this.onStep = onStep;
  }

  get late() {
    return this.end < Infinity && performance.now() >= this.end;
  }

  /**
   * A row of logits → a copy less its largest, and log Σ exp of that: their difference is the log softmax.
   * @param {Logits} logits
   * @param {number} row
   * @returns {{ values: Float32Array, normaliser: number }}
   */
  shift({ logits, vocab }, row) {
    const values = logits.slice(row * vocab, (row + 1) * vocab);
    let top = -Infinity;
    for (const value of values) if (value > top || Number.isNaN(value)) top = value;
    let sum = 0;
    for (let i = 0; i < vocab; i++) {
      values[i] -= top;
      sum += Math.exp(values[i]);
    }
    const normaliser = Math.log(sum);
    if (!Number.isFinite(normaliser)) {
      throw new EdgecapError(
        "the model's output is not a number (NaN or infinity): its graph is broken, export it again",
      );
    }
    return { values, normaliser };
  }

  /** Set to -Infinity what may not follow. @param {Float32Array} values @param {number[]} history */
  ban(values, history) {
    for (const id of this.suppress) values[id] = -Infinity;
    const { min_length, no_repeat_ngram: n } = this.options;
    if (history.length < min_length) values[this.eos] = -Infinity;
    if (n < 1 || n > history.length) return;
    const last = history.slice(history.length - n + 1);
    for (let at = 0; at + n <= history.length; at++) {
      if (last.every((id, i) => history[at + i] === id)) values[history[at + n - 1]] = -Infinity;
    }
  }
}

/** The first of the largest. @param {Float32Array} values */
function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** @param {Stepper} session @param {Logits} logits @param {Rules} rules @returns {Promise<Hypothesis>} */
async function greedy(session, logits, rules) {
  const { max_length, length_penalty } = rules.options;
  const tokenIds = /** @type {number[]} */ ([]);
  let logprob = 0;
  /** @param {boolean} finished @param {boolean} [cut] */
  const close = (finished, cut = false) => {
    return {
      tokenIds,
      logprob,
      score: score(logprob, tokenIds.length + Number(finished), length_penalty),
      finished,
      cut,
    };
  };
  for (let length = 0; ; length++) {
    const { values, normaliser } = rules.shift(logits, 0);
    rules.ban(values, tokenIds);
    const token = argmax(values);
    const gain = values[token] - normaliser;
    if (gain === -Infinity) return close(false); // nothing may follow
    logprob += gain;
    if (token === rules.eos) return close(true);
    tokenIds.push(token);
    rules.onStep(tokenIds);
    if (length + 1 === max_length) return close(false);
    if (rules.late) return close(false, true);
    rules.check();
    logits = await session.step([token], [0]);
  }
}

/**
 * Beam search with a pool of the best finished hypotheses (as in transformers with early_stopping=False).
 *
 * Of the best 2·beam continuations, those in the first `beam` places that end go to the pool and the first `beam` that
 * do not end live on. The search is done when the pool is full and the best live hypothesis would, at its present length,
 * not enter it.
 * @param {Stepper} session
 * @param {Logits} logits
 * @param {Rules} rules
 * @returns {Promise<Hypothesis[]>}
 */
async function beam(session, logits, rules) {
  const { beam: width, max_length, length_penalty: penalty } = rules.options;
  let pool = /** @type {Hypothesis[]} */ ([]);
  let live = [{ tokenIds: /** @type {number[]} */ ([]), total: 0 }];
  for (let length = 0; ; length++) {
    const longest = length + 1 === max_length;
    const cut = !longest && rules.late;
    const rows = live.map(({ tokenIds, total }, row) => {
      const { values, normaliser } = rules.shift(logits, row);
      rules.ban(values, tokenIds);
      return { values, offset: total - normaliser };
    });
    const alive = /** @type {{ total: number, row: number, token: number }[]} */ ([]);
    best(rows, 2 * width).forEach((each, rank) => {
      const { total, row, token } = each;
      const ends = token === rules.eos;
      if (!ends) alive.push(each);
      if (rank < width && (longest || cut || ends)) {
        const tokenIds = ends ? live[row].tokenIds : [...live[row].tokenIds, token];
        pool.push({
          tokenIds,
          logprob: total,
          score: score(total, length + 1, penalty),
          finished: ends,
          cut: cut && !ends,
        });
      }
    });
    if (!alive.length && !pool.length)
      pool = live.map((each) => stuck(each, penalty)).filter((each) => each.logprob > -Infinity);
    pool.sort((a, b) => b.score - a.score); // stable: earlier finds stay first
    pool.length = Math.min(pool.length, width);
    if (longest || cut || !alive.length) return pool;
    if (pool.length === width && score(alive[0].total, length + 1, penalty) <= pool[width - 1].score) return pool;
    // Beams that do not exist (a vocabulary smaller than the beam) are filled up at -Infinity.
    while (alive.length < width) alive.push({ ...alive[0], total: -Infinity });
    alive.length = width;
    const parents = alive.map(({ row }) => row);
    live = alive.map(({ total, row, token }) => ({ tokenIds: [...live[row].tokenIds, token], total }));
    rules.onStep(live[0].tokenIds);
    rules.check();
    logits = await session.step(
      live.map(({ tokenIds }) => tokenIds[length]),
      parents,
    );
  }
}

/**
 * A live hypothesis that nothing may follow.
 * @param {{ tokenIds: number[], total: number }} live
 * @param {number} penalty
 */
const stuck = ({ tokenIds, total }, penalty) => {
  return { tokenIds, logprob: total, score: score(total, tokenIds.length, penalty), finished: false, cut: false };
};

/**
 * The `count` largest of all rows' values + offset, best first; ties go to the lower row, then the lower token. What is
 * found is taken out of `values`.
 * @param {{ values: Float32Array, offset: number }[]} rows
 * @param {number} count
 */
function best(rows, count) {
  const tops = rows.map(({ values }) => argmax(values));
  const sums = rows.map(({ values, offset }, row) => values[tops[row]] + offset);
  const found = [];
  while (found.length < count) {
    let row = 0;
    for (let i = 1; i < sums.length; i++) if (sums[i] > sums[row]) row = i;
    if (!(sums[row] > -Infinity)) break;
    const { values, offset } = rows[row];
    found.push({ total: sums[row], row, token: tops[row] });
    values[tops[row]] = -Infinity;
    tops[row] = argmax(values);
    sums[row] = values[tops[row]] + offset;
  }
  return found;
}
