/**
 * Records and the hash-chained heads that name the weights (docs/protocol.md, sections 5 and 8).
 */
import { createPublicKey, verify } from "node:crypto";
import { StopError } from "./errors.js";
import { sha256 } from "./hashing.js";
import type { Pair } from "./arithmetic.js";
import type { WeightChange } from "./manifest.js";
import { codecs, type Committed, type Genesis, type RecordKinds } from "./messages.js";

export const NO_HEAD: Buffer = Buffer.alloc(32);

/** First byte of a record: the tag of the field that is set. */
const FIRST_BYTES: Readonly<Record<keyof RecordKinds, number>> = { genesis: 0x0a, committed: 0x2a };

/** Head after a genesis or a commit. Records are hashed as they were written. */
export function headAfter(head: Uint8Array, record: Uint8Array): Buffer {
  return sha256(head, record);
}

function decode<Kind extends keyof RecordKinds>(
  kind: Kind,
  record: Uint8Array,
): NonNullable<RecordKinds[Kind]> {
  let decoded: RecordKinds;
  try {
    decoded = codecs.record.decode(record);
  } catch (error) {
    throw new StopError(
      `The coordinator sent a record that is none (${(error as Error).message}).`,
    );
  }
  const kinds = Object.keys(decoded);
  const value = decoded[kind];
  if (value === undefined || kinds.length !== 1 || record[0] !== FIRST_BYTES[kind]) {
    throw new StopError(
      `The coordinator sent a record of kind ${kinds.join(" and ") || "unknown"} in place of one ` +
        `of kind ${kind}; it may be of another version.`,
    );
  }
  return value;
}

export function decodeGenesis(record: Uint8Array): Genesis {
  return decode("genesis", record);
}

/** What the checks of a commit need of the contract. */
export interface CommitLimits {
  readonly runsMax: number;
  readonly pairsOfRunMax: number;
}

const PAIRS_MAX = 262_144;
const SEEDS = 1n << 64n;

/** Reads and checks a commit. Throws a StopError that names what is wrong. */
export function decodeCommit(
  record: Uint8Array,
  limits: CommitLimits,
): WeightChange & { round: bigint } {
  const commit: Committed = decode("committed", record);
  const round = BigInt(commit.round ?? 0);
  const refuse = (what: string): StopError =>
    new StopError(`The commit of round ${round} is not the run's: ${what}.`);
  if (round < 1n) throw refuse("rounds begin at 1");
  const decay = commit.decay ?? 1;
  if (!(decay > 0 && decay <= 1)) throw refuse(`its decay is ${decay}, which is not in (0, 1]`);
  if (commit.from_base) throw refuse("it starts from the base, and the run has no pool");
  if (commit.staleness?.length || commit.slots?.length) {
    throw refuse("it lists late answers, and the run buffers none");
  }
  const runs = commit.runs ?? [];
  if (runs.length > limits.runsMax) {
    throw refuse(`it has ${runs.length} runs of pairs, and at most ${limits.runsMax} are allowed`);
  }
  const pairs: Pair[] = [];
  for (const run of runs) {
    const coefficients = run.coefficients ?? [];
    if (coefficients.length > limits.pairsOfRunMax) {
      throw refuse(
        `a run has ${coefficients.length} pairs, and at most ${limits.pairsOfRunMax} are allowed`,
      );
    }
    const first = BigInt(run.first_seed ?? 0);
    if (first + BigInt(coefficients.length) > SEEDS) throw refuse("a seed reaches 2^64");
    coefficients.forEach((coefficient, k) => {
      if (!Number.isFinite(coefficient)) throw refuse(`a coefficient is ${coefficient}`);
      pairs.push({ seed: first + BigInt(k), coefficient });
    });
  }
  if (pairs.length > PAIRS_MAX)
    throw refuse(`it has ${pairs.length} pairs; ${PAIRS_MAX} is the limit`);
  return { round, decay, pairs };
}

/** What a coordinator signs of a round's head. */
export function signedText(runId: string, round: bigint, head: Uint8Array): string {
  return `fedmezo.v1/${runId}\n${round}\n${Buffer.from(head).toString("base64")}\n`;
}

/** Checks the signature of a round's head by the run's Ed25519 key of 32 bytes. */
export function checkSignature(
  key: Uint8Array,
  runId: string,
  round: bigint,
  head: Uint8Array,
  signature: Uint8Array,
): void {
  const publicKey = createPublicKey({
    key: { kty: "OKP", crv: "Ed25519", x: Buffer.from(key).toString("base64url") },
    format: "jwk",
  });
  const text = Buffer.from(signedText(runId, round, head));
  if (signature.length !== 64 || !verify(null, text, publicKey, signature)) {
    throw new StopError(
      `The signature of the head after round ${round} is wrong: whoever answers at this address ` +
        "is not the run's coordinator, or changed its history. Ask its operator.",
    );
  }
}
