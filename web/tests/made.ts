/** Small traces made up for tests. */
import type { Place } from "../src/lib/traced";
import type { ActiveFeature, Chain, Trace, TraceEdge } from "../src/lib/types";

export const feature = (layer: number, position: number, number: number, effect: number | null, more: Partial<ActiveFeature> = {}): ActiveFeature => ({
  layer,
  position,
  feature: number,
  activation: 1,
  off_value: 0,
  effect,
  predicted_effect: 0.5,
  effects: effect === null ? [] : [effect],
  predicted_effects: [0.5],
  answer_if_off: effect === null ? null : "42",
  label: null,
  top_tokens: [" ", "1", "\n", "x"],
  ...more,
});

export const chain = (places: Place[], more: Partial<Chain> = {}): Chain => ({
  steps: places.map((place) => ({ features: [place], label: `is ${place[2]}`, activation: 1, lifetime: null })),
  target: 0,
  predicted: 0.2,
  measured: null,
  predicted_together: 1,
  measured_together: null,
  answer_if_off: null,
  num_alternatives: 0,
  ...more,
});

export function trace({ features = [], edges = [], chains = [] }: { features?: ActiveFeature[]; edges?: TraceEdge[]; chains?: Place[][] }): Trace {
  const reading = { num_active: 1, num_sinks: 0, num_nodes: 1, fvu: 0.1, error_effect: null };
  return {
    version: 2,
    explains: "answer",
    model: "m",
    prompt: "1+1",
    tokens: ["1", " +", "1", "=", "2"].map((text, i) => [i, text, i, i + 1]),
    num_prompt_tokens: 4,
    answer: "42",
    answer_probability: 0.9,
    complete: true,
    expected: null,
    correct: null,
    score: 1,
    targets: [{ position: 3, text: "2", against: "3", probability: 0.9, score: 1 }],
    off_kind: "mean",
    off: "its mean",
    against: null,
    linearization: "plain",
    layers: [0, 1, 2].map((layer) => ({ layer, features: features.filter((one) => one.layer === layer), ...reading })),
    edges,
    chains: chains.map((places) => chain(places)),
    verification: null,
    steering: null,
    forced: false,
    notes: [],
  };
}
