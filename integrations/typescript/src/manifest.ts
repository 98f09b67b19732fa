/** The trained tensors of an adapter, and their values (docs/protocol.md, sections 4 and 9). */
import { applyCommit, type Pair, type Placement } from "./arithmetic.js";
import { StopError } from "./errors.js";
import { asciiJson, compareCodePoints, sha256, tensorsDigest } from "./hashing.js";
import type { Distribution } from "./noise.js";

export interface NamedShape {
  readonly name: string;
  readonly shape: readonly number[];
}

/** A tensor of the manifest. Its place in the list is its `tensorId`. */
export interface TrainedTensor extends NamedShape, Placement {
  readonly elements: number;
}

/** The ordered trained tensors, their canonical bytes and their digest. */
export class Manifest {
  readonly tensors: readonly TrainedTensor[];
  readonly text: string;
  readonly digest: Buffer;
  readonly elements: number;

  /** All tensors are float32, as an adapter's are in every run. */
  constructor(tensors: readonly NamedShape[]) {
    this.tensors = [...tensors]
      .sort((left, right) => compareCodePoints(left.name, right.name))
      .map(({ name, shape }, tensorId) => ({
        name,
        shape,
        tensorId,
        columns: shape.at(-1) ?? 1,
        elements: shape.reduce((product, length) => product * length, 1),
      }));
    const lines = this.tensors.map(
      ({ name, shape }, id) => `${id}\t${asciiJson(name)}\tfloat32\t${shape.join("x")}\n`,
    );
    this.text = `fedmezo manifest 1\n${lines.join("")}`;
    this.digest = sha256(this.text);
    this.elements = this.tensors.reduce((sum, tensor) => sum + tensor.elements, 0);
  }
}

/** What a commit does to the weights. */
export interface WeightChange {
  readonly decay: number;
  readonly pairs: readonly Pair[];
}

const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;

/** The values of the trained tensors, in manifest order. */
export class Weights {
  readonly values: readonly Float32Array[];

  constructor(
    readonly manifest: Manifest,
    readonly distribution: Distribution,
    private readonly base: readonly Float32Array[],
  ) {
    if (!littleEndian) {
      throw new StopError(
        "This processor is big-endian, and the digests need little-endian bytes.",
      );
    }
    this.values = base.map((tensor) => tensor.slice());
  }

  /** Back to the base. */
  reset(): void {
    this.values.forEach((tensor, id) => tensor.set(this.base[id]));
  }

  copy(): Float32Array[] {
    return this.values.map((tensor) => tensor.slice());
  }

  apply(change: WeightChange): void {
    for (const { tensorId, columns, name } of this.manifest.tensors) {
      const values = this.values[tensorId];
      applyCommit(values, { tensorId, columns }, this.distribution, change.decay, change.pairs);
      const bad = values.findIndex((value) => !Number.isFinite(value));
      if (bad >= 0) {
        throw new StopError(
          `Element ${bad} of ${name} is ${values[bad]} after this commit; the run's weights are ` +
            "unusable. Begin a new run with a smaller learning rate.",
        );
      }
    }
  }

  digest(): Buffer {
    return tensorsDigest(
      `fedmezo weights 1\n${this.manifest.text}`,
      this.values.map((v) => new Uint8Array(v.buffer, v.byteOffset, v.byteLength)),
    );
  }
}
