/** The contract of a run: what it may say, and what this worker can do of it. */
import { StopError } from "./errors.js";
import { numberText } from "./hashing.js";
import {
  enumValues,
  type Genesis,
  type LoraConfig,
  type RunConfig,
  type TaskConfig,
} from "./messages.js";
import type { Distribution } from "./noise.js";

/** A contract that this worker can do, with each absent field at the value that it means. */
export interface Contract {
  readonly runId: string;
  readonly seed: bigint;
  readonly rounds: bigint;
  readonly localSteps: number;
  readonly probes: number;
  readonly batchSize: number;
  readonly distribution: Distribution;
  readonly oneSided: boolean;
  readonly eps: number;
  readonly learningRate: number;
  readonly projectedGradAbsMax: number;
  readonly cohortSizeMax: number;
  readonly sharedSeeds: boolean;
  readonly reportLosses: boolean;
  readonly weightsByRows: boolean;
  readonly rank: number;
  readonly alpha: number;
  readonly tokensMax: number;
  readonly template: string;
  readonly labelColumn: string;
  readonly verbalizers: readonly { readonly label: string; readonly word: string }[];
  /** Forms of the base that workers may hold; empty: each worker may choose. */
  readonly baseForms: readonly string[];
  readonly recipe: string;
}

const DISTRIBUTIONS: Readonly<Record<string, Distribution>> = {
  DISTRIBUTION_RADEMACHER: "rademacher",
  DISTRIBUTION_GAUSSIAN: "gaussian",
  DISTRIBUTION_LOW_RANK_1: "low_rank_1",
  DISTRIBUTION_LOW_RANK_2: "low_rank_2",
  DISTRIBUTION_LOW_RANK_4: "low_rank_4",
};
const DTYPES: Readonly<Record<string, string>> = {
  WEIGHT_TYPE_FLOAT32: "float32",
  WEIGHT_TYPE_BFLOAT16: "bfloat16",
  WEIGHT_TYPE_FLOAT16: "float16",
};
const ROUNDINGS: Readonly<Record<string, string>> = {
  ROUNDING_STOCHASTIC: "stochastic",
  ROUNDING_NEAREST: "nearest",
};

/** How a worker computes, as the hello says it (section 5). */
export function recipeOf(config: RunConfig): string {
  const task = config.task ?? {};
  const parts = [
    "fedmezo-1 philox4x32-10",
    DISTRIBUTIONS[config.distribution ?? ""],
    DTYPES[config.dtype ?? ""],
    ROUNDINGS[config.rounding ?? ""],
    `eps=${numberText(config.eps ?? 0)}`,
  ];
  if ((config.probes ?? 1) > 1) parts.push(`probes=${config.probes}`);
  if (config.estimator === "ESTIMATOR_ONE_SIDED") parts.push("one_sided");
  if (config.normalized_step) parts.push("normalized");
  if (config.rate_directions && (config.local_steps ?? 0) > 1) {
    parts.push(`rate_directions=${config.rate_directions}`);
  }
  if (config.weight_decay) parts.push("decay");
  if (config.seed_policy === "SEED_POLICY_POOL") parts.push("pool");
  if (config.buffer_answers) parts.push("buffered");
  if ((task.template_version ?? 1) !== 1) parts.push(`template=${task.template_version}`);
  if (task.objective) parts.push(`objective=${task.objective}`);
  return parts.join(" ");
}

function refuse(field: string, value: unknown, allowed: string): StopError {
  return new StopError(
    `The run's contract has ${field} = ${String(value)}; ${allowed}. Join it with another ` +
      "worker, or ask its operator.",
  );
}

type Range = readonly [low: number, high: number];

/** Whole numbers: field, range, and what an absent field means, if it may be absent. */
const WHOLE: readonly (readonly [keyof RunConfig, Range, number?])[] = [
  ["rounds", [1, 10_000_000]],
  ["local_steps", [1, 4096]],
  ["batch_size", [1, 65_536]],
  ["workers_min", [1, 4096]],
  ["quorum", [1, 4096]],
  ["cohort_size_max", [1, 4096]],
  ["digest_every_rounds", [1, 2 ** 32]],
  ["probes", [1, 1024], 1],
  ["warmup_rounds", [0, 10_000_000], 0],
  ["pool_size", [1, 65_536], 1024],
  ["rebase_every_rounds", [1, 2 ** 32], 64],
  ["buffer_answers", [0, 4096], 0],
  ["staleness_max_rounds", [0, 256], 10],
  ["rate_directions", [1, 262_144], 1],
];

