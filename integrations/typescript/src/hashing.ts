/** Hashes, seeds, and the texts that are hashed. */
import { createHash } from "node:crypto";

const CHUNK_BYTES = 4 * 1024 * 1024;

export function sha256(...parts: readonly (Uint8Array | string)[]): Buffer {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(part);
  return hash.digest();
}

/** An unsigned number of 64 bits, low byte first. */
export function u64le(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
}

/** The first 8 bytes of a digest, read low byte first. */
export function digest64(digest: Uint8Array): bigint {
  return Buffer.from(digest).readBigUInt64LE(0);
}

export function hash64(text: string, ...numbers: readonly bigint[]): bigint {
  return digest64(sha256(text, Buffer.alloc(1), ...numbers.map(u64le)));
}

/** Section 9's digest: a header, then the SHA-256 of each 4 MiB of each tensor's bytes. */
export function tensorsDigest(header: string, tensors: readonly Uint8Array[]): Buffer {
  const parts: (Uint8Array | string)[] = [header];
  for (const tensor of tensors) {
    for (let start = 0; start < tensor.length; start += CHUNK_BYTES) {
      parts.push(sha256(tensor.subarray(start, start + CHUNK_BYTES)));
    }
  }
  return sha256(...parts);
}

/** First seed of a slot (section 3). */
export function firstSeed(runSeed: bigint, round: bigint, slot: bigint): bigint {
  return (hash64("fedmezo seed v1", runSeed, round, slot) >> 16n) << 16n;
}

/** Rounding seed of a round's commit. */
export function roundingSeed(runSeed: bigint, round: bigint): bigint {
  return hash64("fedmezo rounding v1", runSeed, round);
}

/** Seed of a fresh adapter's A matrices. */
export function adapterSeed(runSeed: bigint): bigint {
  return hash64("fedmezo lora v1", runSeed);
}

/** A binary64 number as text: the fewest digits that give it back, laid out as Python does. */
export function numberText(value: number): string {
  const match = /^(-?)(\d)(?:\.(\d+))?e([+-]\d+)$/.exec(value.toExponential());
  if (match === null) throw new RangeError(`${value} has no text; give a finite number.`);
  const [, , lead = "", fraction = "", exponentText] = match;
  const sign = value < 0 || Object.is(value, -0) ? "-" : "";
  const exponent = Number(exponentText);
  if (exponent < -4 || exponent >= 16) {
    const size = String(Math.abs(exponent)).padStart(2, "0");
    const point = fraction === "" ? "" : `.${fraction}`;
    return `${sign}${lead}${point}e${exponent < 0 ? "-" : "+"}${size}`;
  }
  const digits = lead + fraction;
  if (exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${digits}`;
  const whole = digits.slice(0, exponent + 1).padEnd(exponent + 1, "0");
  return `${sign}${whole}.${digits.slice(exponent + 1) || "0"}`;
}

/** Order by Unicode code points; JavaScript's own order is by UTF-16 units. */
export function compareCodePoints(left: string, right: string): number {
  return Buffer.compare(Buffer.from(left, "utf8"), Buffer.from(right, "utf8"));
}

/** A JSON string in ASCII: other characters become \uXXXX. */
export function asciiJson(text: string): string {
  return JSON.stringify(text).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}
