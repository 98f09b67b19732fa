/** Noise standard v1 (docs/noise-standard-v1.md): the same z(seed, tensor, element) everywhere. */

export type Distribution = "rademacher" | "gaussian" | "low_rank_1" | "low_rank_2" | "low_rank_4";

const DOMAIN = { rademacher: 1, gaussian: 2, rowSigns: 4, columnSigns: 5 } as const;
type Domain = (typeof DOMAIN)[keyof typeof DOMAIN];

/** Elements of a row: what one slot of 32 consecutive blocks gives. */
const ROW = 128;
const SIGN_SLOTS = 8;
const RADEMACHER_SLOTS = 32;

/** High half of the product of two unsigned 32-bit numbers. */
function multiplyHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const low = aHigh * bLow + (Math.imul(aLow, bLow) >>> 16);
  const middle = aLow * bHigh + (low & 0xffff);
  return aHigh * bHigh + (low >>> 16) + (middle >>> 16);
}

/** One block of Philox4x32-10: four unsigned words into `out` at `at`, `at + step`, ... */
export function philox(
  seed: readonly [low: number, high: number],
  counter: readonly [number, number, number, number],
  out: Uint32Array,
  at = 0,
  step = 1,
): void {
  let [k0, k1] = seed;
  let [c0, c1, c2, c3] = counter;
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(0xd2511f53, c0);
    const low0 = Math.imul(0xd2511f53, c0) >>> 0;
    const high2 = multiplyHigh(0xcd9e8d57, c2);
    const low2 = Math.imul(0xcd9e8d57, c2) >>> 0;
    c0 = (high2 ^ c1 ^ k0) >>> 0;
    c1 = low2;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  out[at] = c0;
  out[at + step] = c1;
  out[at + 2 * step] = c2;
  out[at + 3 * step] = c3;
}

/** Low and high half of a seed. */
export function halves(seed: bigint): [number, number] {
  return [Number(seed & 0xffffffffn), Number(seed >> 32n)];
}

/**
 * Words of one seed, tensor and domain. A group of 32 blocks has one word for each of 128 columns.
 */
class Words {
  private readonly seed: [number, number];
  private readonly group = new Uint32Array(ROW);
  private filled = -1;

  constructor(
    seed: bigint,
    private readonly tensorId: number,
    private readonly domain: Domain,
  ) {
    this.seed = halves(seed);
  }

  /** The words of a group's columns, of which only the first `columns` need be right. */
  of(group: number, columns = ROW): Uint32Array {
    if (group === this.filled) return this.group;
    for (let i = 0; i < Math.min(32, columns); i++) {
      const block = group * 32 + i;
      const counter = [
        block >>> 0,
        Math.floor(block / 2 ** 32),
        this.tensorId,
        this.domain,
      ] as const;
      philox(this.seed, counter, this.group, i, 32);
    }
    this.filled = group;
    return this.group;
  }
}

const floatCell = new Float32Array(1);
const bitsCell = new Uint32Array(floatCell.buffer);

export function fromBits(bits: number): number {
  bitsCell[0] = bits;
  return floatCell[0];
}

export function toBits(value: number): number {
  floatCell[0] = value;
  return bitsCell[0];
}

const [L0, L1, L2, L3, L4, L5, L6, L7, L8] = [
  0xc0000000, 0x3f7ffffd, 0xbf2aab7a, 0x3f00024d, 0xbecc6960, 0x3ea9ae98, 0xbe98c293, 0x3e92824d,
  0xbe32e3b3,
].map(fromBits);
const [S0, S1, S2, S3] = [0x3f490fdb, 0xbda55ddd, 0x3b232f49, 0xb816c981].map(fromBits);
const [C0, C1, C2, C3] = [0x3f800000, 0xbe9de9ce, 0x3c81d848, 0xb9a74225].map(fromBits);
const TWO_LN2 = fromBits(0x3fb17218);

/**
 * Rounds one operation's exact result to binary32. A sum, product or root of binary32 numbers that
 * JavaScript computes in binary64 and rounds again has the bits of the operation in binary32.
 */
const f = Math.fround;

