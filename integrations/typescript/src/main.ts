#!/usr/bin/env node
/** The command: joins a run, measures its rows, and leaves when the run is finished. */
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Batches } from "./batches.js";
import { contractOf, type Contract } from "./contract.js";
import { StopError } from "./errors.js";
import { Weights } from "./manifest.js";
import { measure } from "./measuring.js";
import type { Genesis } from "./messages.js";
import { OnnxModel } from "./onnx.js";
import { decodeGenesis } from "./records.js";
import { readRows } from "./rows.js";
import { Session, type Outcome, type Work } from "./session.js";
import { ClassificationTask, templateParts } from "./task.js";
import { PARTS, TextTokenizer } from "./tokens.js";
import { Coordinator } from "./transport.js";
import { discover, Patience, Worker } from "./worker.js";

const USAGE = `Usage: node dist/src/main.js --coordinator HOST:PORT --name NAME --data ROWS \\
         --form FOLDER [options]

  --coordinator HOST:PORT   the coordinator's address
  --name NAME               this worker's name in the run: a-z, 0-9 and -
  --data ROWS               a .jsonl file of rows, or a folder of them; rows stay here
  --form FOLDER             the base as an ONNX graph, with its form.json (docs/edge.md)
  --run RUN_ID              the run that is meant (whatever is served there)
  --tls-ca FILE             certificates that vouch for the coordinator; without it there is no TLS
  --expect-key KEY          the coordinator's Ed25519 key, 64 hexadecimal digits
  --polls                   poll in place of one long stream
  --threads COUNT           threads of a forward pass (1)`;

function keyOf(text: string | undefined): Uint8Array | undefined {
  if (text === undefined) return undefined;
  if (!/^[0-9a-f]{64}$/i.test(text)) {
    throw new StopError(`--expect-key ${text} is no key: give 64 hexadecimal digits.`);
  }
  return Buffer.from(text, "hex");
}

function same(
  what: string,
  ours: Uint8Array,
  theirs: Uint8Array | undefined,
  remedy: string,
): void {
  if (Buffer.compare(ours, theirs ?? new Uint8Array()) === 0) return;
  const [mine, run] = [ours, theirs ?? []].map((bytes) => Buffer.from(bytes).toString("hex"));
  throw new StopError(`The run's ${what} is ${run}, and ours is ${mine}. ${remedy}`);
}

function log(line: string): void {
  process.stderr.write(`${line}\n`);
}

interface Options {
  readonly address: string;
  readonly name: string;
  readonly data: string;
  readonly folder: string;
  readonly runId: string;
  readonly certificates: Buffer | undefined;
  readonly expectedKey: Uint8Array | undefined;
  readonly polls: boolean;
  readonly threads: number;
}

function certificatesOf(path: string | undefined): Buffer | undefined {
  try {
    return path === undefined ? undefined : readFileSync(path);
  } catch (error) {
    throw new StopError(`--tls-ca ${path} cannot be read: ${(error as Error).message}.`);
  }
}

/** Reads the command line; undefined if only the usage is wanted. */
function readOptions(): Options | undefined {
  const { values } = parseArgs({
    options: {
      coordinator: { type: "string" },
      name: { type: "string" },
      data: { type: "string" },
      form: { type: "string" },
      run: { type: "string", default: "" },
      "tls-ca": { type: "string" },
      "expect-key": { type: "string" },
      polls: { type: "boolean", default: false },
      threads: { type: "string", default: "1" },
      help: { type: "boolean", default: false },
    },
  });
  if (values.help) return undefined;
  const { coordinator: address, name, data, form: folder } = values;
  if (!address || !name || !data || !folder) throw new StopError(`An option is missing.\n${USAGE}`);
  if (!/^[a-z0-9][a-z0-9-]{0,63}$/.test(name) || name === "replica") {
    throw new StopError(
      `--name ${name} is no worker's name: 1 to 64 of a-z, 0-9 and -, not "replica".`,
    );
  }
  const threads = Number(values.threads);
  if (!(Number.isInteger(threads) && threads >= 1)) {
    throw new StopError(`--threads ${values.threads} is no whole number from 1 on.`);
  }
  return {
    address,
    name,
    data,
    folder,
    runId: values.run,
    certificates: certificatesOf(values["tls-ca"]),
    expectedKey: keyOf(values["expect-key"]),
    polls: values.polls,
    threads,
  };
}

const EXPORT_AGAIN = "Export the base of this run again (docs/edge.md).";

