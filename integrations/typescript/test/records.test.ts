import assert from "node:assert/strict";
import { test } from "node:test";
import { contractOf } from "../src/contract.js";
import { StopError } from "../src/errors.js";
import { digest64, sha256, u64le } from "../src/hashing.js";
import { Manifest, Weights } from "../src/manifest.js";
import { codecs } from "../src/messages.js";
import {
  checkSignature,
  decodeCommit,
  decodeGenesis,
  headAfter,
  NO_HEAD,
  signedText,
} from "../src/records.js";
import { bitsOf, hex, vectors } from "./vectors.js";

const journal = vectors("journal.json");
const records: Buffer[] = journal.records.map(({ record }: { record: string }) =>
  Buffer.from(record, "hex"),
);
const limits = { runsMax: 8, pairsOfRunMax: 4 };

test("chain and heads of a journal", () => {
  let chain: Buffer = NO_HEAD;
  let head = NO_HEAD;
  records.forEach((record, n) => {
    chain = sha256(chain, u64le(BigInt(n)), record);
    if (record[0] === 0x0a || record[0] === 0x2a) head = headAfter(head, record);
    assert.equal(chain.toString("hex"), journal.records[n].chain);
    assert.equal(head.toString("hex"), journal.records[n].head);
  });
});

test("commits lead to the journal's weights and digests", () => {
  const genesis = decodeGenesis(records[0]);
  const contract = contractOf(genesis);
  const manifest = new Manifest([
    { name: "base_model.model.model.layers.10.mlp.up_proj.lora_B.default.weight", shape: [4, 2] },
    { name: "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", shape: [6, 2] },
  ]);
  assert.deepEqual(manifest.digest, Buffer.from(genesis.manifest_digest ?? []));
  const base = manifest.tensors.map(({ elements }) => new Float32Array(elements));
  const weights = new Weights(manifest, contract.distribution, base);
  const commits = records.filter((record) => record[0] === 0x2a);
  for (const { round, tensors, weights_digest, digest64: short } of journal.rounds) {
    if (round > 0) {
      const commit = decodeCommit(commits[round - 1], limits);
      assert.equal(commit.round, BigInt(round));
      weights.apply(commit);
    }
    assert.equal(weights.values.map(bitsOf).join(" | "), tensors);
    assert.equal(weights.digest().toString("hex"), weights_digest);
    assert.equal(hex(digest64(weights.digest())), short);
  }
  weights.reset();
  assert.equal(weights.digest().toString("hex"), journal.rounds[0].weights_digest);
});

test("signatures of heads", () => {
  const key = Buffer.from(journal.public_key, "hex");
  for (const { round, text, signature } of journal.signatures) {
    const head = Buffer.from(text.split("\n")[2], "base64");
    assert.equal(signedText("vectors", BigInt(round), head), text);
    const bytes = Buffer.from(signature, "hex");
    checkSignature(key, "vectors", BigInt(round), head, bytes);
    assert.throws(() => checkSignature(key, "other", BigInt(round), head, bytes), StopError);
    assert.throws(
      () => checkSignature(key, "vectors", BigInt(round), head, Buffer.alloc(0)),
      StopError,
    );
  }
});

test("a commit that is not the run's is refused", () => {
  const commit = (fields: object): Buffer => codecs.record.encode({ committed: fields as never });
  for (const [record, sentence] of [
    [Buffer.from("ff", "hex"), /a record that is none/],
    [records[0], /kind genesis in place of one of kind committed/],
    [Buffer.concat([records[5], records[9]].map((r) => r).concat(records[0])), /kind/],
    [Buffer.from("a20600", "hex"), /kind unknown/],
    [commit({ round: "0" }), /rounds begin at 1/],
    [commit({ round: "1", decay: 1.5 }), /decay is 1.5/],
    [commit({ round: "1", decay: 0 }), /decay is 0/],
    [commit({ round: "1", from_base: true }), /starts from the base/],
    [commit({ round: "1", staleness: [0] }), /late answers/],
    [commit({ round: "1", runs: [{ coefficients: [Number.NaN] }] }), /coefficient is NaN/],
    [commit({ round: "1", runs: [{ coefficients: [1, 2, 3, 4, 5] }] }), /5 pairs/],
    [commit({ round: "1", runs: Array.from({ length: 9 }, () => ({})) }), /9 runs/],
    [
      commit({ round: "1", runs: [{ first_seed: "18446744073709551615", coefficients: [1, 2] }] }),
      /2\^64/,
    ],
  ] as const) {
    assert.throws(
      () => decodeCommit(record, limits),
      (error) => error instanceof StopError && sentence.test(error.message),
      String(sentence),
    );
  }
  const last = commit({
    round: "1",
    runs: [{ first_seed: "18446744073709551615", coefficients: [1] }],
  });
  assert.equal(decodeCommit(last, limits).pairs[0].seed, 2n ** 64n - 1n);
});

test("bytes of session messages", () => {
  const { messages } = vectors("session.json");
  for (const { direction, fields, bytes } of messages) {
    const codec = direction === "up" ? codecs.sessionRequest : codecs.sessionResponse;
    assert.equal(codec.encode(fields).toString("hex"), bytes);
    assert.deepEqual(Object.keys(codec.decode(Buffer.from(bytes, "hex"))), Object.keys(fields));
  }
});