/** Box-Muller in binary32: the words of two columns become the values of these columns. */
function gaussianPair(words: Uint32Array, out: Float32Array, first: number, second: number): void {
  const a = words[first];
  const b = words[second];
  const n = ((a >>> 1) | 1) >>> 0;
  const s = (toBits(n) + 0x004afb0d) >>> 0;
  const exponent = 158 - (s >>> 23);
  const mantissa = fromBits((s & 0x007fffff) + 0x3f3504f3);
  const x = f(mantissa - 1);
  const x2 = f(x * x);
  const x4 = f(x2 * x2);
  const low = f(f(f(x * L1) + L0) + f(x2 * f(f(x * L3) + L2)));
  const high = f(f(f(x * L5) + L4) + f(x2 * f(f(f(x * L7) + L6) + f(x2 * L8))));
  const radius = f(Math.sqrt(f(f(exponent * TWO_LN2) + f(x * f(low + f(x4 * high))))));
  const y = f(f((b << 2) | 2) * 2 ** -31);
  const y2 = f(y * y);
  const sine = f(y * f(S0 + f(y2 * f(S1 + f(y2 * f(S2 + f(y2 * S3)))))));
  let cosine = f(C0 + f(y2 * f(C1 + f(y2 * f(C2 + f(y2 * C3))))));
  if (b & 0x40000000) cosine = -cosine;
  const p = f(radius * cosine);
  const q = f(radius * sine);
  const swapped = (b & 0x80000000) !== 0;
  out[first] = swapped ? q : p;
  out[second] = swapped ? p : q;
}

function fillRademacher(words: Words, first: number, out: Float32Array): void {
  for (let i = 0; i < out.length; i++) {
    const row = Math.floor((first + i) / ROW);
    const word = words.of(Math.floor(row / RADEMACHER_SLOTS))[(first + i) % ROW];
    out[i] = (word >>> (31 - (row % RADEMACHER_SLOTS))) & 1 ? -1 : 1;
  }
}

function fillGaussian(words: Words, first: number, out: Float32Array): void {
  const values = new Float32Array(ROW);
  let filled = -1;
  for (let i = 0; i < out.length; i++) {
    const row = Math.floor((first + i) / ROW);
    if (row !== filled) {
      const group = words.of(row);
      for (let block = 0; block < 32; block++) {
        gaussianPair(group, values, block, 32 + block);
        gaussianPair(group, values, 64 + block, 96 + block);
      }
      filled = row;
    }
    out[i] = values[(first + i) % ROW];
  }
}

/** Four signs of each of `count` indices from `first` on, as 4 bits, the first sign highest. */
function signs(words: Words, first: number, count: number): Uint8Array {
  const out = new Uint8Array(count);
  // A short dimension needs only a few of the group's blocks.
  const columns = first === 0 ? count : ROW;
  for (let i = 0; i < count; i++) {
    const row = Math.floor((first + i) / ROW);
    const word = words.of(Math.floor(row / SIGN_SLOTS), columns)[(first + i) % ROW];
    out[i] = (word >>> (28 - 4 * (row % SIGN_SLOTS))) & 0xf;
  }
  return out;
}

/** z of four row signs and four column signs, at `row * 16 + column`. */
function lowRankTable(rank: number, scale: number): Float32Array {
  const table = new Float32Array(256);
  for (let row = 0; row < 16; row++) {
    for (let column = 0; column < 16; column++) {
      let sum = 0;
      for (let k = 0; k < rank; k++) sum += ((row ^ column) >> (3 - k)) & 1 ? -1 : 1;
      table[row * 16 + column] = sum * scale;
    }
  }
  return table;
}

const LOW_RANK_TABLES = {
  low_rank_1: lowRankTable(1, 1),
  low_rank_2: lowRankTable(2, fromBits(0x3f3504f3)),
  low_rank_4: lowRankTable(4, 0.5),
} as const;

/**
 * z of a tensor's elements from `first` on, into `out`. `columns`: length of its last dimension.
 */
export function fillDirection(
  distribution: Distribution,
  seed: bigint,
  tensorId: number,
  columns: number,
  out: Float32Array,
  first = 0,
): void {
  if (out.length === 0) return;
  if (distribution === "rademacher") {
    fillRademacher(new Words(seed, tensorId, DOMAIN.rademacher), first, out);
    return;
  }
  if (distribution === "gaussian") {
    fillGaussian(new Words(seed, tensorId, DOMAIN.gaussian), first, out);
    return;
  }
  const table = LOW_RANK_TABLES[distribution];
  const firstRow = Math.floor(first / columns);
  const rows = Math.floor((first + out.length - 1) / columns) - firstRow + 1;
  const rowSigns = signs(new Words(seed, tensorId, DOMAIN.rowSigns), firstRow, rows);
  const columnSigns = signs(new Words(seed, tensorId, DOMAIN.columnSigns), 0, columns);
  let row = 0;
  let column = first % columns;
  for (let i = 0; i < out.length; i++) {
    out[i] = table[rowSigns[row] * 16 + columnSigns[column]];
    if (++column === columns) {
      column = 0;
      row++;
    }
  }
}