/** Checks that a form is of the run's base, and one that the run admits. */
function checkModel(model: OnnxModel, genesis: Genesis, contract: Contract): void {
  same("manifest digest", model.manifest.digest, genesis.manifest_digest, EXPORT_AGAIN);
  same("base digest", model.baseDigest, genesis.base_digest, EXPORT_AGAIN);
  const form = `onnx:${model.formDigest.toString("hex")}`;
  if (contract.baseForms.length > 0 && !contract.baseForms.includes(form)) {
    throw new StopError(
      `The run admits the forms ${contract.baseForms.join(", ")} of its base, and ours is ` +
        `${form}. ` +
        "Ask the run's operator for an admitted one.",
    );
  }
  if (model.rank !== contract.rank || model.alpha !== contract.alpha) {
    throw new StopError(
      `The run's adapter has rank ${contract.rank} and alpha ${contract.alpha}, and ours has ` +
        `${model.rank} and ${model.alpha}. ${EXPORT_AGAIN}`,
    );
  }
  if (contract.tokensMax > model.positionsMax) {
    throw new StopError(
      `The run's rows have up to ${contract.tokensMax} tokens, and the model knows ` +
        `${model.positionsMax} positions. Ask the run's operator.`,
    );
  }
}

/** The tokenizer's digest, which must be the run's. */
function checkTokenizer(tokenizer: TextTokenizer, genesis: Genesis, contract: Contract): Buffer {
  const texts = templateParts(contract.template).filter((_, place) => place % 2 === 0);
  const words = contract.verbalizers.map(({ word }) => word);
  const { parts, digest } = tokenizer.digest([...texts, ...words]);
  const theirs = genesis.tokenizer_parts ?? [];
  const other = PARTS.filter((_, k) => theirs[k] && Buffer.compare(parts[k], theirs[k]) !== 0);
  const differs = other.length > 0 ? `The tokenizers differ in: ${other.join(", ")}. ` : "";
  same("tokenizer digest", digest, genesis.tokenizer_digest, differs + EXPORT_AGAIN);
  return digest;
}

/** Takes part in the run until it is finished. Returns the last line to print. */
async function work(options: Options, coordinator: Coordinator): Promise<string> {
  const run = await discover(coordinator, options.runId, new Patience(log));
  const record = run.genesis ?? new Uint8Array();
  const genesis = decodeGenesis(record);
  const contract = contractOf(genesis);
  log(`The run is ${contract.runId}: ${contract.recipe}`);

  const model = await OnnxModel.load(options.folder, options.threads);
  checkModel(model, genesis, contract);
  const tokenizer = new TextTokenizer(model.tokenizerJson);
  const tokenizerDigest = checkTokenizer(tokenizer, genesis, contract);

  const task = new ClassificationTask(
    tokenizer,
    contract.template,
    contract.labelColumn,
    contract.verbalizers,
    contract.tokensMax,
  );
  const examples = readRows(options.data, task.columns).map((row) => task.example(row));
  const batches = new Batches(
    contract.seed,
    options.name,
    contract.batchSize,
    contract.localSteps,
    examples.map(({ tokens }) => tokens.length),
  );
  log(`${examples.length} rows are ready.`);

  const weights = new Weights(model.manifest, contract.distribution, model.initial);
  const session = new Session(
    {
      worker: options.name,
      contract,
      genesis: record,
      manifestDigest: model.manifest.digest,
      baseDigest: contract.baseForms.length > 0 ? model.formDigest : model.baseDigest,
      tokenizerDigest,
      rows: examples.length,
    },
    weights,
  );
  const measureWork = async (assigned: Work): Promise<Outcome> => {
    const batch = batches.rows(assigned.round, 0).map((row) => examples[row]);
    const measurement = await measure(
      assigned.plan,
      assigned.weights,
      model.manifest,
      contract.distribution,
      (at) => model.loss(batch, task.verbalizerTokens, at),
      () => assigned.wanted(),
    );
    return measurement ? { kind: "measured", measurement } : { kind: "cut short" };
  };
  const worker = new Worker({
    coordinator,
    session,
    runId: contract.runId,
    genesis: record,
    polls: options.polls,
    expectedKey: options.expectedKey,
    measure: measureWork,
    log,
  });
  await worker.run();
  return `round ${session.round}, digest ${weights.digest().toString("hex")}`;
}

async function main(): Promise<void> {
  const options = readOptions();
  if (options === undefined) {
    process.stdout.write(`${USAGE}\n`);
    return;
  }
  const coordinator = new Coordinator(options.address, options.certificates);
  try {
    process.stdout.write(`${await work(options, coordinator)}\n`);
  } finally {
    coordinator.close();
  }
}

main().catch((error: Error & { code?: string }) => {
  const ours = error instanceof StopError || error.code?.startsWith("ERR_PARSE_ARGS");
  log(ours ? error.message : (error.stack ?? error.message));
  process.exitCode = 1;
});
