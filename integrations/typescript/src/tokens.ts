/** The tokenizer of a tokenizer.json, and its digest (docs/protocol.md, section 6). */
import { Tokenizer } from "@huggingface/tokenizers";
import { StopError } from "./errors.js";
import { asciiJson, compareCodePoints, numberText, sha256 } from "./hashing.js";

interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly single_word?: boolean;
  readonly lstrip?: boolean;
  readonly rstrip?: boolean;
  readonly normalized?: boolean;
  readonly special?: boolean;
}

interface TokenizerFile {
  readonly added_tokens?: readonly AddedToken[];
  readonly model: Readonly<Record<string, unknown>>;
  readonly normalizer?: unknown;
  readonly pre_tokenizer?: unknown;
  readonly decoder?: unknown;
}

/** Token ids of a text, with or without the tokenizer's own special tokens. */
function encode(tokenizer: Tokenizer, text: string, special = false): number[] {
  return tokenizer.encode(text, { add_special_tokens: special }).ids as number[];
}

/** Whether a row's text may not become this token. */
function isControl({ content, special }: AddedToken): boolean {
  if (special) return true;
  const characters = [...content];
  const plain = (character: string | undefined): boolean => /[\p{L}\p{N}]/u.test(character ?? "");
  return characters.some(plain) && !plain(characters[0]) && !plain(characters.at(-1));
}

/** What a tokenizer's digest is made of, in order. */
export const PARTS = [
  "vocabulary",
  "normalizer",
  "pre-tokenizer",
  "added tokens",
  "tokens before a prompt",
  "end-of-text token",
  "decoder",
] as const;

/** A number that the tokenizers library holds as binary64, also where it is whole. */
class Binary64 {
  constructor(readonly value: number) {}
}

/** JSON with sorted keys, no spaces and no members that mean nothing. */
function canonicalJson(value: unknown): string {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") return asciiJson(value);
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : numberText(value);
  if (value instanceof Binary64) return numberText(value.value);
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(",")}]`;
  const members = Object.entries(value as Record<string, unknown>)
    .filter(
      ([key, member]) => key !== "trim_offsets" && ![null, false, ""].includes(member as null),
    )
    .sort(([left], [right]) => compareCodePoints(left, right))
    .map(([key, member]) => `${asciiJson(key)}:${canonicalJson(member)}`);
  return `{${members.join(",")}}`;
}

function vocabularyOf(model: Readonly<Record<string, unknown>>): unknown {
  const { merges, vocab, ...rest } = model;
  const value: Record<string, unknown> = { ...rest, vocab };
  if (Array.isArray(merges)) {
    value["merges"] = merges.map((merge: unknown) =>
      typeof merge === "string" ? merge.split(" ") : merge,
    );
  }
  if (model["type"] === "Unigram") {
    const scored = vocab as readonly (readonly [string, number])[];
    value["vocab"] = scored.map(([token, score]) => [token, new Binary64(score)]);
  }
  if (model["type"] === "BPE" && model["byte_fallback"] === true) {
    const bytes = Array.from(
      { length: 256 },
      (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`,
    );
    if (bytes.every((byte) => Object.hasOwn(vocab as object, byte))) {
      delete value["unk_token"];
      delete value["fuse_unk"];
    }
  }
  return value;
}

export class TextTokenizer {
  /** Special tokens that the tokenizer puts before every text. */
  readonly before: readonly number[];
  private readonly file: TokenizerFile;
  private readonly control: readonly AddedToken[];
  private readonly whole: Tokenizer;
  private readonly plain: Tokenizer;

  constructor(json: string) {
    this.file = JSON.parse(json) as TokenizerFile;
    const added = this.file.added_tokens ?? [];
    this.control = added.filter(isControl);
    this.whole = new Tokenizer(this.file, {});
    this.plain = new Tokenizer(
      { ...this.file, added_tokens: added.filter((token) => !isControl(token)) },
      {},
    );
    const bare = encode(this.whole, "a");
    const dressed = encode(this.whole, "a", true);
    const at = dressed.findIndex((_, start) => bare.every((id, k) => dressed[start + k] === id));
    if (at < 0)
      throw new StopError('The tokenizer writes "a" in another way when it adds special tokens.');
    this.before = dressed.slice(0, at);
  }

  /** Tokens of a text of the contract: control tokens in it are control tokens. */
  ofContract(text: string): number[] {
    return encode(this.whole, text);
  }

  /**
   * Tokens of template parts with a row's text between them. Text at odd places never becomes a
   * control token.
   */
  ofPrompt(parts: readonly string[]): number[] {
    const text = parts.join("");
    const inTemplate = parts.some(
      (part, place) =>
        place % 2 === 0 && this.control.some(({ content }) => part.includes(content)),
    );
    if (!inTemplate) return encode(this.plain, text);
    for (const { content } of this.control) {
      const inParts = parts.reduce(
        (sum, part, place) => sum + (place % 2 === 0 ? part.split(content).length - 1 : 0),
        0,
      );
      if (text.split(content).length - 1 !== inParts) {
        throw new StopError(
          `A row's text spells the control token ${content}, and the template has control ` +
            "tokens. This worker cannot tell them apart; take that row out.",
        );
      }
    }
    return this.ofContract(text);
  }

  /** The digest that a hello names, for a contract of template version 3. */
  digest(parts: readonly string[]): { readonly parts: readonly Buffer[]; readonly digest: Buffer } {
    const absent = new Set(
      this.control
        .filter(({ content }) => !parts.some((part) => part.includes(content)))
        .map(({ id }) => id),
    );
    const added = [...(this.file.added_tokens ?? [])]
      .sort((left, right) => left.id - right.id)
      .filter(({ id }) => !absent.has(id))
      .map((token) => [
        token.id,
        token.content,
        token.single_word ?? false,
        token.lstrip ?? false,
        token.rstrip ?? false,
        token.normalized ?? false,
      ]);
    const values: Readonly<Record<(typeof PARTS)[number], unknown>> = {
      vocabulary: vocabularyOf(this.file.model),
      normalizer: this.file.normalizer ?? null,
      "pre-tokenizer": this.file.pre_tokenizer ?? null,
      "added tokens": [false, ...added],
      "tokens before a prompt": this.before,
      // Only instruction tuning and generated text need the last two.
      "end-of-text token": null,
      decoder: null,
    };
    const hashes = PARTS.map((name) => sha256(`${name}\n`, canonicalJson(values[name])));
    return { parts: hashes, digest: sha256("fedmezo tokenizer 2\n", ...hashes) };
  }
}
