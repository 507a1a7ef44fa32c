import { describe, expect, it } from "vitest";
import { both, chainWords, EDGE_COLUMNS, edgeRows, FEATURE_COLUMNS, featureLines, featureRows, mainChain, placeOf, setting, settingWords, span, withSetting } from "../src/lib/traced";
import { chain, feature, trace } from "./made";

describe("settings", () => {
  it("are written as --set reads them", () => {
    expect(setting(5, 132, "off", null)).toBe("layer=5,feature=132,off");
    expect(setting(5, 132, { times: -1 }, null)).toBe("layer=5,feature=132,x-1");
    expect(setting(5, 132, { value: 1.5 }, 8)).toBe("layer=5,feature=132,position=8,=1.5");
    const grammar = /^layer=\d+,feature=\d+(,position=\d+)?,(off|x-?\d+(\.\d+)?|=-?\d+(\.\d+)?)$/;
    for (const value of [1e-9, -0.1 - 0.2, 1e20, 1e300]) expect(setting(0, 0, { value }, null)).toMatch(/^layer=0,feature=0,=/);
    for (const value of [1e-9, -0.1 - 0.2, 123456.789]) expect(setting(0, 0, { value }, null)).toMatch(grammar);
  });
  it("replace what was set at the same place, and nothing else", () => {
    const first = [setting(1, 2, "off", null), setting(1, 2, "off", 3), setting(1, 4, "off", null)];
    expect(withSetting(first, setting(1, 2, { times: 2 }, null))).toEqual([first[1], first[2], "layer=1,feature=2,x2"]);
    expect(withSetting(first, setting(1, 2, { value: 1.5 }, 3))).toEqual([first[0], first[2], "layer=1,feature=2,position=3,=1.5"]);
  });
  it("are said in words", () => {
    expect(settingWords("layer=5,feature=132,off")).toBe("layer 5 #132: off");
    expect(settingWords("layer=5,feature=132,position=8,=1.5")).toBe("layer 5 #132 at position 8: set to 1.5");
    expect(settingWords("feature=1, layer=2, x-1")).toBe("layer 2 #1: × -1");
  });
});

describe("chains", () => {
  it("are said with layers, labels and token", () => {
    const one = chain([[0, 1, 7], [1, 1, 5]]);
    one.steps[0]!.features = [[0, 1, 7], [1, 1, 8]];
    expect(chainWords(trace({}), one)).toBe("#7 (layers 0-1) is 7 → #5 (layer 1) is 5 → '2'");
    expect(span([3])).toBe("layer 3");
  });
  it("have a main one: the largest, measured if it was", () => {
    expect(mainChain([])).toBe(-1);
    expect(mainChain([chain([], { predicted: 5, measured: 0.1 }), chain([], { predicted: 0.2, measured: -3 })])).toBe(1);
  });
  it("say what was measured only if it was", () => {
    expect(both(-1, null)).toBe("predicted −1.00");
    expect(both(-1, 0.5)).toBe("predicted −1.00, measured +0.50");
  });
});

describe("features", () => {
  it("say another answer, and that nothing was measured", () => {
    const found = trace({});
    expect(featureLines(found, feature(0, 1, 7, -1, { answer_if_off: "32" })).at(-1)).toBe("the answer is then “32”");
    expect(featureLines(found, feature(0, 1, 7, -1)).join()).not.toContain("the answer is then");
    expect(featureLines(found, feature(0, 1, 7, null)).at(-1)).toBe("not measured");
    expect(featureLines(found, feature(0, 1, 7, 1))[0]).toBe("#7 unlabelled: ␣ 1 ⏎");
  });
  it("and edges have a cell for each column", () => {
    const found = trace({ features: [feature(0, 1, 7, 1)], edges: [{ source: [0, 1, 7], target: [1, 1, 5], predicted: 1 }] });
    expect(featureRows(found)[0]).toHaveLength(FEATURE_COLUMNS.length);
    expect(featureRows(found)[0]?.[2]).toBe(" +");
    expect(edgeRows(found)[0]).toHaveLength(EDGE_COLUMNS.length);
  });
  it("are named in addresses by three numbers and nothing else", () => {
    expect(placeOf("1,2,3")).toEqual([1, 2, 3]);
    for (const wrong of [null, "", "1,2", "1,2,3,4", "a,b,c", "1,2,-1", '1,2,3"]']) expect(placeOf(wrong)).toBeNull();
  });
});
