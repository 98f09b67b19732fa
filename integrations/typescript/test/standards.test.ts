import assert from "node:assert/strict";
import { test } from "node:test";
import { addPairs, applyCommit, type Pair } from "../src/arithmetic.js";
import { contractOf, recipeOf } from "../src/contract.js";
import {
  adapterSeed,
  digest64,
  firstSeed,
  numberText,
  roundingSeed,
  tensorsDigest,
} from "../src/hashing.js";
import { Manifest } from "../src/manifest.js";
import {
  exactSum,
  largestBinary32,
  measure,
  movedWeights,
  rowLoss,
  type MeasurementPlan,
} from "../src/measuring.js";
import { codecs, type RunConfig } from "../src/messages.js";
import { fillDirection, fromBits, halves, philox, type Distribution } from "../src/noise.js";
import { StopError } from "../src/errors.js";
import { bitsOf, floats, hex, seed, vectors } from "./vectors.js";

const DISTRIBUTIONS: readonly Distribution[] = [
  "rademacher",
  "gaussian",
  "low_rank_1",
  "low_rank_2",
  "low_rank_4",
];

test("blocks of Philox4x32-10", () => {
  const words = new Uint32Array(4);
  for (const block of vectors("noise.json").blocks) {
    philox(halves(seed(block.seed)), block.counter, words);
    assert.equal(
      [...words].map((word) => word.toString(16).padStart(8, "0")).join(" "),
      block.words,
    );
  }
});

test("z of each distribution, also from the middle of a tensor", () => {
  for (const value of vectors("noise.json").values) {
    for (const distribution of DISTRIBUTIONS) {
      const wanted = floats(value[distribution]);
      const out = new Float32Array(wanted.length);
      fillDirection(
        distribution,
        seed(value.seed),
        value.tensor_id,
        value.columns,
        out,
        value.first_element,
      );
      assert.equal(bitsOf(out), value[distribution], distribution);
    }
  }
});

test("a slice of a large direction is a slice of the whole", () => {
  for (const distribution of DISTRIBUTIONS) {
    const whole = new Float32Array(20_000);
    fillDirection(distribution, 5n, 2, 7, whole);
    const slice = new Float32Array(9_000);
    fillDirection(distribution, 5n, 2, 7, slice, 8_321);
    assert.deepEqual(slice, whole.subarray(8_321, 17_321), distribution);
  }
});

test("seeds", () => {
  const all = vectors("seeds.json");
  for (const { run_seed, round, slot, first_seed } of all.first_seeds) {
    assert.equal(hex(firstSeed(seed(run_seed), BigInt(round), BigInt(slot))), first_seed);
  }
  for (const { run_seed, round, rounding_seed } of all.rounding_seeds) {
    assert.equal(hex(roundingSeed(seed(run_seed), BigInt(round))), rounding_seed);
  }
  for (const { run_seed, adapter_seed } of all.adapter_seeds) {
    assert.equal(hex(adapterSeed(seed(run_seed))), adapter_seed);
  }
});

test("numbers as text", () => {
  for (const { binary64, text } of vectors("seeds.json").numbers) {
    assert.equal(numberText(Buffer.from(binary64, "hex").readDoubleBE()), text);
  }
});

function throughTheWire(config: unknown): RunConfig {
  return codecs.runConfig.decode(codecs.runConfig.encode(config as RunConfig));
}

test("the recipe of a contract", () => {
  for (const { contract, recipe } of vectors("seeds.json").recipes) {
    assert.equal(recipeOf(throughTheWire(contract)), recipe);
  }
});

