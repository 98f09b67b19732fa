/** From rows of text to prompts and classes (docs/protocol.md, section 6). */
import { StopError } from "./errors.js";
import type { TextTokenizer } from "./tokens.js";

export type Row = Readonly<Record<string, string>>;

export interface Example {
  readonly tokens: readonly number[];
  /** Place of the row's class in the verbalizers. */
  readonly label: number;
}

/** Splits a template: text at even places, names of columns at odd ones. */
export function templateParts(template: string): string[] {
  const parts = [""];
  const pieces = /\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+/g;
  for (const [piece, column] of template.matchAll(pieces)) {
    if (column !== undefined && piece !== "{{" && piece !== "}}") {
      if (!/^[\p{L}\p{M}\p{N} ._-]+$/u.test(column) || column.trim() !== column) {
        throw new StopError(
          `The template has ${piece}, which names no column. Ask the run's operator.`,
        );
      }
      parts.push(column, "");
    } else if (piece === "{" || piece === "}") {
      throw new StopError(
        `The template has a single ${piece}; {{ and }} are braces. Ask the run's operator.`,
      );
    } else {
      parts[parts.length - 1] += piece === "{{" ? "{" : piece === "}}" ? "}" : piece;
    }
  }
  return parts;
}

/** The form in which two labels are compared if no verbalizer has the row's own spelling. */
export function labelForm(label: string): string {
  const text = label.normalize("NFC").replaceAll("\ufeff", "");
  if (/^(true|false)$/i.test(text)) return text.toLowerCase();
  return text.replace(/^([+-]?\d+)\.0+$/, "$1");
}

export class ClassificationTask {
  /** The token that stands for each class, in the contract's order. */
  readonly verbalizerTokens: readonly number[];
  private readonly parts: readonly string[];
  private readonly before: readonly number[];
  private readonly after: readonly number[];
  private readonly places: ReadonlyMap<string, number>;
  private readonly forms: ReadonlyMap<string, number>;

  constructor(
    private readonly tokenizer: TextTokenizer,
    template: string,
    private readonly labelColumn: string,
    verbalizers: readonly { readonly label: string; readonly word: string }[],
    private readonly tokensMax: number,
  ) {
    this.parts = templateParts(template);
    const first = tokenizer.ofContract(this.parts[0]);
    const already = tokenizer.before.length > 0 && first[0] === tokenizer.before[0];
    this.before = already ? [] : tokenizer.before;

    const tail = this.parts.at(-1) || ".";
    const tailTokens = tokenizer.ofContract(tail);
    const words = verbalizers.map(({ word }) => {
      const tokens = tokenizer.ofContract(tail + word);
      if (!tailTokens.every((token, place) => tokens[place] === token)) {
        throw new StopError(
          `The verbalizer ${JSON.stringify(word)} merges with the template's end ` +
            `${JSON.stringify(tail)}. Ask the run's operator for another word.`,
        );
      }
      return tokens.slice(tailTokens.length);
    });
    let shared = 0;
    while (words.every((word) => shared < word.length && word[shared] === words[0][shared]))
      shared++;
    this.after = words[0].slice(0, shared);
    this.verbalizerTokens = words.map((word) => word[shared] ?? -1);
    if (new Set(this.verbalizerTokens).size < words.length || this.verbalizerTokens.includes(-1)) {
      throw new StopError(
        `The verbalizers ${verbalizers.map(({ word }) => JSON.stringify(word)).join(", ")} do ` +
          "not differ in their first tokens. Ask the run's operator for other words.",
      );
    }
    this.places = new Map(verbalizers.map(({ label }, place) => [label, place]));
    const forms = verbalizers.map(({ label }) => labelForm(label));
    // A form that two verbalizers share means neither.
    this.forms = new Map(
      forms
        .map((form, place) => [form, place] as const)
        .filter(
          ([form, place]) => forms.indexOf(form) === place && forms.lastIndexOf(form) === place,
        ),
    );
  }

  /** Columns of the rows that the task reads. */
  get columns(): readonly string[] {
    return [...new Set([...this.parts.filter((_, place) => place % 2 === 1), this.labelColumn])];
  }

  example(row: Row): Example {
    const label = row[this.labelColumn];
    const place = this.places.get(label) ?? this.forms.get(labelForm(label));
    if (place === undefined) {
      const known = [...this.places.keys()].map((text) => JSON.stringify(text)).join(", ");
      throw new StopError(
        `A row has the label ${JSON.stringify(label)} in column ` +
          `${JSON.stringify(this.labelColumn)}, and the run knows ${known}.`,
      );
    }
    return { tokens: this.prompt(row), label: place };
  }

  private prompt(row: Row): number[] {
    const texts = this.parts.map((part, k) => (k % 2 === 1 ? [...row[part]] : part));
    const cutTo = (length: number): number[] =>
      this.tokenizer.ofPrompt(
        texts.map((text) => (typeof text === "string" ? text : text.slice(0, length).join(""))),
      );
    const budget = this.tokensMax - this.before.length - this.after.length;
    const longest = Math.max(
      0,
      ...texts.map((text) => (typeof text === "string" ? 0 : text.length)),
    );
    let tokens = cutTo(longest);
    if (tokens.length > budget) {
      let low = 0;
      let high = 1 + longest;
      tokens = cutTo(0);
      if (tokens.length > budget) {
        throw new StopError(
          `The template alone has ${tokens.length} tokens and the run allows ${budget}. Ask its ` +
            "operator for a larger tokens_max.",
        );
      }
      while (high - low > 1) {
        const middle = Math.floor((low + high) / 2);
        const candidate = cutTo(middle);
        if (candidate.length <= budget) {
          low = middle;
          tokens = candidate;
        } else {
          high = middle;
        }
      }
    }
    return [...this.before, ...tokens, ...this.after];
  }
}
