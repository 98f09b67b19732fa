/** Rows of text from .jsonl files (docs/data.md). */
import { readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { StopError } from "./errors.js";
import { numberText } from "./hashing.js";
import type { Row } from "./task.js";

function filesOf(path: string): string[] {
  let folder: boolean;
  try {
    folder = statSync(path).isDirectory();
  } catch {
    throw new StopError(`There is no file or folder ${path}. Give one with --data.`);
  }
  const files = folder
    ? readdirSync(path)
        .filter((name) => name.endsWith(".jsonl") && !name.startsWith("."))
        .sort()
        .map((name) => join(path, name))
    : [path];
  const other = files.find((file) => !file.endsWith(".jsonl"));
  if (other !== undefined || files.length === 0) {
    throw new StopError(
      `${other ?? path} holds no rows for this worker, which reads .jsonl files.`,
    );
  }
  return files;
}

/** A value as text, or undefined if it is missing. */
function textOf(value: unknown, place: string): string | undefined {
  if (value === null || value === undefined) return undefined;
  if (typeof value === "boolean") return String(value);
  if (typeof value === "string") return value.replace(/\p{Surrogate}/gu, "\ufffd");
  if (typeof value === "number" && Number.isSafeInteger(value)) return String(value);
  if (typeof value === "number" && !Number.isInteger(value)) return numberText(value);
  throw new StopError(`${place} is ${JSON.stringify(value)}; write it as text.`);
}

function objectOf(line: string): Readonly<Record<string, unknown>> | undefined {
  try {
    const value: unknown = JSON.parse(line);
    const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
    return isObject ? (value as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

/** Reads the named columns of all rows, in the order of the files. */
export function readRows(path: string, columns: readonly string[]): Row[] {
  const rows: Row[] = [];
  for (const file of filesOf(path)) {
    readFileSync(file, "utf8")
      .split("\n")
      .forEach((line, at) => {
        if (line.trim() === "") return;
        const place = `Row ${at + 1} of ${file}`;
        const object = objectOf(line);
        if (object === undefined) {
          throw new StopError(`${place} is no JSON object; write one object in each line.`);
        }
        const row: Record<string, string> = {};
        for (const column of columns) {
          const text = textOf(object[column], `${place}, column ${JSON.stringify(column)},`);
          if (text === undefined || text.trim() === "") {
            throw new StopError(
              `${place} has nothing in column ${JSON.stringify(column)}; fill it in.`,
            );
          }
          row[column] = text;
        }
        rows.push(row);
      });
  }
  if (rows.length === 0) throw new StopError(`${path} holds no rows. A worker needs at least one.`);
  return rows;
}
