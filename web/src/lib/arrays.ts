/** What the matrices of each metric are, in plain words; docs/measures.md has the formulas. */

/** One matrix: what it is called and means, and the matrices that are its interval, its nulls and its ceilings. */
export interface Measured {
  name: string;
  title: string;
  words: string;
  low?: string;
  high?: string;
  nulls: string[];
  ceilings: string[];
}

type Words = Record<string, [title: string, words: string, nulls?: string[], ceilings?: string[]]>;

const COMMON: Words = {
  null: ["null", "what chance gives"],
  ceiling: ["ceiling", "the most that can be expected"],
  twin_ceiling: ["ceiling, other seed", "the same of a dictionary of the layer trained from another seed"],
};

const KNOWN: Record<string, Words> = {
  matching: {
    value: ["value", "share of live source features whose partner is above the threshold", ["null"], ["ceiling"]],
    mutual: ["mutual", "share in pairs that are each other's best and above the threshold", [], ["ceiling_mutual"]],
    strict: ["same tokens only", "the value on tokens that are the same in both models", ["null"]],
    mean_correlation: ["mean correlation", "mean of each source feature's highest correlation", ["null_correlation"], ["ceiling_correlation"]],
    assigned: ["one to one", "mean correlation of the one-to-one assignment with the largest sum"],
    threshold: ["threshold", "correlation that 99.9 % of the best chance matches stay below"],
    and_gates: ["AND", "share of target features that are the AND of exactly two source features"],
    or_gates: ["OR", "share of target features that are the OR of exactly two source features"],
    cosine_agrees: ["cosine agrees", "share of features whose nearest by decoder cosine is the partner by correlation"],
    folded_agrees: ["folded agrees", "the same by distance of rows scaled with the features' mean activation"],
    mean_cosine: ["mean cosine", "mean cosine of decoder rows with the nearest one"],
    pw_mcc: ["pw-MCC", "mean absolute cosine over the best one-to-one assignment"],
    pw_mcc_by_mass: ["pw-MCC by mass", "the same, weighted by activation mass"],
    null_correlation: ["null of the correlation", "mean highest correlation if only the kind of position were known"],
    ceiling_correlation: ["ceiling of the correlation", "mean highest correlation with another seed at the same layer"],
    ceiling_mutual: ["ceiling of mutual", "share of mutual pairs with another seed at the same layer"],
  },
  reconstruction: {
    value: ["value", "explained variance through ridge maps", ["null"], ["ceiling", "twin_ceiling"]],
    ridge: ["ridge", "explained variance through ridge maps: the value", ["null"], ["ceiling", "twin_ceiling"]],
    orthogonal: ["orthogonal", "explained variance through a rotation of the basis", ["null_orthogonal"], ["ceiling", "twin_ceiling"]],
    scaled: ["scaled", "explained variance when only mean and scale are matched", ["null_scaled"], ["ceiling", "twin_ceiling"]],
    raw: ["raw", "explained variance of the activations as they are", [], ["ceiling", "twin_ceiling"]],
    round_trip: ["round trip", "explained variance of the ridge maps with no dictionary between: what two linear maps lose"],
    l0: ["L0", "features active per token, through ridge maps"],
    l0_orthogonal: ["L0, orthogonal", "features active per token, through a rotation"],
    l0_scaled: ["L0, scaled", "features active per token, mean and scale matched"],
    l0_raw: ["L0, raw", "features active per token on the activations as they are"],
    delta_ce: ["ΔCE", "nats per token that the target model loses with the reconstruction in place"],
    null_orthogonal: ["null of orthogonal", "a randomly turned dictionary through the same rotation"],
    null_scaled: ["null of scaled", "a randomly turned dictionary, mean and scale matched"],
  },
  similarity: {
    value: ["value", "linear CKA of two layers' activations, dictionaries left aside", ["null", "null_role", "null_high"], ["ceiling"]],
    svcca: ["SVCCA", "mean canonical correlation of the leading directions", ["null_svcca"]],
    rsa: ["RSA", "rank correlation of the distances of all pairs of tokens", ["null_rsa", "null_rsa_high"]],
    null_high: ["null, 99 % quantile", "of CKA over shuffles of the tokens"],
    null_role: ["null within kinds", "CKA when tokens are shuffled among those of the same kind"],
    null_svcca: ["null of SVCCA", "with the tokens of one layer shuffled"],
    null_rsa: ["null of RSA", "with the tokens of one layer shuffled"],
    null_rsa_high: ["null of RSA, 99 % quantile", "over shuffles of the tokens"],
  },
  flow: {
    value: ["value", "share of a target's activation that is gone when its strongest cause is off", ["null"], ["ceiling"]],
    cause_drop: ["drop by the cause", "the value", ["random_drop"]],
    matched_drop: ["drop by the match", "the same with the best correlated feature off", ["random_drop"]],
    cosine_drop: ["drop by the nearest row", "the same with the feature of the most similar decoder row off", ["random_drop"]],
    random_drop: ["drop by a random feature", "the same with a random active feature off"],
    rank_correlation: ["rank correlation", "of estimated and measured effects", ["null_rank_correlation"]],
    drawn_rank_correlation: ["rank correlation, drawn", "the same over randomly drawn features alone", ["null_rank_correlation"]],
    twera_rank_correlation: ["rank correlation, TWERA", "with weights and co-activations in place of the estimate", ["null_rank_correlation"]],
    null_rank_correlation: ["null of the rank correlation", "with the estimates of other features"],
    transport_r2: ["transport R²", "how well a linear map tells the target's direction where it fires"],
    transport_r2_all: ["transport R², all tokens", "the same on all tokens"],
    num_checked: ["number checked", "effects behind the rank correlation"],
    n: ["targets", "number of target features"],
  },
};

const WITHIN: Record<string, [string, string]> = { value: ["low", "high"], mean_correlation: ["mean_low", "mean_high"] };
const isBound = (name: string): boolean =>
  /(^|_)low$|ceiling.*_(min|max)$|^num_twins$/.test(name) || /^high$|^(mean|ceiling|.*_drop)_high$/.test(name);

/** What can be drawn of a metric's matrices, the known ones first; bounds of intervals belong to what they bound. */
export function measured(metric: string, names: string[]): Measured[] {
  const words: Words = { ...KNOWN[metric], ...COMMON };
  const has = (name: string) => names.includes(name);
  const order = [...Object.keys(words).filter(has), ...names.filter((name) => !(name in words) && !isBound(name))];
  return order.map((name) => {
    const [title, text, nulls = [], ceilings = []] = words[name] ?? [name.replaceAll("_", " "), ""];
    const [low, high] = WITHIN[name] ?? [`${name}_low`, `${name}_high`];
    return {
      name,
      title,
      words: text,
      ...(has(low) && has(high) ? { low, high } : {}),
      nulls: nulls.filter(has),
      ceilings: ceilings.filter(has),
    };
  });
}
