/** The run of docs/vectors/journal.json, as one of its workers. */
import { contractOf } from "../src/contract.js";
import { Manifest, Weights } from "../src/manifest.js";
import type { SessionResponse } from "../src/messages.js";
import { decodeGenesis } from "../src/records.js";
import { Session } from "../src/session.js";
import { vectors } from "./vectors.js";

export const journal = vectors("journal.json");
export const records: readonly Buffer[] = journal.records.map(({ record }: { record: string }) =>
  Buffer.from(record, "hex"),
);
export const genesisRecord = records[0];
export const commits = records.filter((record) => record[0] === 0x2a);
/** Head after each round. */
export const heads: readonly Buffer[] = journal.rounds.map(({ head }: { head: string }) =>
  Buffer.from(head, "hex"),
);
export const digests: readonly string[] = journal.rounds.map(
  ({ weights_digest }: { weights_digest: string }) => weights_digest,
);

export function newWorker(): { session: Session; weights: Weights } {
  const genesis = decodeGenesis(genesisRecord);
  const contract = contractOf(genesis);
  const manifest = new Manifest([
    { name: "base_model.model.model.layers.10.mlp.up_proj.lora_B.default.weight", shape: [4, 2] },
    { name: "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", shape: [6, 2] },
  ]);
  const base = manifest.tensors.map(({ elements }) => new Float32Array(elements));
  const weights = new Weights(manifest, contract.distribution, base);
  const session = new Session(
    {
      worker: "w1",
      contract,
      genesis: genesisRecord,
      manifestDigest: manifest.digest,
      baseDigest: genesis.base_digest ?? new Uint8Array(),
      tokenizerDigest: genesis.tokenizer_digest ?? new Uint8Array(),
      rows: 10,
    },
    weights,
  );
  return { session, weights };
}

export function welcome(round: number, epoch = 1): SessionResponse {
  return { welcome: { epoch, round: String(round), head: heads[round] } };
}

export function commit(round: number): SessionResponse {
  return { commit: { record: commits[round - 1] } };
}

export function assign(round: number, more: object = {}): SessionResponse {
  const ticket = { epoch: 1, round: String(round) };
  return { assign: { ticket, first_seed: "4599680445243129856", steps: 1, ...more } };
}
