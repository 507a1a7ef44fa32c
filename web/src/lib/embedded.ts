/** A page without a server: the same answers, from the data inside it (`PageData`). */
import { to } from "./route.svelte";
import { AskError, type FeatureQuery, type PairQuery, type SortBy, type Source } from "./source";
import type {
  Context,
  FeatureAnswer,
  FeatureName,
  FeatureRow,
  PackedModel,
  PageData,
  ScoredLabel,
} from "./types";

/** A model's features, with the rows of what belongs to each. */
class Model {
  readonly rowOf = new Map<string, number>();
  readonly labels: number[][];
  readonly contexts: number[][];
  readonly partners: number[][];
  private chains: Map<number, number[]> | null = null;

  constructor(readonly packed: PackedModel) {
    const num = packed.layer.length;
    for (let row = 0; row < num; row++) this.rowOf.set(`${packed.layer[row]}/${packed.feature[row]}`, row);
    this.labels = byRow(packed.labels?.row ?? [], num);
    this.contexts = byRow(packed.contexts.row, num);
    this.partners = byRow(packed.partners.row, num);
  }

  /** Rows of the features of one throughline, by layer. */
  chain(number: number): number[] {
    if (!this.chains) {
      this.chains = new Map();
      this.packed.throughline?.forEach((one, row) => {
        if (one === null) return;
        const rows = this.chains?.get(one);
        if (rows) rows.push(row);
        else this.chains?.set(one, [row]);
      });
    }
    return this.chains.get(number) ?? [];
  }
}

function byRow(rows: number[], num: number): number[][] {
  const found: number[][] = Array.from({ length: num }, () => []);
  rows.forEach((row, place) => found[row]?.push(place));
  return found;
}

const at = <T>(column: readonly T[], row: number): T => column[row] as T;

