/** A transfer result, or all of a metric in one, as matrices over places: what the heat maps of the page draw. */
import type { Measured } from "./arrays";
import { count, number, share } from "./format";
import type { CellPlace, Matrix, Place } from "./heatmap";
import type { TransferAnswer, TransferInfo } from "./types";

export interface Sheet {
  metric: string;
  rows: Place[];
  columns: Place[];
  matrices: Record<string, Matrix>; // those with at least one value
  infos: TransferInfo[];
}

const places = (model: string, layers: number[]): Place[] => layers.map((layer) => ({ model, layer }));
const hasValue = (matrix: Matrix): boolean => matrix.some((row) => row.some((value) => value !== null));

export function sheetOf({ info, matrices }: TransferAnswer): Sheet {
  return {
    metric: info.metric,
    rows: places(info.source, info.source_layers),
    columns: places(info.target, info.target_layers),
    matrices: Object.fromEntries(Object.entries(matrices).filter(([, matrix]) => hasValue(matrix))),
    infos: [info],
  };
}

/** All layers of all models against all; models in the order of `order`, then as they come. Null where nothing was computed. */
export function sheetOfAll(answers: TransferAnswer[], order: string[]): Sheet {
  const layers = new Map<string, Set<number>>();
  const named = new Set(answers.flatMap(({ info }) => [info.source, info.target]));
  for (const model of [...order.filter((one) => named.has(one)), ...named]) layers.set(model, layers.get(model) ?? new Set());
  for (const { info } of answers) {
    for (const layer of info.source_layers) layers.get(info.source)?.add(layer);
    for (const layer of info.target_layers) layers.get(info.target)?.add(layer);
  }
  const all = [...layers].flatMap(([model, own]) => places(model, [...own].sort((a, b) => a - b)));
  const rowOf = new Map(all.map(({ model, layer }, i) => [`${layer} ${model}`, i]));
  const matrices: Record<string, Matrix> = {};
  for (const { info, matrices: own } of answers) {
    const rows = info.source_layers.map((layer) => rowOf.get(`${layer} ${info.source}`) as number);
    const columns = info.target_layers.map((layer) => rowOf.get(`${layer} ${info.target}`) as number);
    for (const [name, matrix] of Object.entries(own)) {
      if (!hasValue(matrix)) continue;
      matrices[name] ??= all.map(() => new Array<number | null>(all.length).fill(null));
      const whole = matrices[name];
      matrix.forEach((line, i) => {
        line.forEach((value, j) => {
          (whole[rows[i] as number] as (number | null)[])[columns[j] as number] = value;
        });
      });
    }
  }
  return { metric: answers[0]?.info.metric ?? "", rows: all, columns: all, matrices, infos: answers.map(({ info }) => info) };
}

export const valueOf = (sheet: Sheet, name: string | undefined, { row, column }: CellPlace): number | null =>
  (name === undefined ? null : sheet.matrices[name]?.[row]?.[column]) ?? null;

export function infoOf(sheet: Sheet, { row, column }: CellPlace): TransferInfo | null {
  const [source, target] = [sheet.rows[row]?.model, sheet.columns[column]?.model];
  return sheet.infos.find((info) => info.source === source && info.target === target) ?? null;
}

/** `0.42 (0.38 to 0.46)`, the interval where there is one. */
export function withInterval(sheet: Sheet, one: Measured, cell: CellPlace): string {
  const [low, high] = [valueOf(sheet, one.low, cell), valueOf(sheet, one.high, cell)];
  const interval = low === null || high === null ? "" : ` (${number(low)} to ${number(high)})`;
  return number(valueOf(sheet, one.name, cell)) + interval;
}

/** `0.72 (0.70 to 0.75 over 3 seeds)`, the range where a ceiling is the mean of several seeds. */
function withRange(sheet: Sheet, name: string, cell: CellPlace): string {
  const [least, most] = [valueOf(sheet, `${name}_min`, cell), valueOf(sheet, `${name}_max`, cell)];
  const range = least === null || most === null ? "" : ` (${number(least)} to ${number(most)} over ${valueOf(sheet, "num_twins", cell)} seeds)`;
  return number(valueOf(sheet, name, cell)) + range;
}

/** What a cell says: from where to where, the number with its interval, nulls, ceilings and what they rest on. */
export function describeCell(sheet: Sheet, one: Measured, known: Measured[], cell: CellPlace): string[] {
  const [from, towards] = [sheet.rows[cell.row], sheet.columns[cell.column]];
  const info = infoOf(sheet, cell);
  const called = (name: string) => known.find((other) => other.name === name)?.title ?? name;
  const beside = [...one.nulls, ...one.ceilings].filter((name) => valueOf(sheet, name, cell) !== null);
  return [
    `${from?.model} layer ${from?.layer} → ${towards?.model} layer ${towards?.layer}`,
    info ? `${one.title}: ${withInterval(sheet, one, cell)}` : "not computed",
    ...beside.map((name) => `${called(name)}: ${withRange(sheet, name, cell)}`),
    ...(info ? [`n = ${count(info.num_tokens)} tokens of ${count(info.num_documents)} documents`] : []),
  ];
}

/** Where a number lies between its null and its ceiling, in words; empty where neither can be said. */
export function standing(sheet: Sheet, one: Measured, cell: CellPlace): string {
  const value = valueOf(sheet, one.name, cell);
  if (value === null) return "";
  const low = valueOf(sheet, one.low, cell) ?? value;
  const high = valueOf(sheet, one.high, cell) ?? value;
  const chance = valueOf(sheet, one.nulls[0], cell);
  const most = valueOf(sheet, one.ceilings[0], cell);
  const said: string[] = [];
  if (chance !== null) said.push(low > chance ? "above the null" : high < chance ? "below the null" : "not told apart from the null");
  if (most !== null) said.push(high < most ? "below the ceiling" : low > most ? "above the ceiling" : "at the ceiling");
  return said.join(", ");
}

/** `12,000 tokens`, or from the least to the most of several results. */
function span(values: number[], write: (value: number) => string): string {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  return least === most ? write(least) : `${write(least)} to ${write(most)}`;
}

export function describeSample(infos: TransferInfo[]): string {
  const of = (name: "num_tokens" | "num_documents" | "coverage") => infos.map((info) => info[name]);
  const seeds = [...new Set(infos.map(({ seed }) => seed))].join(", ");
  return (
    `n = ${span(of("num_tokens"), count)} tokens of ${span(of("num_documents"), count)} documents, ` +
    `${span(of("coverage"), (value) => share(value, 0))} of the source's tokens aligned, seed ${seeds}`
  );
}
