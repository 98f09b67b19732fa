/** A base as an ONNX graph whose inputs are the tokens and the adapter (docs/edge.md). */
import { createHash } from "node:crypto";
import { createReadStream, readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { StopError } from "./errors.js";
import { sha256 } from "./hashing.js";
import { Manifest, type NamedShape } from "./manifest.js";
import { rowLoss } from "./measuring.js";
import type { Example } from "./task.js";

/** form.json, as far as this worker uses it. */
interface Form {
  readonly version: number;
  readonly kind: string;
  readonly files: Readonly<Record<string, string>>;
  readonly model_file: string;
  readonly base_digest: string;
  readonly trained: readonly string[];
  readonly rank: number;
  readonly alpha: number;
  readonly positions_max?: number;
}

interface Tensor extends NamedShape {
  readonly values: Float32Array;
}

/** Reads the float32 tensors of a safetensors file. */
export function readSafetensors(path: string): Tensor[] {
  const file = readFileSync(path);
  const headerBytes = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, 8 + headerBytes)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  delete header["__metadata__"];
  return Object.entries(header).map(
    ([
      name,
      {
        dtype,
        shape,
        data_offsets: [start, end],
      },
    ]) => {
      if (dtype !== "F32") throw new StopError(`${name} of ${path} is ${dtype}; adapters are F32.`);
      const bytes = file.subarray(8 + headerBytes + start, 8 + headerBytes + end);
      return { name, shape, values: new Float32Array(new Uint8Array(bytes).buffer) };
    },
  );
}

async function sha256OfFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) {
    hash.update(chunk as Buffer);
  }
  return hash.digest("hex");
}

export class OnnxModel {
  private constructor(
    /** SHA-256 of form.json, which names all files. */
    readonly formDigest: Buffer,
    /** Digest of the base that the form was made from. */
    readonly baseDigest: Buffer,
    readonly rank: number,
    readonly alpha: number,
    readonly positionsMax: number,
    readonly tokenizerJson: string,
    readonly manifest: Manifest,
    /** The trained tensors' initial values, in manifest order. */
    readonly initial: readonly Float32Array[],
    private readonly frozen: Readonly<Record<string, ort.Tensor>>,
    private readonly session: ort.InferenceSession,
  ) {}

  /** Loads the form of a base in `folder`, and checks that no file of it has changed. */
  static async load(folder: string, threads: number): Promise<OnnxModel> {
    let form: Form;
    let formDigest: Buffer;
    try {
      const json = readFileSync(join(folder, "form.json"));
      formDigest = sha256(json);
      form = JSON.parse(json.toString("utf8")) as Form;
    } catch (error) {
      throw new StopError(
        `${folder} holds no form of a base (${(error as Error).message}). Export one, as ` +
          "docs/edge.md says.",
      );
    }
    if (form.version !== 1 || form.kind !== "onnx") {
      throw new StopError(
        `The form in ${folder} is of kind ${form.kind}, version ${form.version}; this worker ` +
          "takes onnx, version 1.",
      );
    }
    for (const [name, wanted] of Object.entries(form.files)) {
      if ((await sha256OfFile(join(folder, name))) !== wanted) {
        throw new StopError(
          `${name} in ${folder} is not the file that was exported. Export it again.`,
        );
      }
    }
    const tensors = new Map(
      readSafetensors(join(folder, "adapter.safetensors")).map((tensor) => [tensor.name, tensor]),
    );
    const manifest = new Manifest(
      form.trained.map((name) => {
        const tensor = tensors.get(name);
        if (!tensor) throw new StopError(`adapter.safetensors in ${folder} lacks ${name}.`);
        return tensor;
      }),
    );
    const initial = manifest.tensors.map(
      ({ name }) => tensors.get(name)?.values ?? new Float32Array(),
    );
    const frozen: Record<string, ort.Tensor> = {};
    for (const { name, shape, values } of tensors.values()) {
      if (!form.trained.includes(name)) frozen[name] = new ort.Tensor("float32", values, shape);
    }
    const session = await ort.InferenceSession.create(join(folder, form.model_file), {
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      logSeverityLevel: 3,
    });
    return new OnnxModel(
      formDigest,
      Buffer.from(form.base_digest, "hex"),
      form.rank,
      form.alpha,
      form.positions_max ?? Infinity,
      readFileSync(join(folder, "tokenizer.json"), "utf8"),
      manifest,
      initial,
      frozen,
      session,
    );
  }

  /** Mean cross-entropy of a batch between the verbalizers' tokens, in nats. */
  async loss(
    examples: readonly Example[],
    verbalizerTokens: readonly number[],
    weights: readonly Float32Array[],
  ): Promise<number> {
    const count = examples.length;
    const length = Math.max(...examples.map(({ tokens }) => tokens.length));
    const ids = new BigInt64Array(count * length);
    const mask = new BigInt64Array(count * length);
    const positions = new BigInt64Array(count * length);
    examples.forEach(({ tokens }, row) => {
      for (let column = 0; column < length; column++) {
        const at = row * length + column;
        positions[at] = BigInt(column);
        if (column < tokens.length) {
          ids[at] = BigInt(tokens[column]);
          mask[at] = 1n;
        }
      }
    });
    const feeds: Record<string, ort.Tensor> = {
      ...this.frozen,
      input_ids: new ort.Tensor("int64", ids, [count, length]),
      attention_mask: new ort.Tensor("int64", mask, [count, length]),
      position_ids: new ort.Tensor("int64", positions, [count, length]),
      rows: new ort.Tensor(
        "int64",
        BigInt64Array.from(examples, (_, row) => BigInt(row)),
        [count],
      ),
      columns: new ort.Tensor(
        "int64",
        BigInt64Array.from(examples, ({ tokens }) => BigInt(tokens.length - 1)),
        [count],
      ),
    };
    for (const { tensorId, name, shape } of this.manifest.tensors) {
      feeds[name] = new ort.Tensor("float32", weights[tensorId], shape);
    }
    const { logits } = await this.session.run(feeds);
    const values = logits.data as Float32Array;
    const vocabulary = logits.dims[1];
    let sum = 0;
    examples.forEach(({ label }, row) => {
      sum += rowLoss(
        verbalizerTokens.map((token) => values[row * vocabulary + token]),
        label,
      );
    });
    return sum / count;
  }
}
