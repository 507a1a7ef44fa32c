import { expect, test } from "vitest";
import { bands, flowOf, halfLife } from "../src/lib/flow";

test("births, deaths and who is alive add up from layer to layer", () => {
  const flow = flowOf({ model: "m", layers: [0, 1, 2], alive: [[10, 6, 5], [0, 4, 1], [0, 0, 3]] });
  expect(flow).toEqual({ live: [10, 10, 9], births: [10, 4, 3], deaths: [4, 4, 0] });
});

test("bands cover all layers of birth, once each", () => {
  expect(bands(3)).toEqual([[0, 1], [1, 2], [2, 3]]);
  const many = bands(40);
  expect(many).toHaveLength(12);
  expect(many[0]?.[0]).toBe(0);
  expect(many.at(-1)?.[1]).toBe(40);
  many.slice(1).forEach(([first], i) => expect(first).toBe(many[i]?.[1]));
});

test("half-life is where the curve first comes down to one half", () => {
  expect(halfLife([0, 1, 2, 3], [1, null, 0.6, 0.4])).toBeCloseTo(2.5);
  expect(halfLife([0, 1], [1, 0.9])).toBeNull();
  expect(halfLife([0, 1], [0.4, 0.3])).toBeNull(); // it was there before
});