test("a contract that this worker cannot do is refused with its field and value", () => {
  const config = vectors("seeds.json").recipes[0].contract;
  const genesis = (changes: object): Parameters<typeof contractOf>[0] => ({
    config: throughTheWire({ ...config, ...changes }),
    manifest_digest: new Uint8Array(32),
    base_digest: new Uint8Array(32),
    tokenizer_digest: new Uint8Array(32),
  });
  assert.equal(contractOf(genesis({})).probes, 4);
  const { lora, task } = config;
  for (const [changes, sentence] of [
    [{ local_steps: 2 }, /local_steps = 2/],
    [{ buffer_answers: 3 }, /buffer_answers = 3/],
    [{ seed_policy: "SEED_POLICY_POOL" }, /seed_policy = pool/],
    [{ seed_policy: 9 }, /seed_policy = 9/],
    [{ distribution: 0 }, /distribution = /],
    [{ lora: { ...lora, freeze_a: false } }, /lora.freeze_a = false/],
    [{ lora: undefined }, /lora = nothing/],
    [{ task: { ...task, template_version: 2 } }, /task.template_version = 2/],
    [{ task: { ...task, kind: "TASK_KIND_INSTRUCTION" } }, /task.kind = TASK_KIND_INSTRUCTION/],
    [{ task: { ...task, objective: "os:remove" } }, /task.objective = os:remove/],
    [{ eps: Number.NaN }, /eps = NaN/],
    [{ learning_rate: 0 }, /learning_rate = 0/],
    [{ probes: 1025 }, /probes = 1025/],
    [{ cohort_size_max: 1 }, /quorum = 2/],
    [{ run_id: "-x" }, /run_id = "-x"/],
  ] as const) {
    assert.throws(
      () => contractOf(genesis(changes)),
      (error) => error instanceof StopError && sentence.test(error.message),
    );
  }
});

test("commits on float32 weights", () => {
  const { commits, cases } = vectors("weights.json");
  for (const { dtype, distribution, tensor_id, shape, base, after_each_commit } of cases) {
    if (dtype !== "float32") continue;
    const values = floats(base);
    commits.forEach(
      (
        commit: { pairs: { first_seed: string; coefficients: string }[]; decay: string },
        k: number,
      ) => {
        const pairs = commit.pairs.flatMap(({ first_seed, coefficients }): Pair[] =>
          [...floats(coefficients)].map((coefficient, i) => ({
            seed: seed(first_seed) + BigInt(i),
            coefficient,
          })),
        );
        const placement = { tensorId: tensor_id, columns: shape.at(-1) };
        applyCommit(values, placement, distribution, floats(commit.decay)[0], pairs);
        assert.equal(bitsOf(values), after_each_commit[k], `${distribution}, commit ${k}`);
      },
    );
  }
});

test("digests of tensors, also of more than one chunk", () => {
  const [small, large] = vectors("weights.json").digests;
  const bytes = (values: Float32Array): Uint8Array => new Uint8Array(values.buffer);
  const first = tensorsDigest(`fedmezo weights 1\n${small.manifest}`, [
    bytes(Float32Array.from({ length: 12 }, (_, i) => i / 8)),
    bytes(new Float32Array(8).fill(-0.5)),
  ]);
  assert.equal(first.toString("hex"), small.weights_digest);
  assert.equal(hex(digest64(first)), small.digest64);
  const second = tensorsDigest(`fedmezo weights 1\n${large.manifest}`, [
    bytes(Float32Array.from({ length: 1024 * 1025 }, (_, i) => i)),
    Buffer.from("c03f", "hex"),
  ]);
  assert.equal(second.toString("hex"), large.weights_digest);
});

test("the manifest", () => {
  const { modules, rank, manifests } = vectors("adapter.json");
  for (const { freeze_a, canonical_bytes, manifest_digest, trainable_elements } of manifests) {
    const manifest = new Manifest(
      modules.flatMap(
        ({ name, outputs, inputs }: { name: string; outputs: number; inputs: number }) => [
          { name: `base_model.model.${name}.lora_B.default.weight`, shape: [outputs, rank] },
          ...(freeze_a
            ? []
            : [{ name: `base_model.model.${name}.lora_A.default.weight`, shape: [rank, inputs] }]),
        ],
      ),
    );
    assert.equal(manifest.text, canonical_bytes);
    assert.equal(manifest.digest.toString("hex"), manifest_digest);
    assert.equal(manifest.elements, trainable_elements);
  }
  assert.equal(
    new Manifest([{ name: "é", shape: [] }]).text,
    'fedmezo manifest 1\n0\t"\\u00e9"\tfloat32\t\n',
  );
});

