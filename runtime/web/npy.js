/** NumPy's .npy files of floats: what a bundle's golden logits are written in. */

/**
 * @param {Uint8Array} bytes
 * @returns {{ data: Float64Array, shape: number[] }} C order
 * @throws {Error} for anything else
 */
export function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const magic = String.fromCharCode(...bytes.subarray(1, 6));
  if (bytes.length < 12 || bytes[0] !== 0x93 || magic !== "NUMPY") throw new Error("not a NumPy array");
  const short = bytes[6] === 1;
  const begin = short ? 10 : 12;
  const end = begin + (short ? view.getUint16(8, true) : view.getUint32(8, true));
  const header = new TextDecoder("latin1").decode(bytes.subarray(begin, end));
  const kind = /'descr': *'<f([248])'/u.exec(header);
  const shape = /'shape': *\(([\d, ]*)\)/u.exec(header);
  if (!kind || !shape || /'fortran_order': *True/u.test(header)) throw new Error("not an array of floats in C order");
  const size = Number(kind[1]);
  const sizes = shape[1]
    .split(",")
    .filter((each) => each.trim())
    .map(Number);
  const count = sizes.reduce((product, each) => product * each, 1);
  if (bytes.length !== end + count * size) throw new Error("its size is not what its header says");
  const data = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const at = end + i * size;
    data[i] =
      size === 4 ? view.getFloat32(at, true) : size === 8 ? view.getFloat64(at, true) : half(view.getUint16(at, true));
  }
  return { data, shape: sizes };
}

/** A 16-bit float's value. @param {number} bits */
export function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}
