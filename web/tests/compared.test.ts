import { describe, expect, it } from "vitest";
import { conceptsOf, featureKey, livesOfTotals, shareWords, standingRows, together } from "../src/lib/compared";
import type { Standings } from "../src/lib/types";

const estimate = (value: number | null, low: number | null = null, high: number | null = null) => ({ value, low, high, n: 10 });
const standings = (ceiling: number | null): Standings => ({
  active: { universal: estimate(0.5, 0.4, 0.6), shared: estimate(0.3), specific: estimate(0.2) },
  num_active: 10,
  num_rare: 0,
  live: { universal: 0.1, shared: 0.2, specific: 0.7 },
  num_live: 100,
  chance: { universal: 0.001, shared: 0.01, specific: 0.989 },
  most_universal_by_chance: 0.005,
  most_universal_by_kind: 0.08,
  ceiling,
  ceiling_min: null,
  ceiling_max: null,
  num_twins: 0,
});

describe("standingRows", () => {
  const what = (ceiling: number | null) => standingRows(["a", "b"], { a: standings(null), b: standings(ceiling) }).map((row) => row.key);
  it("has the ceiling only if a model has one", () => {
    expect(what(null)).not.toContain("universal/ceiling");
    expect(what(0.9)).toContain("universal/ceiling");
    expect(what(null)).toHaveLength(5 + 3 + 3);
  });
  it("says of how many seeds a ceiling is the mean, with the least and the most", () => {
    const several = { ...standings(0.9), ceiling_min: 0.85, ceiling_max: 0.95, num_twins: 3 };
    const [one, three] = [standings(0.9), several].map((mine) => standingRows(["a"], { a: mine }).find((row) => row.what === "ceiling"));
    expect(one?.note).toBe("found again with another seed");
    expect(three?.note).toBe("found again with another seed: mean of 3, least and most");
    expect([shareWords(one?.by.a), shareWords(three?.by.a)]).toEqual(["90 %", "90 % [85, 95]"]);
  });
  it("gives each model its own numbers, and says which are bounds", () => {
    const rows = standingRows(["a"], { a: standings(0.9) });
    expect(rows.find((row) => row.key === "shared/all live")?.by.a?.value).toBe(0.2);
    expect(rows.filter((row) => row.bound).map((row) => row.what)).toEqual(["by the threshold", "by kind of token"]);
  });
});

describe("words", () => {
  it("of shares have interval and bound", () => {
    expect(shareWords(estimate(0.566, 0.527, 0.601))).toBe("57 % [53, 60]");
    expect(shareWords(estimate(0.078), true)).toBe("≤ 7.8 %");
    expect(shareWords(estimate(null))).toBe("–");
    expect(shareWords(undefined)).toBe("–");
  });
});

describe("features", () => {
  it("are lit with their partners in the other models", () => {
    const one = { model: "a", layer: 1, position: 0, feature: 2, activation: 1, effect: null, label: "", partners: { b: [3, 4, 0.9] as [number, number, number] }, standing: "shared" as const };
    expect(together(one)).toEqual(new Set([featureKey("a", 1, 2), featureKey("b", 3, 4)]));
  });
});

describe("concepts", () => {
  const [valued, other] = [{ name: "carry", valued: true }, { name: "token", valued: false }];
  it("with values come first, the rest if it is asked for or there is nothing else", () => {
    expect(conceptsOf([other, valued], false)).toEqual([valued]);
    expect(conceptsOf([other, valued], true)).toEqual([valued, other]);
    expect(conceptsOf([other], false)).toEqual([other]);
  });
  it("that a model never has get no line", () => {
    const model = (birth: number | null) => ({ present: estimate(0.4), early: estimate(0), early_by_chance: 0, elsewhere: estimate(0), birth: estimate(birth), death: estimate(birth) });
    const concept = { ...valued, known: true, num_prompts: 5, models: { a: model(0.25), b: model(null) }, early_in: [], sentence: "" };
    expect(livesOfTotals(concept)).toEqual({ a: { birth: 0.25, death: 0.25, part: 0.4 } });
  });
});
