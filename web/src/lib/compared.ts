/** What a comparison says, in rows and words: the same as `throughline compare` prints. */
import { share } from "./format";
import type { Comparison, ComparisonTotals, Concept, Estimate, SharedFeature, Standings } from "./types";

export const STANDINGS = ["universal", "shared", "specific"] as const;
export type StandingName = (typeof STANDINGS)[number];

/** Dark to pale, as the figures have them: what all have is the strongest. */
export const STANDING_COLORS: Record<StandingName, string> = { universal: "#0b4f9c", shared: "#5b9bd5", specific: "#a9a9a5" };

/** One line under a model: shares of what, or a bound or ceiling of the universal ones alone. */
export interface StandingRow {
  key: string;
  model: string;
  first: boolean; // of its model
  what: string;
  note: string;
  shares: Partial<Record<StandingName, Estimate>>;
  bound: boolean; // at most so many
  n: number | null;
}

const only = (value: number | null | undefined): Estimate => ({ value: value ?? null, low: null, high: null, n: 0 });

function allOf(shares: Record<string, number>): Partial<Record<StandingName, Estimate>> {
  return Object.fromEntries(STANDINGS.map((name) => [name, only(shares[name])]));
}

export function standingRows(models: readonly string[], standings: Record<string, Standings>): StandingRow[] {
  return models.flatMap((model) => {
    const mine = standings[model];
    if (!mine) return [];
    const rows: Omit<StandingRow, "key" | "model" | "first">[] = [
      { what: "active here", note: "active on prompt or answer, with 95 % interval", shares: mine.active, bound: false, n: mine.num_active },
      { what: "all live", note: "the base rate: all features that are ever active", shares: allOf(mine.live), bound: false, n: mine.num_live },
      { what: "by chance", note: "the same active features, with the other models' tokens from another document", shares: allOf(mine.chance), bound: false, n: null },
      { what: "by definition", note: "of the threshold, at most so many pass by chance", shares: { universal: only(mine.most_universal_by_chance) }, bound: true, n: null },
      { what: "by kind of token", note: "at most so many, if only the kind of position were known", shares: { universal: only(mine.most_universal_by_kind) }, bound: true, n: null },
      { what: "ceiling", note: "share found again in a dictionary of the same layer from another seed", shares: { universal: only(mine.ceiling) }, bound: false, n: null },
    ];
    return rows.map((row, i) => ({ ...row, key: `${model}/${row.what}`, model, first: i === 0 }));
  });
}

/** `57 % [53, 60]`; a bound as `≤ 8 %`. */
export function shareWords(found: Estimate | undefined, bound = false): string {
  if (!found || found.value === null) return "–";
  const digits = found.value > 0 && found.value < 0.1 ? 1 : 0;
  const interval = found.low === null || found.high === null ? "" : ` [${(100 * found.low).toFixed(0)}, ${(100 * found.high).toFixed(0)}]`;
  return `${bound ? "≤ " : ""}${share(found.value, digits)}${interval}`;
}

export const featureKey = (model: string, layer: number, feature: number): string => `${model}|${layer}|${feature}`;

/** A feature and its partners in the other models, as keys: what is lit together. */
export function together(feature: SharedFeature): Set<string> {
  const partners = Object.entries(feature.partners).map(([model, [layer, number]]) => featureKey(model, layer, number));
  return new Set([featureKey(feature.model, feature.layer, feature.feature), ...partners]);
}

/** The features that a model's trace shows: the largest effects first, or layer by layer. */
export function shownOf(found: Comparison, model: string, order: "effect" | "layer"): SharedFeature[] {
  const mine = found.features.filter((feature) => feature.model === model);
  const size = (feature: SharedFeature) => Math.abs(feature.effect ?? 0);
  return order === "layer" ? mine : [...mine].sort((a, b) => size(b) - size(a));
}

/** Concepts with values, or all; if there are none with values, all in any case. */
export function conceptsOf<One extends { valued: boolean }>(concepts: readonly One[], all: boolean): One[] {
  const valued = concepts.filter((concept) => concept.valued);
  return all || !valued.length ? [...concepts].sort((a, b) => Number(b.valued) - Number(a.valued)) : valued;
}

/** Where a concept begins and ends in a model, and on how many of the prompts it is there at all. */
export interface Life {
  birth: number;
  death: number;
  part: number;
}

export const livesOf = (concept: Concept): Record<string, Life> =>
  Object.fromEntries(Object.entries(concept.lives).map(([model, { birth, death }]) => [model, { birth, death, part: 1 }]));

export function livesOfTotals(concept: ComparisonTotals["concepts"][number]): Record<string, Life> {
  return Object.fromEntries(
    Object.entries(concept.models).flatMap(([model, { birth, death, present }]) =>
      birth.value === null || death.value === null ? [] : [[model, { birth: birth.value, death: death.value, part: present.value ?? 0 }]],
    ),
  );
}
