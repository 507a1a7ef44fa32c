import { expect, test } from "vitest";
import { sequential } from "../src/lib/colors";
import { beyond, blocks, cellAt, numbered, pixels, reveal, stepTo, WHOLE, type Place } from "../src/lib/heatmap";
import { heatmapSvg } from "../src/lib/heatmapSvg";

const places = (model: string, num: number): Place[] => Array.from({ length: num }, (_, layer) => ({ model, layer }));
const two = [...places("a", 3), ...places("b", 2)];

test("consecutive places of one model are a block", () => {
  expect(blocks(two)).toEqual([
    { model: "a", first: 0, end: 3 },
    { model: "b", first: 3, end: 5 },
  ]);
});

test("every place has a number if there is room, and else each model begins anew", () => {
  expect(numbered(two, 20, 14)).toEqual([0, 1, 2, 3, 4]);
  expect(numbered([...places("a", 8), ...places("b", 8)], 4, 14)).toEqual([0, 4, 8, 12]);
  expect(numbered([...places("a", 9), ...places("b", 1)], 4, 14)).toEqual([0, 4, 9]); // 8 would touch the next model's first
});

test("a point is the cell below it, also where the map is zoomed, and none beside it", () => {
  expect(cellAt(WHOLE, 4, 2, 0.6, 0.3)).toEqual({ row: 1, column: 1 });
  expect(cellAt({ k: 2, x: -1, y: -1 }, 4, 2, 0.1, 0.1)).toEqual({ row: 2, column: 1 });
  expect(cellAt(WHOLE, 4, 2, 1.01, 0.5)).toBeNull();
});

test("a view moves as little as shows the cell", () => {
  const view = { k: 4, x: 0, y: 0 };
  expect(reveal(view, { row: 0, column: 0 }, 8, 8)).toEqual(view);
  expect(reveal(view, { row: 7, column: 2 }, 8, 8)).toEqual({ k: 4, x: -0.5, y: -3 });
});

test("arrow keys stay inside, and other keys lead nowhere", () => {
  expect(stepTo("ArrowDown", null, 3, 3)).toEqual({ row: 0, column: 0 });
  expect(stepTo("ArrowUp", { row: 0, column: 1 }, 3, 3)).toEqual({ row: 0, column: 1 });
  expect(stepTo("End", { row: 1, column: 0 }, 3, 5)).toEqual({ row: 1, column: 4 });
  expect(stepTo("x", { row: 1, column: 0 }, 3, 5)).toBeNull();
});

test("a cell without a value is transparent; the others have the scale's colours", () => {
  const data = pixels([[0, null], [1, 5]], [0, 1]);
  const color = (i: number) => `rgb(${[...data.slice(4 * i, 4 * i + 3)].join(", ")})`;
  expect(data[7]).toBe(0);
  expect([data[3], data[11]]).toEqual([255, 255]);
  expect(color(0)).toBe(sequential(0));
  expect(color(2)).toBe(sequential(1));
  expect(color(3)).toBe(sequential(1));
});

test("values beyond the scale's ends are noticed", () => {
  expect(beyond([null, 0.5, -3], [-1, 1])).toEqual({ below: true, above: false });
});

test("a saved map has every cell, and no name of a model becomes markup", () => {
  const rows = places("<script>&", 2);
  const { svg, width, height } = heatmapSvg({
    title: "a < b",
    words: ["n = 1"],
    panels: [{ title: "value", values: [[0.25, null], [1, 0]] }],
    rows: [...rows, ...places("b", 1)].slice(0, 2),
    columns: [...places("<script>&", 1), ...places("b", 1)],
    rowTitle: "source layer",
    columnTitle: "target layer",
    limits: [0, 1],
    look: { ink: "#111111", page: "#ffffff", empty: "#eeeeee" },
  });
  expect(svg).not.toContain("<script");
  expect(svg).toContain("&lt;script&gt;&amp;");
  expect(svg).toContain("0.25");
  expect(svg.match(/width="40" height="40"/g)).toHaveLength(4);
  expect(svg).toContain('fill="#eeeeee"');
  expect(width).toBeGreaterThan(0);
  expect(height).toBeGreaterThan(0);
});
