/** What a comparison says, in rows and words: the same as `throughline compare` prints. */
import { share } from "./format";
import type { Comparison, ComparisonTotals, Concept, Estimate, SharedFeature, Standings } from "./types";

export const STANDINGS = ["universal", "shared", "specific"] as const;
export type StandingName = (typeof STANDINGS)[number];

const ACTIVE = "active here";

/** Dark to pale, as the figures have them: what all have is the strongest. */
export const STANDING_COLORS: Record<StandingName, string> = { universal: "#0b4f9c", shared: "#5b9bd5", specific: "#a9a9a5" };

/** One line of the table, with a share for each model: of the active features, or what that is to be held against. */
export interface StandingRow {
  key: string;
  standing: StandingName;
  what: string;
  note: string;
  main: boolean; // the share that the others are held against
  bound: boolean; // at most so many
  by: Record<string, Estimate>;
}

const plain = (value: number | null | undefined): Estimate => ({ value: value ?? null, low: null, high: null, n: 0 });

/** All lines; bounds and the ceiling are of universal features alone. Lines that no model has anything for are left out. */
export function standingRows(models: readonly string[], standings: Record<string, Standings>): StandingRow[] {
  const seeds = Math.max(0, ...Object.values(standings).map((mine) => mine.num_twins ?? 0));
  const rows = STANDINGS.flatMap((standing) => {
    const row = (what: string, note: string, of: (mine: Standings) => Estimate, bound = false): StandingRow => ({
      key: `${standing}/${what}`,
      standing,
      what,
      note,
      main: what === ACTIVE,
      bound,
      by: Object.fromEntries(models.flatMap((model) => (standings[model] ? [[model, of(standings[model])]] : []))),
    });
    const own = [
      row(ACTIVE, "95 % interval", (s) => s.active[standing] ?? plain(null)),
      row("all live", "the base rate", (s) => plain(s.live[standing])),
      row("by chance", "other text in the other models", (s) => plain(s.chance[standing])),
    ];
    if (standing !== "universal") return own;
    return [
      ...own,
      row("by the threshold", "at most, by its definition", (s) => plain(s.most_universal_by_chance), true),
      row("by kind of token", "at most, knowing no more", (s) => plain(s.most_universal_by_kind), true),
      row("ceiling", seeds > 1 ? `found again with another seed: mean of ${seeds}, least and most` : "found again with another seed", (s) => ({
        ...plain(s.ceiling),
        low: s.ceiling_min ?? null,
        high: s.ceiling_max ?? null,
      })),
    ];
  });
  return rows.filter((row) => Object.values(row.by).some((found) => found.value !== null));
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
