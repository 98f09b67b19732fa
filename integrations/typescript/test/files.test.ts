import assert from "node:assert/strict";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { OnnxModel, readSafetensors } from "../src/onnx.js";
import { readRows } from "../src/rows.js";

function folderWith(files: Readonly<Record<string, string | Buffer>>): string {
  const folder = mkdtempSync(join(tmpdir(), "fedmezo-"));
  for (const [name, content] of Object.entries(files)) writeFileSync(join(folder, name), content);
  return folder;
}

test("rows become text, file after file", () => {
  const folder = folderWith({
    "b.jsonl": '{"a": 5.0, "b": true}\n\n{"a": 0.00001, "b": "\\ud800"}\n',
    "a.jsonl": '{"a": "x", "b": "y", "other": [null]}\r\n',
    ".hidden.jsonl": "no rows",
  });
  assert.deepEqual(readRows(folder, ["a", "b"]), [
    { a: "x", b: "y" },
    { a: "5", b: "true" },
    { a: "1e-05", b: "\ufffd" },
  ]);
});

test("a bad row is named with its file and number", () => {
  for (const [row, sentence] of [
    ["[1]", /Row 2 of .*rows.jsonl is no JSON object/],
    ["{", /Row 2 of .* is no JSON object/],
    ['{"a": null}', /Row 2 of .* has nothing in column "a"/],
    ['{"a": " "}', /has nothing in column "a"/],
    ['{"b": 1}', /has nothing in column "a"/],
    ['{"a": {}}', /column "a", is \{\}; write it as text/],
    ['{"a": 12345678901234567890}', /write it as text/],
  ] as const) {
    const folder = folderWith({ "rows.jsonl": `{"a": "good"}\n${row}\n` });
    assert.throws(() => readRows(folder, ["a"]), sentence);
  }
  assert.throws(() => readRows(folderWith({ "rows.jsonl": "\n" }), ["a"]), /holds no rows/);
  assert.throws(() => readRows("/no/such/file", ["a"]), /no file or folder/);
  assert.throws(
    () => readRows(join(folderWith({ "rows.csv": "a\n" }), "rows.csv"), ["a"]),
    /\.jsonl/,
  );
});

test("tensors of a safetensors file", () => {
  const header = JSON.stringify({
    __metadata__: { of: "a test" },
    w: { dtype: "F32", shape: [1, 2], data_offsets: [0, 8] },
  });
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  const values = Buffer.from(Float32Array.of(1.5, -2).buffer);
  const folder = folderWith({
    "a.safetensors": Buffer.concat([length, Buffer.from(header), values]),
  });
  assert.deepEqual(readSafetensors(join(folder, "a.safetensors")), [
    { name: "w", shape: [1, 2], values: Float32Array.of(1.5, -2) },
  ]);
});

test("a form of a base that is none, or that changed, is refused", async () => {
  await assert.rejects(OnnxModel.load(folderWith({}), 1), /holds no form of a base/);
  const form = { version: 1, kind: "gguf", files: {} };
  await assert.rejects(
    OnnxModel.load(folderWith({ "form.json": JSON.stringify(form) }), 1),
    /kind gguf/,
  );
  const changed = { version: 1, kind: "onnx", files: { "tokenizer.json": "00" } };
  await assert.rejects(
    OnnxModel.load(folderWith({ "form.json": JSON.stringify(changed), "tokenizer.json": "{}" }), 1),
    /tokenizer.json in .* is not the file that was exported/,
  );
});
