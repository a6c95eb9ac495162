/** How photos are seen: preprocessing, and the frames they are cut into, as a budget of time allows (runtime/view.py). */

import { UsageError } from "./errors.js";
import { Framing } from "./framed.js";
import { Preprocess } from "./preprocess.js";

/** @typedef {import("./resample.js").Rgb} Rgb */
/** @typedef {import("./framed.js").Framed} Framed */

export class View {
  /**
   * @param {Preprocess} preprocess photo → pixels
   * @param {Framing | null} framing what these are cut into
   * @param {boolean} oneSide the vision graph takes frames of framing.side alone
   */
  constructor(preprocess, framing, oneSide) {
    this.preprocess = preprocess;
    this.framing = framing;
    this.oneSide = oneSide;
  }

  /** As a bundle says. @param {import("./manifest.js").Manifest} manifest @throws {UsageError} for bad frames */
  static of({ preprocess, frames, tokens, graphs }) {
    const framing = frames ? Framing.of(frames, tokens.vocab_size) : null;
    const [pixels] = Object.values(graphs.encoder.inputs);
    return new View(
      new Preprocess(preprocess),
      framing,
      pixels.shape.slice(1, 3).some((side) => typeof side === "number"),
    );
  }

  /**
   * The same with frames of `side` pixels, split into tiles or not; undefined: as it is, but a smaller side alone means
   * no tiles: there would be more of them.
   * @param {number} [side]
   * @param {boolean} [tiles]
   * @throws {UsageError} for what the model does not take
   */
  within(side, tiles) {
    if (side === undefined && tiles === undefined) return this;
    const { framing, preprocess } = this;
    if (!framing) throw new UsageError("this captioner sees photos in one size: leave imageSize and tiles out");
    if (side !== undefined && !Number.isInteger(side)) {
      throw new UsageError(`imageSize must be a whole number of pixels, not ${JSON.stringify(side)}`);
    }
    if (tiles !== undefined && typeof tiles !== "boolean") {
      throw new UsageError(`tiles must be true or false, not ${JSON.stringify(tiles)}`);
    }
    if (this.oneSide && side !== undefined && side !== framing.side) {
      throw new UsageError(`this captioner sees frames of ${framing.side} px alone: leave imageSize out`);
    }
    const split = tiles ?? (framing.split && !(side !== undefined && side < framing.side));
    const squashed = preprocess.mode !== "keep";
    if (split && !framing.split && (squashed || !framing.prompt.tiles.length)) {
      throw new UsageError("this captioner did not learn photos in tiles: leave tiles out");
    }
    const chosen = framing.at(side ?? framing.side, split);
    const known = Math.min(framing.prompt.tiles.length, framing.prompt.tiles[0]?.length ?? 0);
    if (chosen.most > known) {
      throw new UsageError(
        `photos would become ${chosen.most} tiles a side, more than this captioner has words for: a larger imageSize, or ` +
          "tiles: false",
      );
    }
    if (!squashed) return new View(preprocess, chosen, this.oneSide);
    const count = split ? Math.floor(preprocess.height / framing.side) : 1; // squashed to what is then cut
    const size = [count * chosen.side, count * chosen.side];
    return new View(new Preprocess({ ...preprocess, size }), chosen, this.oneSide);
  }

  /** A photo as the encoder takes it. @param {Rgb} photo @returns {Rgb | Framed} */
  see(photo) {
    const pixels = this.preprocess.apply(photo);
    return this.framing ? this.framing.cut(pixels) : pixels;
  }
}