export function embedded(data: PageData, page: (title: string, data: unknown) => Promise<string>): Source {
  const { strings, roles, names } = data.features;
  const models = new Map<string, Model>();
  const model = (name: string): Model => {
    const packed = data.features.models[name];
    if (!packed) throw new AskError(404, `this page has no features of ${name}`);
    const known = models.get(name) ?? new Model(packed);
    models.set(name, known);
    return known;
  };
  const words = (numbers: number[]): string[] => numbers.map((n) => at(strings, n));

  function nameOf(name: string, layer: number, feature: number): FeatureName {
    const own = data.features.models[name] ? model(name) : null;
    const row = own?.rowOf.get(`${layer}/${feature}`);
    if (!own || row === undefined) return { model: name, layer, feature, label: null, tokens: [] };
    const best = own.labels[row]?.[0];
    const labels = own.packed.labels;
    const reached = labels && best !== undefined && at(labels.reached, best);
    return {
      model: name,
      layer,
      feature,
      label: reached ? at(strings, at(labels.label, best)) : null,
      tokens: words(at(own.packed.top_tokens, row).slice(0, 5)),
    };
  }

  function rowOf(name: string, own: Model, row: number): FeatureRow {
    const { packed } = own;
    const labels = packed.labels;
    const best = own.labels[row]?.[0];
    const has = labels && best !== undefined;
    return {
      model: name,
      layer: at(packed.layer, row),
      feature: at(packed.feature, row),
      density: at(packed.density, row),
      max: at(packed.max, row),
      label: has ? at(strings, at(labels.label, best)) : null,
      source: has ? at(strings, at(labels.source, best)) : null,
      f1: has ? at(labels.f1, best) : null,
      reached: has ? at(labels.reached, best) : false,
      tokens: words(at(packed.top_tokens, row).slice(0, 5)),
    };
  }

  let everything: { row: FeatureRow; active: number; text: string }[] | null = null;
  function all() {
    everything ??= Object.keys(data.features.models).flatMap((name) => {
      const own = model(name);
      return own.packed.layer.map((_, i) => {
        const row = rowOf(name, own, i);
        const text = [row.label ?? "", ...row.tokens].join("\u001f").toLowerCase();
        return { row, active: at(own.packed.num_active, i), text };
      });
    });
    return everything;
  }

  function find(query: FeatureQuery) {
    const text = query.q?.toLowerCase() ?? "";
    const wantedModels = query.model?.length ? new Set(query.model) : null;
    const layers = query.layer?.length ? new Set(query.layer) : null;
    const found = all().filter(
      ({ row, text: own }) =>
        (!text || own.includes(text)) &&
        (!wantedModels || wantedModels.has(row.model)) &&
        (!layers || layers.has(row.layer)) &&
        (query.min_density === undefined || (row.density ?? -1) >= query.min_density) &&
        (query.max_density === undefined || (row.density ?? 2) <= query.max_density) &&
        (query.min_f1 === undefined || (row.f1 ?? -1) >= query.min_f1) &&
        (query.labelled === undefined || row.reached === query.labelled) &&
        (query.source === undefined || row.source === query.source),
    );
    const sort: SortBy = query.sort ?? "f1";
    const sign = (query.descending ?? true) ? -1 : 1;
    const value = (one: (typeof found)[number]) => (sort === "num_active" ? one.active : one.row[sort]);
    const order = found.map((one, i) => ({ one, i, value: value(one) }));
    order.sort((a, b) => {
      if (a.value === null || b.value === null) return Number(a.value === null) - Number(b.value === null) || a.i - b.i;
      return (a.value < b.value ? -sign : a.value > b.value ? sign : 0) || a.i - b.i;
    });
    return order.map(({ one }) => one.row);
  }

  function contextsOf(own: Model, row: number): Context[] {
    const { contexts, max } = own.packed;
    const ranks = new Map<number, number>();
    return (own.contexts[row] ?? []).map((i) => {
      const tokens = at(contexts.texts, at(contexts.text, i))
        .split(" ")
        .map((n) => at(strings, Number.parseInt(n, 36)));
      const stratum = at(contexts.stratum, i);
      const rank = ranks.get(stratum) ?? 0;
      ranks.set(stratum, rank + 1);
      const largest = at(max, row) ?? 1;
      const values = Array.from(at(contexts.shades, i), (shade) => (Number(shade) / 9) * largest);
      return {
        stratum: at(strings, stratum),
        rank,
        value: at(contexts.value, i) ?? 0,
        document: at(contexts.document, i),
        tokens,
        values,
        focus: at(contexts.focus, i),
      };
    });
  }

  function labelsOf(own: Model, row: number): ScoredLabel[] {
    const labels = own.packed.labels;
    if (!labels) return [];
    return (own.labels[row] ?? [])
      .filter((i) => at(labels.f1, i) !== null)
      .map((i) => ({
        text: at(strings, at(labels.label, i)),
        source: at(strings, at(labels.source, i)),
        measure: at(strings, at(labels.measure, i)) as "tokens" | "detection",
        f1: at(labels.f1, i) ?? 0,
        precision: at(labels.precision, i) ?? 0,
        recall: at(labels.recall, i) ?? 0,
        num_positive: at(labels.num_positive, i) ?? 0,
        base_f1: at(labels.base_f1, i) ?? 0,
        neuron_f1: at(labels.neuron_f1, i),
        untrained_f1: at(labels.untrained_f1, i),
        balanced_accuracy: at(labels.balanced_accuracy, i),
        threshold: at(labels.threshold, i),
        num_tokens: at(labels.num_tokens, i) ?? 0,
        fuzzing: at(labels.fuzzing, i),
        reached: at(labels.reached, i),
      }));
  }

  function threshold(source: string, target: string, layer: number, there: number): number | null {
    const result = data.transfers.find(
      ({ info }) => info.metric === "matching" && info.source === source && info.target === target,
    );
    const row = result?.info.source_layers.indexOf(layer) ?? -1;
    const column = result?.info.target_layers.indexOf(there) ?? -1;
    return result?.matrices.threshold?.[row]?.[column] ?? null;
  }

  function featureOf(name: string, layer: number, feature: number): FeatureAnswer {
    const own = model(name);
    const row = own.rowOf.get(`${layer}/${feature}`);
    if (row === undefined) {
      throw new AskError(404, `this page does not hold feature ${feature} of ${name} layer ${layer}; a served run does`);
    }
    const { packed } = own;
    const partners = packed.partners;
    const number = packed.throughline?.[row] ?? null;
    return {
      model: name,
      layer,
      feature,
      density: at(packed.density, row),
      num_active: at(packed.num_active, row),
      num_tokens: at(packed.num_tokens, row),
      mean_active: at(packed.mean_active, row),
      max: at(packed.max, row),
      top_tokens: words(at(packed.top_tokens, row)),
      top_token_share: at(packed.top_token_share, row),
      promoted: words(at(packed.promoted, row)),
      suppressed: words(at(packed.suppressed, row)),
      roles: Object.fromEntries(roles.map((role, i) => [role, packed.role_means[row]?.[i] ?? null])),
      labels: labelsOf(own, row),
      contexts: contextsOf(own, row),
      partners: (own.partners[row] ?? []).map((i) => {
        const target = at(names, at(partners.model, i));
        const there = at(partners.layer, i);
        return {
          partner: nameOf(target, there, at(partners.feature, i)),
          correlation: at(partners.correlation, i),
          threshold: threshold(name, target, layer, there),
          above_chance: true,
        };
      }),
      throughline:
        number === null
          ? null
          : {
              number,
              birth: packed.birth?.[row] ?? layer,
              death: packed.death?.[row] ?? layer,
              family: packed.family?.[row] ?? null,
              features: own.chain(number).map((i) => nameOf(name, at(packed.layer, i), at(packed.feature, i))),
            },
    };
  }

  const findResult = (metric: string, source: string, target: string) => {
    const found = data.transfers.find(
      ({ info }) => info.metric === metric && info.source === source && info.target === target,
    );
    if (!found) throw new AskError(404, `this run has no ${metric} from ${source} to ${target}`);
    return found;
  };

  function pairsOf(query: PairQuery) {
    const { info, matrices } = findResult("matching", query.source, query.target);
    const cells = data.pairs.results.find((one) => one.source === query.source && one.target === query.target);
    const row = info.source_layers.indexOf(query.source_layer);
    const column = info.target_layers.indexOf(query.target_layer);
    const pairs = (cells?.sources[row]?.[column] ?? []).map((feature, i) => ({
      source: nameOf(query.source, query.source_layer, feature),
      target: nameOf(query.target, query.target_layer, cells?.targets[row]?.[column]?.[i] ?? -1),
      correlation: cells?.correlations[row]?.[column]?.[i] ?? null,
    }));
    const offset = query.offset ?? 0;
    return {
      total: cells?.total[row]?.[column] ?? 0,
      offset,
      threshold: matrices.threshold?.[row]?.[column] ?? null,
      num_above: cells?.above[row]?.[column] ?? 0,
      pairs: pairs.slice(offset, offset + (query.limit ?? 50)),
    };
  }

  const one = <T>(kind: string, found: T | undefined): T => {
    if (found === undefined) throw new AskError(404, `this page has no such ${kind}`);
    return found;
  };

  return {
    overview: async () => data.overview,
    features: async (query) => {
      const found = find(query);
      const offset = query.offset ?? 0;
      return { total: found.length, offset, features: found.slice(offset, offset + (query.limit ?? 50)) };
    },
    feature: async (...place) => featureOf(...place),
    transfers: async () => data.transfers.map(({ info }) => info),
    transfer: async (...which) => findResult(...which),
    pairs: async (query) => pairsOf(query),
    analysis: async () => data.analysis,
    traces: async () =>
      data.traces.map(({ id, trace }) => ({
        id,
        model: trace.model,
        prompt: trace.prompt,
        answer: trace.answer,
        probability: trace.answer_probability,
        correct: trace.correct,
      })),
    trace: async (id) => one("trace", data.traces.find((kept) => kept.id === id)).trace,
    comparisons: async () =>
      data.comparisons.map(({ id, comparison }) => ({
        id,
        models: comparison.models,
        prompt: comparison.prompt,
        answers: comparison.answers,
      })),
    comparison: async (id) => {
      const { comparison, traces } = one("comparison", data.comparisons.find((kept) => kept.id === id));
      const found = Object.entries(traces).flatMap(([name, key]) => {
        const kept = data.traces.find((trace) => trace.id === key);
        return kept ? [[name, kept.trace] as const] : [];
      });
      return { ...comparison, traces: Object.fromEntries(found) };
    },
    totals: async () => data.totals,
    status: async () => data.status,
    training: async () => data.training,
    page,
    leftOut: leftOut(data),
    start: startOf(data),
    live: null,
  };
}