/** Other numbers: field, and bounds of which the first is outside if `open`. */
const REAL: readonly (readonly [keyof RunConfig, Range, boolean, number?])[] = [
  ["eps", [0, Infinity], true],
  ["learning_rate", [0, Infinity], true],
  ["projected_grad_abs_max", [0, Infinity], true],
  ["final_rate_fraction", [0, 1], false, 0],
  ["weight_decay", [0, Infinity], false, 0],
  ["personal_rate_amplitude", [0, Infinity], true, 1],
  ["pause_loss_factor", [1, Infinity], true, 3],
  ["staleness_exponent", [0, 100], false, 0.5],
  ["clip_median_factor", [1, Infinity], false, 1],
];

const ENUMS: readonly (readonly [keyof RunConfig, string, boolean])[] = [
  ["distribution", "Distribution", true],
  ["dtype", "WeightType", true],
  ["rounding", "Rounding", true],
  ["estimator", "Estimator", false],
  ["schedule", "Schedule", false],
  ["weighting", "Weighting", false],
  ["personal_rate", "PersonalRate", false],
  ["seed_policy", "SeedPolicy", false],
  ["pool_sampling", "PoolSampling", false],
];

function checkRanges(config: RunConfig): void {
  for (const [field, [low, high], absent] of WHOLE) {
    const value = Number(config[field] ?? absent ?? 0);
    if (!(value >= low && value <= high))
      throw refuse(field, value, `${low} to ${high} is allowed`);
  }
  for (const [field, [low, high], open, absent] of REAL) {
    const value = Number(config[field] ?? absent ?? 0);
    if (!Number.isFinite(value) || value > high || value < low || (open && value === low)) {
      const bounds =
        high === Infinity
          ? `a finite number ${open ? "above" : "from"} ${low}`
          : `${low} to ${high}`;
      throw refuse(field, value, `${bounds} is allowed`);
    }
  }
  for (const [field, name, needed] of ENUMS) {
    const value = config[field];
    if (value === undefined && !needed) continue;
    if (!enumValues(name).includes(String(value))) {
      throw refuse(field, value ?? "nothing", "this worker knows no such value");
    }
  }
  if ((config.local_steps ?? 0) * (config.probes ?? 1) > 4096) {
    throw refuse(
      "local_steps x probes",
      (config.local_steps ?? 0) * (config.probes ?? 1),
      "4096 is the limit",
    );
  }
  if ((config.quorum ?? 0) > (config.cohort_size_max ?? 0)) {
    throw refuse(
      "quorum",
      config.quorum,
      `cohort_size_max, ${config.cohort_size_max}, is the limit`,
    );
  }
  if (Number(config.warmup_rounds ?? 0) >= Number(config.rounds)) {
    throw refuse("warmup_rounds", config.warmup_rounds, "it must be below rounds");
  }
  if ((config.learning_rate ?? 0) * (config.weight_decay ?? 0) >= 1) {
    throw refuse(
      "weight_decay",
      config.weight_decay,
      "learning_rate x weight_decay must be below 1",
    );
  }
  if (!/^[a-z0-9][a-z0-9-]{0,63}$/.test(config.run_id ?? "")) {
    throw refuse(
      "run_id",
      JSON.stringify(config.run_id ?? ""),
      "1 to 64 of a-z, 0-9 and - are allowed",
    );
  }
}

