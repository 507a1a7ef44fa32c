import { describe, expect, it } from "vitest";
import { embedded } from "../src/lib/embedded";
import type { PageData } from "../src/lib/types";

const LABELS = {
  row: [0, 2, 2],
  label: [3, 4, 5],
  source: [6, 6, 7],
  measure: [7, 7, 7],
  f1: [0.9, 0.8, 0.5],
  precision: [1, 1, 1],
  recall: [1, 1, 1],
  threshold: [0, 0, 0],
  num_positive: [10, 10, 10],
  num_tokens: [100, 100, 100],
  base_f1: [0.1, 0.1, 0.1],
  neuron_f1: [0.2, 0.2, null],
  untrained_f1: [0.3, 0.3, null],
  balanced_accuracy: [null, null, null],
  fuzzing: [null, null, null],
  reached: [true, true, false],
};

/** Two features in layer 0, one in layer 1, which is the throughline of the first. */
function data(): PageData {
  const part = {
    features: {
      strings: ["a", " b", "…", "carry = 1", "sum ≥ 100", "weak", "concepts", "tokens", "top"],
      roles: ["number in the question"],
      names: ["m"],
      models: {
        m: {
          layer: [0, 0, 1],
          feature: [4, 7, 2],
          density: [0.5, 0.1, null],
          num_active: [50, 10, 5],
          num_tokens: [100, 100, 100],
          mean_active: [1, 1, 1],
          max: [9, 2, 3],
          top_token_share: [0.5, 0.5, 0.5],
          top_tokens: [[0], [1], [0, 1]],
          promoted: [[], [], []],
          suppressed: [[], [], []],
          role_means: [[0.5], [0], [1]],
          throughline: [3, null, 3],
          birth: [0, null, 0],
          death: [1, null, 1],
          family: null,
          labels: LABELS,
          contexts: { texts: ["2 0 1"], row: [0], text: [0], shades: ["093"], value: [9], focus: [1], stratum: [8], document: [12] },
          partners: { row: [0], model: [0], layer: [1], feature: [2], correlation: [0.75] },
        },
      },
      num_left_out: 12,
      num_contexts_left_out: 0,
      num_partners_left_out: 0,
    },
    transfers: [
      {
        info: { metric: "matching", source: "m", target: "m", source_layers: [0, 1], target_layers: [0, 1] },
        matrices: { threshold: [[0.1, 0.4], [0.2, 0.3]] },
      },
    ],
    pairs: {
      most: 1,
      results: [
        {
          source: "m",
          target: "m",
          total: [[2, 2], [1, 1]],
          above: [[1, 2], [0, 0]],
          sources: [[[4], [4]], [[2], [2]]],
          targets: [[[4], [2]], [[4], [2]]],
          correlations: [[[1], [0.75]], [[0.75], [1]]],
        },
      ],
    },
    traces: [],
    comparisons: [],
    outdated_traces: [],
  };
  return part as unknown as PageData;
}

const source = () => embedded(data(), async () => "");

describe("features of a page without a server", () => {
  it("are found by label and by token, whatever the case", async () => {
    const numbers = async (q: string) => (await source().features({ q })).features.map((f) => f.feature);
    expect(await numbers("CARRY")).toEqual([4]);
    expect(await numbers(" b")).toEqual([2, 7]);
    expect(await numbers("weak")).toEqual([]); // only the best label is searched, as on a server
    expect(await numbers("nothing")).toEqual([]);
  });

  it("are filtered, and sorted with what has no value last either way", async () => {
    const sorted = async (descending: boolean) =>
      (await source().features({ sort: "density", descending })).features.map((f) => f.feature);
    expect(await sorted(true)).toEqual([4, 7, 2]);
    expect(await sorted(false)).toEqual([7, 4, 2]);
    expect((await source().features({ layer: [1] })).total).toBe(1);
    expect((await source().features({ min_density: 0.2 })).features.map((f) => f.feature)).toEqual([4]);
    expect((await source().features({ labelled: false })).features.map((f) => f.feature)).toEqual([7]);
    const page = await source().features({ offset: 1, limit: 1 });
    expect([page.total, page.features.length]).toEqual([3, 1]);
  });

  it("have labels, contexts, partners and their throughline", async () => {
    const found = await source().feature("m", 0, 4);
    expect(found.labels.map((label) => label.text)).toEqual(["carry = 1"]);
    expect(found.contexts[0]).toMatchObject({ tokens: ["…", "a", " b"], values: [0, 9, 3], focus: 1, stratum: "top", document: 12 });
    expect(found.partners[0]).toMatchObject({ partner: { layer: 1, feature: 2, label: "sum ≥ 100" }, threshold: 0.4 });
    expect(found.throughline?.features.map((f) => [f.layer, f.feature])).toEqual([[0, 4], [1, 2]]);
    await expect(source().feature("m", 0, 5)).rejects.toThrow("does not hold feature 5");
  });

  it("are matched by cell, as many as the page holds", async () => {
    const page = await source().pairs({ source: "m", target: "m", source_layer: 0, target_layer: 1 });
    expect(page).toMatchObject({ total: 2, num_above: 2, threshold: 0.4 });
    expect(page.pairs[0]).toMatchObject({ source: { label: "carry = 1" }, target: { feature: 2 }, correlation: 0.75 });
  });

  it("that were left out are told", () => {
    expect(source().leftOut).toEqual(["12 features are left out", "of each pair of layers the 1 best matched pairs are here"]);
  });
});