/** A page that was made of one trace or comparison begins with it. */
function startOf(data: PageData): string | null {
  if (Object.keys(data.features.models).length || data.training.length || data.transfers.length) return null;
  const [comparison, ...moreComparisons] = data.comparisons;
  if (comparison) return moreComparisons.length ? null : to("compare", [comparison.id]);
  const [trace, ...moreTraces] = data.traces;
  return trace && !moreTraces.length ? to("trace", [trace.id]) : null;
}

function leftOut(data: PageData): string[] {
  const { num_left_out, num_contexts_left_out, num_partners_left_out } = data.features;
  const many = (count: number) => count.toLocaleString("en");
  const said: string[] = [];
  if (num_left_out) said.push(`${many(num_left_out)} features are left out`);
  if (num_contexts_left_out) said.push(`${many(num_contexts_left_out)} contexts are left out`);
  if (num_partners_left_out) said.push(`${many(num_partners_left_out)} partners are left out`);
  const more = data.pairs.results.some(({ total }) => total.flat().some((count) => count > data.pairs.most));
  if (more) said.push(`of each pair of layers the ${data.pairs.most} best matched pairs are here`);
  if (data.outdated_traces.length) {
    said.push(`traces of another version are left out: ${data.outdated_traces.join(", ")}`);
  }
  return said;
}