test("A of a fresh adapter is a Gaussian", () => {
  const { seeded } = vectors("adapter.json");
  for (const { tensor_id_for_the_seed, shape, bits } of seeded.tensors) {
    const values = new Float32Array(6);
    fillDirection("gaussian", seed(seeded.adapter_seed), tensor_id_for_the_seed, shape[1], values);
    const scale = Math.fround(1 / Math.sqrt(3 * shape[1]));
    assert.equal(bitsOf(values.map((value) => value * scale)), bits);
  }
});

test("losses become projected gradients", async () => {
  const manifest = new Manifest([{ name: "w", shape: [1, 1] }]);
  for (const value of vectors("measurements.json").cases) {
    const plan: MeasurementPlan = {
      firstSeed: 0n,
      seedOffsets: [],
      probes: value.local_steps * value.probes,
      eps: Number(value.eps),
      oneSided: value.estimator === "one_sided",
      projectedGradAbsMax: Number(value.projected_grad_abs_max),
    };
    if (plan.oneSided && value.local_steps > 1) continue;
    const losses: number[] = plan.oneSided
      ? [value.losses[0][1], ...value.losses.map(([plus]: string[]) => plus)].map(Number)
      : value.losses.flat().map(Number);
    const next = (): Promise<number> => Promise.resolve(losses.shift() ?? Number.NaN);
    const result = await measure(
      plan,
      [new Float32Array(1)],
      manifest,
      "rademacher",
      next,
      () => true,
    );
    assert.equal(bitsOf(result?.projectedGrads ?? []), value.projected_grads);
    assert.equal(bitsOf([result?.meanLoss ?? 0]), value.mean_loss);
  }
});

test("the weights at which losses are measured", () => {
  const { points } = vectors("measurements.json");
  const tensors = ["a", "b", "c", "d"].map((name) => ({ name, shape: points.shape as number[] }));
  const manifest = new Manifest(tensors);
  for (const { local_pairs, seed: probe, step, weights } of points.at) {
    const start = floats(points.weights);
    const pairs = local_pairs.map((pair: { seed: string; coefficient: string }) => ({
      seed: seed(pair.seed),
      coefficient: floats(pair.coefficient)[0],
    }));
    addPairs(start, { tensorId: 3, columns: 2 }, points.distribution, pairs);
    const unused = new Float32Array(12);
    const at = movedWeights(
      [unused, unused, unused, start],
      manifest,
      points.distribution,
      seed(probe),
      floats(step)[0],
    );
    assert.equal(bitsOf(at[3]), weights);
  }
});

test("the loss of logits", () => {
  const { logits, labels, row_losses, loss } = vectors("measurements.json").classification;
  const losses: number[] = logits.map((row: number[], k: number) => rowLoss(row, labels[k]));
  losses.forEach((value, k) => assert.ok(Math.abs(value - row_losses[k]) < 1e-12));
  assert.ok(Math.abs(losses.reduce((sum, value) => sum + value, 0) / 3 - loss) < 1e-12);
});

test("sums are exact, and the clip rounds down", () => {
  assert.equal(exactSum([1e16, 1, -1e16]), 1);
  assert.equal(exactSum(Array.from({ length: 10 }, () => 0.1)), 1);
  assert.equal(exactSum([]), 0);
  assert.equal(largestBinary32(100), 100);
  assert.ok(largestBinary32(0.1) <= 0.1);
  assert.equal(largestBinary32(1e300), fromBits(0x7f7fffff));
});
