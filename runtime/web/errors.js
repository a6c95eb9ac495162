/** The errors a user can cause: one line saying what is wrong, where, and what to do. */

/** A failure that is told in one line. */
export class EdgecapError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(String(message).split(/\s+/u).join(" ").trim());
    this.name = new.target.name;
  }
}

/** What was asked for cannot be done as asked (a bad argument or bundle). */
export class UsageError extends EdgecapError {}

/** A bundle that the loader refuses: incomplete, changed, unsafe or from a newer edgecap. */
export class BundleError extends UsageError {}

/**
 * The reason of any thrown value, short.
 * @param {unknown} error
 */
export function reason(error) {
  const text = error instanceof Error ? error.message : String(error);
  return text.split(/\s+/u).join(" ").slice(0, 300);
}
