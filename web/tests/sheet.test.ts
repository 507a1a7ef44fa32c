import { expect, test } from "vitest";
import { measured } from "../src/lib/arrays";
import type { Matrix } from "../src/lib/heatmap";
import { describeCell, describeSample, infoOf, sheetOf, sheetOfAll, standing } from "../src/lib/sheet";
import type { TransferAnswer } from "../src/lib/types";

function answer(source: string, target: string, layers: [number[], number[]], matrices: Record<string, Matrix>): TransferAnswer {
  return {
    info: {
      metric: "matching",
      source,
      target,
      source_layers: layers[0],
      target_layers: layers[1],
      quantity: "share",
      null: "by chance",
      ceiling: null,
      num_tokens: source === target ? 2000 : 1000,
      num_documents: 10,
      coverage: source === target ? 1 : 0.5,
      seed: 0,
      details: {},
    },
    matrices,
  };
}

const own = answer("a", "a", [[0, 2], [0, 2]], { value: [[1, 0.5], [0.4, 1]], low: [[1, 0.4], [0.3, 1]], high: [[1, 0.6], [0.5, 1]], null: [[0.1, 0.1], [0.35, 0.1]], ceiling: [[null, null], [null, null]] });
const other = answer("a", "b", [[0, 2], [1]], { value: [[0.7], [0.8]] });

test("all models in one matrix, in the study's order, null where nothing was computed", () => {
  const sheet = sheetOfAll([own, other], ["b", "a"]);
  expect(sheet.rows).toEqual([
    { model: "b", layer: 1 },
    { model: "a", layer: 0 },
    { model: "a", layer: 2 },
  ]);
  expect(sheet.matrices.value).toEqual([[null, null, null], [0.7, 1, 0.5], [0.8, 0.4, 1]]);
  expect(sheet.matrices.ceiling).toBeUndefined();
  expect(infoOf(sheet, { row: 1, column: 0 })?.target).toBe("b");
  expect(infoOf(sheet, { row: 0, column: 1 })).toBeNull();
});

test("a cell says value with interval, null, and where it stands", () => {
  const sheet = sheetOf(own);
  const known = measured("matching", Object.keys(sheet.matrices));
  const value = known[0];
  if (!value) throw new Error("no value");
  expect(known.map(({ name }) => name)).toEqual(["value", "null"]);
  expect(describeCell(sheet, value, known, { row: 0, column: 1 })).toEqual([
    "a layer 0 → a layer 2",
    "value: 0.5 (0.4 to 0.6)",
    "null: 0.1",
    "n = 2,000 tokens of 10 documents",
  ]);
  expect(standing(sheet, value, { row: 0, column: 1 })).toBe("above the null");
  expect(standing(sheet, value, { row: 1, column: 0 })).toBe("not told apart from the null");
});

test("matrices that are not known are offered by their names, bounds are not", () => {
  const names = measured("matching", ["value", "low", "high", "my_own", "my_own_low", "my_own_high", "cause_drop_low"]).map(({ name, title, low }) => [name, title, low]);
  expect(names.slice(0, 2)).toEqual([["value", "value", "low"], ["my_own", "my own", "my_own_low"]]);
  expect(names.flat()).not.toContain("my_own_low ");
  expect(names.map(([name]) => name)).not.toContain("my_own_low");
});

test("a ceiling of another matrix stands beside it", () => {
  const [orthogonal] = measured("reconstruction", ["orthogonal", "null_orthogonal", "ceiling"]);
  expect(orthogonal?.nulls).toEqual(["null_orthogonal"]);
  expect(orthogonal?.ceilings).toEqual(["ceiling"]);
});

test("a ceiling of several seeds has their range beside it", () => {
  const one = (value: number): Matrix => [[value]];
  const sheet = sheetOf(answer("a", "b", [[0], [1]], { value: one(0.5), ceiling: one(0.8), ceiling_min: one(0.7), ceiling_max: one(0.9), num_twins: one(3) }));
  const known = measured("matching", Object.keys(sheet.matrices));
  expect(known.map(({ name }) => name)).toEqual(["value", "ceiling"]);
  expect(describeCell(sheet, known[0] as (typeof known)[0], known, { row: 0, column: 0 })).toContain("ceiling: 0.8 (0.7 to 0.9 over 3 seeds)");
});

test("the sample is told as a span where results differ", () => {
  expect(describeSample([own.info, other.info])).toBe("n = 1,000 to 2,000 tokens of 10 documents, 50 % to 100 % of the source's tokens aligned, seed 0");
});
