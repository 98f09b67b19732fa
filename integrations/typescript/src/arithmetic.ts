/** Arithmetic standard v1 for binary32 tensors: every party's weights have the same bits. */
import { fillDirection, type Distribution } from "./noise.js";

/** A direction's seed, and what the direction is multiplied by (a binary32 number). */
export interface Pair {
  readonly seed: bigint;
  readonly coefficient: number;
}

/** What a tensor's directions depend on, apart from the seed. */
export interface Placement {
  /** Place in the manifest. */
  readonly tensorId: number;
  /** Length of the last dimension. */
  readonly columns: number;
}

/** Adds `coefficient * z(seed)` for each pair in order, in place: two roundings for each pair. */
export function addPairs(
  values: Float32Array,
  placement: Placement,
  distribution: Distribution,
  pairs: readonly Pair[],
): void {
  const z = new Float32Array(values.length);
  for (const { seed, coefficient } of pairs) {
    fillDirection(distribution, seed, placement.tensorId, placement.columns, z);
    // A store into a Float32Array rounds to binary32, as Math.fround does.
    for (let i = 0; i < values.length; i++) values[i] = values[i] + Math.fround(coefficient * z[i]);
  }
}

/** Applies a commit to a tensor in place: its decay, then its pairs. */
export function applyCommit(
  values: Float32Array,
  placement: Placement,
  distribution: Distribution,
  decay: number,
  pairs: readonly Pair[],
): void {
  if (decay !== 1) for (let i = 0; i < values.length; i++) values[i] = values[i] * decay;
  addPairs(values, placement, distribution, pairs);
}