function checkTask(task: TaskConfig): void {
  const kinds = enumValues("TaskKind");
  if (!kinds.includes(String(task.kind)))
    throw refuse("task.kind", task.kind, "this worker knows no such value");
  if (task.kind !== "TASK_KIND_CLASSIFICATION") {
    throw refuse("task.kind", task.kind, "this worker does classification alone");
  }
  if (task.template_version !== 3) {
    throw refuse(
      "task.template_version",
      task.template_version ?? 1,
      "this worker does version 3 alone",
    );
  }
  if (task.objective)
    throw refuse("task.objective", task.objective, "this worker runs no code of a contract");
  if (task.generated_tokens_max) {
    throw refuse(
      "task.generated_tokens_max",
      task.generated_tokens_max,
      "this worker generates no text",
    );
  }
  const tokensMax = task.tokens_max ?? 0;
  if (!(tokensMax >= 8 && tokensMax <= 131_072))
    throw refuse("task.tokens_max", tokensMax, "8 to 131072 is allowed");
  const count = task.verbalizers?.length ?? 0;
  if (count < 2 || count > 10_000)
    throw refuse("the count of task.verbalizers", count, "2 to 10000 is allowed");
  if ([...(task.template ?? "")].length > 65_536) {
    throw refuse("the length of task.template", task.template?.length, "65536 is the limit");
  }
}

function checkAdapter(config: RunConfig): LoraConfig {
  const { lora } = config;
  if (lora === undefined) throw refuse("lora", "nothing", "this worker trains an adapter");
  if (!lora.freeze_a) throw refuse("lora.freeze_a", false, "this worker trains B alone");
  if (lora.output_rank) throw refuse("lora.output_rank", lora.output_rank, "this worker trains B as a whole");
  if (!(lora.rank !== undefined && lora.rank >= 1 && lora.rank <= 1024)) {
    throw refuse("lora.rank", lora.rank ?? 0, "1 to 1024 is allowed");
  }
  if (!(lora.alpha !== undefined && Number.isFinite(lora.alpha) && lora.alpha > 0)) {
    throw refuse("lora.alpha", lora.alpha ?? 0, "a finite number above 0 is allowed");
  }
  if (config.train?.length)
    throw refuse("train", config.train.join(", "), "this worker trains B alone");
  return lora;
}

/**
 * Reads a genesis's contract. Throws a StopError for one that is wrong or that is not for this
 * worker.
 */
export function contractOf(genesis: Genesis): Contract {
  const config = genesis.config ?? {};
  checkRanges(config);
  const task = config.task ?? {};
  checkTask(task);
  const lora = checkAdapter(config);
  if (config.seed_policy === "SEED_POLICY_POOL") {
    throw refuse("seed_policy", "pool", "this worker takes seeds per worker or shared");
  }
  if (config.buffer_answers) {
    throw refuse(
      "buffer_answers",
      config.buffer_answers,
      "this worker takes rounds that wait for their cohort",
    );
  }
  if (config.local_steps !== 1)
    throw refuse("local_steps", config.local_steps, "this worker does 1");
  for (const field of ["manifest_digest", "base_digest", "tokenizer_digest"] as const) {
    const length = genesis[field]?.length ?? 0;
    if (length !== 32)
      throw new StopError(`The genesis's ${field} has ${length} bytes; a digest has 32.`);
  }
  return {
    runId: config.run_id ?? "",
    seed: BigInt(config.seed ?? 0),
    rounds: BigInt(config.rounds ?? 0),
    localSteps: config.local_steps,
    probes: config.probes ?? 1,
    batchSize: config.batch_size ?? 0,
    distribution: DISTRIBUTIONS[config.distribution ?? ""],
    oneSided: config.estimator === "ESTIMATOR_ONE_SIDED",
    eps: config.eps ?? 0,
    learningRate: config.learning_rate ?? 0,
    projectedGradAbsMax: config.projected_grad_abs_max ?? 0,
    cohortSizeMax: config.cohort_size_max ?? 0,
    sharedSeeds: config.seed_policy === "SEED_POLICY_SHARED",
    reportLosses: config.report_losses ?? false,
    weightsByRows: config.weighting === "WEIGHTING_ROWS",
    rank: lora.rank ?? 0,
    alpha: lora.alpha ?? 0,
    tokensMax: task.tokens_max ?? 0,
    template: task.template ?? "",
    labelColumn: task.label_column ?? "",
    verbalizers: (task.verbalizers ?? []).map(({ label = "", word = "" }) => ({ label, word })),
    baseForms: config.base_forms ?? [],
    recipe: recipeOf(config),
  };
}
