/** docs/vectors, as the tests read them. */
import { readFileSync } from "node:fs";
import { fromBits, toBits } from "../src/noise.js";

export function vectors(name: string): any {
  return JSON.parse(readText(name));
}

export function readText(name: string): string {
  return readFileSync(new URL(`../../../../docs/vectors/${name}`, import.meta.url), "utf8");
}

/** Binary32 numbers of hexadecimal bits. */
export function floats(bits: string): Float32Array {
  return Float32Array.from(bits === "" ? [] : bits.split(" "), (word) =>
    fromBits(Number.parseInt(word, 16)),
  );
}

/** Hexadecimal bits of binary32 numbers. */
export function bitsOf(values: Iterable<number>): string {
  return [...values].map((value) => toBits(value).toString(16).padStart(8, "0")).join(" ");
}

export function seed(hex: string): bigint {
  return BigInt(`0x${hex}`);
}

export function hex(value: bigint): string {
  return value.toString(16).padStart(16, "0");
}
