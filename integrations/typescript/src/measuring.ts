/** From losses to projected gradients (docs/protocol.md, section 7). */
import { addPairs } from "./arithmetic.js";
import type { Manifest } from "./manifest.js";
import type { Distribution } from "./noise.js";
import { fromBits, toBits } from "./noise.js";

/** The exact sum of binary64 numbers, rounded once (Shewchuk's partial sums). */
export function exactSum(values: readonly number[]): number {
  const partials: number[] = [];
  for (const value of values) {
    let x = value;
    let kept = 0;
    for (let y of partials) {
      if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
      const high = x + y;
      const low = y - (high - x);
      if (low !== 0) partials[kept++] = low;
      x = high;
    }
    partials.length = kept;
    partials.push(x);
  }
  let high = 0;
  let low = 0;
  let n = partials.length;
  while (n > 0 && low === 0) {
    const x = high;
    const y = partials[--n];
    high = x + y;
    low = y - (high - x);
  }
  // Half-way cases: what lies below decides in which direction to round.
  if (n > 0 && low !== 0 && Math.sign(low) === Math.sign(partials[n - 1])) {
    const doubled = low * 2;
    const candidate = high + doubled;
    if (doubled === candidate - high) high = candidate;
  }
  return high;
}

/** The largest binary32 number that is at most `limit`, which is above 0. */
export function largestBinary32(limit: number): number {
  const nearest = Math.fround(limit);
  return nearest <= limit ? nearest : fromBits(toBits(nearest) - 1);
}

/** Binary32 of a quotient of loss differences, clamped to the run's limit. */
export function projectedGrad(difference: number, distance: number, limit: number): number {
  const bound = largestBinary32(limit);
  return Math.max(-bound, Math.min(bound, Math.fround(difference / distance)));
}

/** Weights moved by `step * z(seed)`: where a probe's loss is measured. */
export function movedWeights(
  weights: readonly Float32Array[],
  manifest: Manifest,
  distribution: Distribution,
  seed: bigint,
  step: number,
): Float32Array[] {
  return manifest.tensors.map(({ tensorId, columns }) => {
    const values = weights[tensorId].slice();
    addPairs(values, { tensorId, columns }, distribution, [{ seed, coefficient: step }]);
    return values;
  });
}

/** Cross-entropy of the right class, in nats. */
export function rowLoss(logits: readonly number[], label: number): number {
  const largest = Math.max(...logits);
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - largest), 0);
  return Math.log(sum) - (logits[label] - largest);
}

export interface MeasurementPlan {
  readonly firstSeed: bigint;
  /** Offsets of the probes' seeds; empty: 0, 1, 2, ... */
  readonly seedOffsets: readonly number[];
  readonly probes: number;
  readonly eps: number;
  readonly oneSided: boolean;
  readonly projectedGradAbsMax: number;
}

export interface Measurement {
  readonly projectedGrads: readonly number[];
  readonly meanLoss: number;
}

/** Mean loss of the step's batch at weights in manifest order, in nats. */
export type LossAt = (weights: readonly Float32Array[]) => Promise<number>;

/** A loss was NaN or infinite, so there is no answer. */
export class LossError extends Error {
  override name = "LossError";
}

/**
 * Measures one step. `wanted` is asked before each loss: a false one cuts the measurement short.
 */
export async function measure(
  plan: MeasurementPlan,
  weights: readonly Float32Array[],
  manifest: Manifest,
  distribution: Distribution,
  lossAt: LossAt,
  wanted: () => boolean,
): Promise<Measurement | undefined> {
  const step = Math.fround(plan.eps);
  const grads: number[] = [];
  const losses: number[] = [];
  const finite = async (at: readonly Float32Array[]): Promise<number> => {
    const loss = await lossAt(at);
    if (!Number.isFinite(loss)) throw new LossError(`the loss is ${loss}`);
    return loss;
  };
  if (!wanted()) return undefined;
  const middle = plan.oneSided ? await finite(weights) : 0;
  for (let probe = 0; probe < plan.probes; probe++) {
    const seed = plan.firstSeed + BigInt(plan.seedOffsets[probe] ?? probe);
    const at = (signedStep: number): Float32Array[] =>
      movedWeights(weights, manifest, distribution, seed, signedStep);
    if (!wanted()) return undefined;
    const plus = await finite(at(step));
    if (plan.oneSided) {
      grads.push(projectedGrad(plus - middle, plan.eps, plan.projectedGradAbsMax));
      losses.push(middle);
    } else {
      if (!wanted()) return undefined;
      const minus = await finite(at(-step));
      grads.push(projectedGrad(plus - minus, 2 * plan.eps, plan.projectedGradAbsMax));
      losses.push((plus + minus) / 2);
    }
  }
  return { projectedGrads: grads, meanLoss: Math.fround(exactSum(losses) / losses.length) };
}
