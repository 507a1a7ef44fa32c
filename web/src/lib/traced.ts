/** What a trace says, in words and rows: the same words as `throughline trace` prints. */
import type { Cell } from "./export";
import { fixed, signed, token } from "./format";
import type { ActiveFeature, Chain, ChainStep, Trace } from "./types";

export type Place = [layer: number, position: number, feature: number];

export const keyOf = (place: readonly number[]): string => place.join(",");

/** The place that an address names; null if it names none. */
export function placeOf(text: string | null): Place | null {
  if (!text || !/^\d+,\d+,\d+$/.test(text)) return null;
  return text.split(",").map(Number) as Place;
}

export const placeOfFeature = (feature: ActiveFeature): Place => [feature.layer, feature.position, feature.feature];

/** The measured effect, or the predicted one where none was measured. */
export const effectOf = (feature: ActiveFeature): number => feature.effect ?? feature.predicted_effect;

export const topTokens = (feature: ActiveFeature): string => feature.top_tokens.slice(0, 3).map(token).join(" ");

export const nameOf = (feature: ActiveFeature): string => feature.label?.text ?? `unlabelled: ${topTokens(feature)}`;

export const tokenAt = (trace: Trace, position: number): string => trace.tokens[position]?.[1] ?? "";

export const allFeatures = (trace: Trace): ActiveFeature[] => trace.layers.flatMap((layer) => layer.features);

/** `layer 3`, `layers 3-5`. */
export function span(layers: readonly number[]): string {
  const [first, last] = [layers[0], layers.at(-1)];
  return first === last ? `layer ${first}` : `layers ${first}-${last}`;
}

export const layersOf = (step: ChainStep): string => span(step.features.map(([layer]) => layer));

export const pathOf = (chain: Chain): Place[] => chain.steps.flatMap((step) => step.features);

/** `#45 (layers 0-3) carry → #301 (layer 4) tens digit = 4 → '4'`. */
export function chainWords(trace: Trace, chain: Chain): string {
  const steps = chain.steps.map((step) => `#${step.features[0]?.[2]} (${layersOf(step)}) ${step.label}`);
  return [...steps, `'${token(trace.targets[chain.target]?.text ?? "")}'`].join(" → ");
}

/** The chain with the largest effect along its path, measured if it was; -1 where there is none. */
export function mainChain(chains: readonly Chain[]): number {
  const sizes = chains.map((chain) => Math.abs(chain.measured ?? chain.predicted));
  return sizes.reduce((best, size, i) => (best < 0 || size > (sizes[best] ?? 0) ? i : best), -1);
}

/** `predicted +0.21, measured +0.20`; what was not measured is not said. */
export const both = (predicted: number, measured: number | null): string =>
  `predicted ${signed(predicted)}${measured === null ? "" : `, measured ${signed(measured)}`}`;

export const alternatives = (num: number): string =>
  num === 1 ? "1 other path is of much the same strength" : `${num} other paths are of much the same strength`;

/** What the note beside a feature says. */
export function featureLines(trace: Trace, feature: ActiveFeature): string[] {
  const { label } = feature;
  const lines = [
    `#${feature.feature} ${nameOf(feature)}`,
    `layer ${feature.layer}, at ${token(tokenAt(trace, feature.position))} (position ${feature.position})`,
    `activation ${fixed(feature.activation)}, off ${fixed(feature.off_value)}${label ? `, F1 ${fixed(label.f1)} (${label.source})` : ""}`,
    `if off: ${both(feature.predicted_effect, feature.effect)}`,
  ];
  if (feature.effect === null) lines.push("not measured");
  else if (feature.answer_if_off !== null && feature.answer_if_off !== trace.answer) {
    lines.push(`the answer is then “${feature.answer_if_off}”`);
  }
  return lines;
}

export const FEATURE_COLUMNS = [
  "layer", "position", "token", "feature", "label", "source", "f1", "activation", "off_value", "effect", "predicted_effect",
  "answer_if_off",
]; // prettier-ignore

export const featureRows = (trace: Trace): Cell[][] =>
  allFeatures(trace).map((f) => [
    f.layer, f.position, tokenAt(trace, f.position), f.feature, f.label?.text, f.label?.source, f.label?.f1, f.activation,
    f.off_value, f.effect, f.predicted_effect, f.answer_if_off,
  ]); // prettier-ignore

export const EDGE_COLUMNS = [
  "source_layer", "source_position", "source_feature", "target_layer", "target_position", "target_feature", "predicted",
  "measured", "measured_activation",
]; // prettier-ignore

export const edgeRows = (trace: Trace): Cell[][] =>
  trace.edges.map((e) => [...e.source, ...e.target, e.predicted, e.measured, e.measured_activation]);

/** How a feature is set by hand. */
export type How = "off" | { times: number } | { value: number };

/** As `--set` writes it; its numbers have no exponents. */
export function setting(layer: number, feature: number, how: How, position: number | null): string {
  const plain = (value: number) => String(Number(value.toFixed(6))).includes("e") ? value.toFixed(0) : String(Number(value.toFixed(6)));
  const what = how === "off" ? "off" : "times" in how ? `x${plain(how.times)}` : `=${plain(how.value)}`;
  return [`layer=${layer}`, `feature=${feature}`, ...(position === null ? [] : [`position=${position}`]), what].join(",");
}

/** The settings with one more; what the same feature was set to at the same place before is no more. */
export function withSetting(settings: readonly string[], added: string): string[] {
  const where = (text: string) => text.slice(0, text.lastIndexOf(","));
  return [...settings.filter((text) => where(text) !== where(added)), added];
}

/** `layer=5,feature=132,off` in words. */
export function settingWords(text: string): string {
  const parts = text.split(",").map((part) => part.trim());
  const of = (name: string) => parts.find((part) => part.startsWith(`${name}=`))?.slice(name.length + 1);
  const how = parts.find((part) => part === "off" || /^[x=]/.test(part)) ?? "";
  const what = how === "off" ? "off" : how.startsWith("x") ? `× ${how.slice(1)}` : `set to ${how.slice(1)}`;
  const where = of("position");
  return `layer ${of("layer")} #${of("feature")}${where === undefined ? "" : ` at position ${where}`}: ${what}`;
}
