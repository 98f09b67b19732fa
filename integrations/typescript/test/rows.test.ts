import assert from "node:assert/strict";
import { test } from "node:test";
import { Batches, philox64 } from "../src/batches.js";
import { asciiJson } from "../src/hashing.js";
import { ClassificationTask, labelForm, templateParts } from "../src/task.js";
import { TextTokenizer } from "../src/tokens.js";
import { hex, readText, seed, vectors } from "./vectors.js";

test("words of Philox4x64-10", () => {
  for (const { key_bytes, first_words } of vectors("batches.json").philox4x64) {
    const words = philox64(Buffer.from(key_bytes, "hex"));
    const wanted: string[] = first_words.split(" ");
    assert.deepEqual(
      wanted.map(() => hex(words.next().value as bigint)),
      wanted,
    );
  }
});

test("rows of each batch", () => {
  for (const value of vectors("batches.json").cases) {
    const batches = new Batches(
      seed(value.run_seed),
      value.worker,
      value.batch_size,
      value.local_steps,
      value.token_counts,
    );
    for (const { round, step, rows } of value.batches) {
      assert.deepEqual(batches.rows(BigInt(round), step), rows, `${value.worker}, round ${round}`);
    }
  }
});

test("templates and labels", () => {
  const { templates, labels } = vectors("text.json");
  for (const { template, parts } of templates) assert.deepEqual(templateParts(template), parts);
  for (const { label, form } of labels) assert.equal(labelForm(label), form);
  assert.throws(() => templateParts("{text"), /single \{/);
  assert.throws(() => templateParts("{a!b}"), /names no column/);
  assert.throws(() => templateParts("{ a}"), /names no column/);
});

test("prompts of rows, cut ones and ones that spell a control token too", () => {
  const { classification } = vectors("text.json");
  const task = new ClassificationTask(
    new TextTokenizer(readText("tokenizer.json")),
    classification.template,
    "label",
    Object.entries<string>(classification.verbalizers).map(([label, word]) => ({ label, word })),
    classification.tokens_max,
  );
  assert.deepEqual(task.verbalizerTokens, classification.verbalizer_tokens);
  for (const { row, prompt } of classification.examples) {
    const example = task.example(row);
    assert.deepEqual(example.tokens, prompt);
    assert.equal(example.label, row.label === "negative" ? 0 : 1);
  }
  assert.throws(() => task.example({ text: "a", label: "neutral" }), /label "neutral"/);
  assert.equal(task.example({ text: "a", label: "\ufeffpositive" }).label, 1);
});

test("JSON strings in ASCII", () => {
  for (const { code_points, json } of vectors("text.json").json_strings) {
    assert.equal(asciiJson(String.fromCodePoint(...code_points)), json);
  }
});

test("the tokenizer's digest", () => {
  const { classification, tokenizer_parts, tokenizer_digest } = vectors("text.json");
  const words = Object.values<string>(classification.verbalizers);
  const texts = templateParts(classification.template).filter((_, place) => place % 2 === 0);
  const { parts, digest } = new TextTokenizer(readText("tokenizer.json")).digest([
    ...texts,
    ...words,
  ]);
  assert.deepEqual(
    parts.map((part) => part.toString("hex")),
    tokenizer_parts,
  );
  assert.equal(digest.toString("hex"), tokenizer_digest);
});
