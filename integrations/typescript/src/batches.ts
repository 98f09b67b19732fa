/** Which rows a worker measures in which round (docs/protocol.md, section 6, batches). */
import { sha256, u64le } from "./hashing.js";

const MASK = (1n << 64n) - 1n;
const WINDOW_BATCHES = 8;

/**
 * Words of Philox4x64-10 with the counter 1, 2, 3, ... BigInt will do: rows are drawn once a pass.
 */
export function* philox64(key: Uint8Array): Generator<bigint> {
  const bytes = Buffer.from(key);
  for (let counter = 1n; ; counter++) {
    let [k0, k1] = [bytes.readBigUInt64LE(0), bytes.readBigUInt64LE(8)];
    let [c0, c1, c2, c3] = [counter, 0n, 0n, 0n];
    for (let round = 0; round < 10; round++) {
      const product0 = 0xd2e7470ee14c6c93n * c0;
      const product2 = 0xca5a826395121157n * c2;
      [c0, c1, c2, c3] = [
        (product2 >> 64n) ^ c1 ^ k0,
        product2 & MASK,
        (product0 >> 64n) ^ c3 ^ k1,
        product0 & MASK,
      ];
      k0 = (k0 + 0x9e3779b97f4a7c15n) & MASK;
      k1 = (k1 + 0xbb67ae8584caa73bn) & MASK;
    }
    yield* [c0, c1, c2, c3];
  }
}

function sortedBy<Item, Key extends bigint | number>(
  items: readonly Item[],
  keys: readonly Key[],
): Item[] {
  const order = items.map((_, index) => index);
  order.sort((left, right) => (keys[left] < keys[right] ? -1 : keys[left] > keys[right] ? 1 : 0));
  return order.map((index) => items[index]);
}

/** The batches of one worker in one run. */
export class Batches {
  private readonly size: number;
  private readonly count: number;
  private pass:
    { readonly number: bigint; readonly batches: readonly (readonly number[])[] } | undefined;

  /** `tokenCounts`: tokens of each row's prompt and response, as they are measured. */
  constructor(
    private readonly runSeed: bigint,
    private readonly worker: string,
    batchSize: number,
    private readonly localSteps: number,
    private readonly tokenCounts: readonly number[],
  ) {
    if (tokenCounts.length === 0)
      throw new RangeError("There are no rows; a worker needs at least one.");
    this.size = Math.min(batchSize, tokenCounts.length);
    this.count = Math.floor(tokenCounts.length / this.size);
  }

  /** Row numbers of a step's batch. Rounds begin at 1, steps at 0. */
  rows(round: bigint, step: number): readonly number[] {
    const k = (round - 1n) * BigInt(this.localSteps) + BigInt(step);
    const number = k / BigInt(this.count);
    if (this.pass?.number !== number) this.pass = { number, batches: this.batchesOf(number) };
    return this.pass.batches[Number(k % BigInt(this.count))];
  }

  private batchesOf(pass: bigint): number[][] {
    const key = sha256(
      "fedmezo batches v1",
      Buffer.alloc(1),
      u64le(pass),
      u64le(this.runSeed),
      this.worker,
    );
    const words = philox64(key.subarray(0, 16));
    const take = (count: number): bigint[] =>
      Array.from({ length: count }, () => words.next().value as bigint);
    const { size, count, tokenCounts } = this;
    const kept = sortedBy([...tokenCounts.keys()], take(tokenCounts.length)).slice(0, size * count);
    const batches: number[][] = [];
    for (let start = 0; start < kept.length; start += WINDOW_BATCHES * size) {
      const rows = kept.slice(start, start + WINDOW_BATCHES * size);
      const window = sortedBy(
        rows,
        rows.map((row) => tokenCounts[row]),
      );
      for (let at = 0; at < window.length; at += size) batches.push(window.slice(at, at + size));
    }
    return sortedBy(batches, take(count));
  }
}
