/**
 * Antialiased resampling of 8-bit RGB, equal to Pillow's byte by byte.
 *
 * What Pillow does: the filter is stretched by the scale where the picture shrinks; its weights are normalised in
 * doubles, then rounded to fixed point with 22 bits behind the point (32 bits less 8 of a pixel and 2 for overshoot);
 * rows and columns come one after the other, each sum rounded and clipped to 8 bits.
 * A box's sides are 32-bit floats.
 */

const BITS = 32 - 8 - 2;
const HALF = 1 << (BITS - 1);

/** @param {number} x */
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

/** Filters: how far they reach, and their weight at x. */
const FILTERS = {
  bilinear: { reach: 1, at: (/** @type {number} */ x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { reach: 2, at: (/** @type {number} */ x) => cubic(Math.abs(x), -0.5) },
  lanczos: { reach: 3, at: (/** @type {number} */ x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** Keys' cubic convolution. @param {number} x from 0 @param {number} a */
function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** @typedef {keyof typeof FILTERS} Resample */
/** @typedef {{ data: Uint8Array, width: number, height: number }} Rgb RGB, three bytes a pixel, row by row */

/** @param {string} name @returns {name is Resample} */
export const isResample = (name) => Object.hasOwn(FILTERS, name);

/**
 * @param {Rgb} image
 * @param {number} width of the result
 * @param {number} height of the result
 * @param {Resample} filter
 * @param {[number, number, number, number]} [box] left, top, right, bottom: the part to take, all of it by default
 * @returns {Rgb}
 */
export function resize(image, width, height, filter, box = [0, 0, image.width, image.height]) {
  const [left, top, right, bottom] = box.map(Math.fround);
  const across = width !== image.width || left !== 0 || right !== width;
  const down = height !== image.height || top !== 0 || bottom !== height;
  const columns = weights(image.width, left, right, width, filter);
  const rows = weights(image.height, top, bottom, height, filter);

  let { data } = image;
  if (across && down && verticalFirst(image, width, height)) {
    data = alongColumns(data, 0, image.width, height, rows);
    data = alongRows({ data, width: image.width, height }, 0, height, width, columns);
    return { data, width, height };
  }
  let first = 0; // of the rows that the second pass reads
  if (across) {
    first = down ? rows.from[0] : 0;
    const last = down ? rows.from[height - 1] + rows.count[height - 1] : image.height;
    data = alongRows(image, first, last, width, columns);
  }
  if (down) data = alongColumns(data, first, width, height, rows);
  return { data: data === image.data ? data.slice() : data, width, height };
}

/**
 * Pillow 13's order of the passes (its pull request 9549; earlier ones always begin with the rows): columns first where
 * much more is taken from the height than from the width. In between is 8-bit, so the order shows in single grey levels.
 * @param {Rgb} image
 * @param {number} width
 * @param {number} height
 */
function verticalFirst(image, width, height) {
  return image.height > height && image.height - height > 2 * (image.width - width);
}

/**
 * Which source pixels make each result pixel, and their weights in fixed point.
 * @param {number} size of the source
 * @param {number} low
 * @param {number} high
 * @param {number} count of the result
 * @param {Resample} filter
 */
function weights(size, low, high, count, filter) {
  const { reach, at } = FILTERS[filter];
  const scale = Math.fround(high - low) / count;
  const stretch = Math.max(scale, 1);
  const support = reach * stretch;
  const most = Math.ceil(support) * 2 + 1;
  const from = new Int32Array(count);
  const number = new Int32Array(count);
  const fixed = new Int32Array(count * most);
  const exact = new Float64Array(most);
  const shrink = 1 / stretch;
  for (let i = 0; i < count; i++) {
    const centre = low + (i + 0.5) * scale;
    const start = Math.max(Math.trunc(centre - support + 0.5), 0);
    const stop = Math.min(Math.trunc(centre + support + 0.5), size);
    let sum = 0;
    for (let k = 0; k < stop - start; k++) sum += exact[k] = at((k + start - centre + 0.5) * shrink);
    from[i] = start;
    number[i] = stop - start;
    for (let k = 0; k < stop - start; k++) {
      const weight = (sum ? exact[k] / sum : exact[k]) * (1 << BITS);
      fixed[i * most + k] = Math.trunc(weight + (weight < 0 ? -0.5 : 0.5));
    }
  }
  return { from, count: number, fixed, most };
}

/** @typedef {ReturnType<typeof weights>} Weights */

/** @param {number} sum in fixed point */
function clip(sum) {
  const value = sum >> BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/**
 * Rows first to last (not included) of the image, each brought to `width`.
 * @param {Rgb} image
 * @param {number} first
 * @param {number} last
 * @param {number} width
 * @param {Weights} columns
 */
function alongRows(image, first, last, width, { from, count, fixed, most }) {
  const { data } = image;
  const result = new Uint8Array((last - first) * width * 3);
  let to = 0;
  for (let y = first; y < last; y++) {
    const row = y * image.width * 3;
    for (let x = 0; x < width; x++) {
      let at = row + from[x] * 3;
      let red = HALF;
      let green = HALF;
      let blue = HALF;
      for (let k = x * most, end = k + count[x]; k < end; k++, at += 3) {
        const weight = fixed[k];
        red = (red + data[at] * weight) | 0;
        green = (green + data[at + 1] * weight) | 0;
        blue = (blue + data[at + 2] * weight) | 0;
      }
      result[to++] = clip(red);
      result[to++] = clip(green);
      result[to++] = clip(blue);
    }
  }
  return result;
}

/**
 * @param {Uint8Array} data rows of `width` pixels, the first of them row `first` of the source
 * @param {number} first
 * @param {number} width
 * @param {number} height
 * @param {Weights} rows
 */
function alongColumns(data, first, width, height, { from, count, fixed, most }) {
  const line = width * 3;
  const result = new Uint8Array(height * line);
  const sums = new Int32Array(line);
  for (let y = 0; y < height; y++) {
    sums.fill(HALF);
    for (let k = 0; k < count[y]; k++) {
      const weight = fixed[y * most + k];
      const at = (from[y] - first + k) * line;
      for (let x = 0; x < line; x++) sums[x] += data[at + x] * weight;
    }
    for (let x = 0; x < line; x++) result[y * line + x] = clip(sums[x]);
  }
  return result;
}
