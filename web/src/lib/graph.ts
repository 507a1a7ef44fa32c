/**
 * Where everything of a trace's graph stands: layers across, positions down, the answer's tokens at the right.
 *
 * 1. a node for each shown feature, and for each feature that a chain goes through and that is not shown
 * 2. nodes of one layer and position stand under each other with their names beside them, or close together without
 * 3. a row is as high as the fullest of its places
 * 4. a line for each edge, and from the last layer's features to each token of the answer, as strong as it is
 *    beside the strongest between the same two layers
 */
import { token } from "./format";
import { type Place, allFeatures, effectOf, keyOf, pathOf, placeOfFeature, topTokens } from "./traced";
import type { ActiveFeature, Trace } from "./types";

export interface GraphNode {
  id: string;
  place: Place;
  column: number;
  x: number;
  y: number;
  r: number;
  shown: ActiveFeature | null; // null: only a chain goes through it
  name: string; // without a label its top tokens alone: there is little room
  room: number; // pixels for its name at its right
}

export interface GraphLine {
  id: string;
  source: string;
  target: string;
  value: number; // change of the target when the source is off: measured, or else predicted
  predicted: number;
  measured: number | null;
  strength: number; // |value| over the largest between the same layers
  path: string;
}

export interface GraphEnd {
  id: string;
  x: number;
  y: number;
  text: string;
}

export interface Graph {
  width: number;
  height: number;
  left: number; // where the first layer begins
  nodes: GraphNode[];
  lines: GraphLine[];
  ends: GraphEnd[];
  rows: { position: number; y: number; height: number; text: string; kind: "prompt" | "answer" }[];
  columns: { layer: number; x: number; width: number }[];
}

export const HEAD = 22; // height of the layers' names
const PITCH = 17; // between nodes; no circle is wider
const LEAST_R = 3.5;
const MOST_R = 8;
const RING_R = 4;
const ENDS = 92; // width for the answer's tokens
const EMPTY_ROW = 15;
const NAMED_COLUMN = 104;
const BARE_COLUMN = 46;
const CHARACTER = 5.9; // width of a character of a name
const WIDE = /[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\p{Extended_Pictographic}]/u;

const PLAIN = /^[\x20-\x7e]*$/;
const seen = new Intl.Segmenter(undefined, { granularity: "grapheme" });

/** As much of a text as fits; by characters as people see them, those of East Asia and pictures counted double. */
export function fit(text: string, room: number): string {
  const size = (c: string) => (WIDE.test(c) ? 2 : 1) * CHARACTER;
  const characters = PLAIN.test(text) ? [...text] : [...seen.segment(text)].map((one) => one.segment);
  if (characters.reduce((sum, c) => sum + size(c), 0) <= room) return text;
  let left = room - CHARACTER;
  const kept: string[] = [];
  for (const c of characters) {
    left -= size(c);
    if (left < 0) break;
    kept.push(c);
  }
  return kept.length ? `${kept.join("").trimEnd()}…` : "";
}

export const endOf = (target: number): string => `answer,${target}`;

const curve = (a: { x: number; y: number }, b: { x: number; y: number }): string => {
  const middle = (a.x + b.x) / 2;
  return `M${a.x.toFixed(1)},${a.y.toFixed(1)}C${middle.toFixed(1)},${a.y.toFixed(1)} ${middle.toFixed(1)},${b.y.toFixed(1)} ${b.x.toFixed(1)},${b.y.toFixed(1)}`;
};

/** The graph in at least `width` pixels; wider if the layers need it. `named`: names beside the nodes. */
export function layOut(trace: Trace, width: number, named: boolean): Graph {
  const longest = Math.max(1, ...trace.tokens.map(([, text]) => [...token(text)].length));
  const left = Math.min(96, 34 + 7.3 * Math.min(longest, 9));
  const num = Math.max(1, trace.layers.length);
  const columnWidth = Math.max(named ? NAMED_COLUMN : BARE_COLUMN, (width - left - ENDS) / num);
  const columnOf = new Map(trace.layers.map(({ layer }, i) => [layer, i]));
  const columns = trace.layers.map(({ layer }, i) => ({ layer, x: left + i * columnWidth, width: columnWidth }));

  // 1. nodes, by place
  const found = new Map<string, { place: Place; shown: ActiveFeature | null; name: string }>();
  for (const feature of allFeatures(trace)) {
    const place = placeOfFeature(feature);
    found.set(keyOf(place), { place, shown: feature, name: feature.label?.text ?? topTokens(feature) });
  }
  for (const step of trace.chains.flatMap((chain) => chain.steps)) {
    for (const place of step.features as Place[]) {
      const id = keyOf(place);
      if (!found.has(id)) found.set(id, { place, shown: null, name: step.label.replace(/^unlabelled: /, "") });
    }
  }
  const cells = new Map<string, string[]>();
  for (const [id, { place }] of found) {
    const cell = `${columnOf.get(place[0]) ?? -1},${place[1]}`;
    cells.set(cell, [...(cells.get(cell) ?? []), id]);
  }

  // 3. rows
  const perLine = named ? 1 : Math.max(1, Math.floor((columnWidth - 6) / PITCH));
  const linesOf = (position: number) =>
    Math.max(0, ...trace.layers.map((_, i) => Math.ceil((cells.get(`${i},${position}`)?.length ?? 0) / perLine)));
  const ended = new Set(trace.targets.map((target) => target.position));
  let y = HEAD;
  const rows = trace.tokens.map(([, text], position) => {
    const height = Math.max(linesOf(position) * PITCH + 4, ended.has(position) ? PITCH + 4 : EMPTY_ROW);
    const row = { position, y, height, text, kind: position < trace.num_prompt_tokens ? ("prompt" as const) : ("answer" as const) };
    y += height;
    return row;
  });

  // 2. where nodes stand in their cells
  const largest = Math.max(0, ...allFeatures(trace).map((feature) => Math.abs(effectOf(feature)))) || 1;
  const nodes: GraphNode[] = [];
  for (const [cell, ids] of cells) {
    const [column = 0, position = 0] = cell.split(",").map(Number);
    const [place, row] = [columns[column], rows[position]];
    if (!place || !row) continue;
    const used = Math.ceil(ids.length / perLine);
    ids.forEach((id, i) => {
      const { shown, name, ...rest } = found.get(id)!;
      const inLine = Math.min(perLine, ids.length - Math.floor(i / perLine) * perLine);
      const x = named ? place.x + MOST_R + 3 : place.x + columnWidth / 2 + ((i % perLine) - (inLine - 1) / 2) * PITCH;
      nodes.push({
        id,
        place: rest.place,
        column,
        x,
        y: row.y + row.height / 2 + (Math.floor(i / perLine) - (used - 1) / 2) * PITCH,
        r: shown ? LEAST_R + (MOST_R - LEAST_R) * Math.sqrt(Math.abs(effectOf(shown)) / largest) : RING_R,
        shown,
        name,
        room: named ? columnWidth - 2 * MOST_R - 12 : 0,
      });
    });
  }
  nodes.sort((a, b) => a.column - b.column || a.y - b.y || a.x - b.x);

  const edge = left + num * columnWidth;
  const ends = trace.targets.map((target, i) => {
    const row = rows[target.position];
    return { id: endOf(i), x: edge + 10, y: row ? row.y + row.height / 2 : HEAD, text: `${token(target.text)} not ${token(target.against)}` };
  });
  return { width: edge + ENDS, height: y + 4, left, nodes, lines: findLines(trace, nodes, ends), ends, rows, columns };
}

// 4. lines
function findLines(trace: Trace, nodes: GraphNode[], ends: GraphEnd[]): GraphLine[] {
  const at = new Map<string, { x: number; y: number; column?: number }>([...nodes, ...ends].map((one) => [one.id, one]));
  const raw: Omit<GraphLine, "strength" | "path">[] = trace.edges.map((edge) => ({
    id: `${keyOf(edge.source)}>${keyOf(edge.target)}`,
    source: keyOf(edge.source),
    target: keyOf(edge.target),
    value: edge.measured ?? edge.predicted,
    predicted: edge.predicted,
    measured: edge.measured ?? null,
  }));
  for (const feature of trace.layers.at(-1)?.features ?? []) {
    const source = keyOf(placeOfFeature(feature));
    ends.forEach(({ id }, i) => {
      const [predicted, measured] = [feature.predicted_effects[i] ?? 0, feature.effects[i] ?? null];
      raw.push({ id: `${source}>${id}`, source, target: id, value: measured ?? predicted, predicted, measured });
    });
  }
  const drawn = raw.filter((line) => at.has(line.source) && at.has(line.target));
  const largest = new Map<number, number>();
  const boundary = (line: { source: string }) => at.get(line.source)?.column ?? -1;
  for (const line of drawn) largest.set(boundary(line), Math.max(largest.get(boundary(line)) ?? 0, Math.abs(line.value)));
  return drawn
    .map((line) => ({
      ...line,
      strength: Math.abs(line.value) / (largest.get(boundary(line)) || 1),
      path: curve(at.get(line.source)!, at.get(line.target)!),
    }))
    .sort((a, b) => a.strength - b.strength); // the strongest are drawn last, over the others
}

/** A chain's way through the graph, from its first feature to its token of the answer. */
export function chainPath(graph: Graph, trace: Trace, number: number): { ids: Set<string>; path: string } {
  const chain = trace.chains[number];
  if (!chain) return { ids: new Set(), path: "" };
  const ids = [...pathOf(chain).map(keyOf), endOf(chain.target)];
  const at = new Map<string, { x: number; y: number }>([...graph.nodes, ...graph.ends].map((one) => [one.id, one]));
  const places = ids.flatMap((id) => at.get(id) ?? []);
  return { ids: new Set(ids), path: places.slice(1).map((place, i) => curve(places[i]!, place)).join("") };
}

/** The node that an arrow key leads to: left and right the nearest of the next layer that has any, up and down in the same. */
export function step(nodes: readonly GraphNode[], from: GraphNode, key: string): GraphNode {
  const near = (found: GraphNode[]) =>
    found.reduce<GraphNode | null>((best, node) => (!best || Math.abs(node.y - from.y) < Math.abs(best.y - from.y) ? node : best), null);
  const column = (way: number) => {
    const columns = [...new Set(nodes.map((node) => node.column))].filter((one) => (one - from.column) * way > 0);
    const next = way > 0 ? Math.min(...columns) : Math.max(...columns);
    return near(nodes.filter((node) => node.column === next));
  };
  const own = nodes.filter((node) => node.column === from.column);
  const place = own.indexOf(from);
  switch (key) {
    case "ArrowLeft":
      return column(-1) ?? from;
    case "ArrowRight":
      return column(1) ?? from;
    case "ArrowUp":
      return own[place - 1] ?? from;
    case "ArrowDown":
      return own[place + 1] ?? from;
    case "Home":
      return nodes[0] ?? from;
    case "End":
      return nodes.at(-1) ?? from;
    default:
      return from;
  }
}

/** What a node has to do with: itself, and both ends of its lines. */
export function around(graph: Graph, id: string): { ids: Set<string>; lines: GraphLine[] } {
  const lines = graph.lines.filter((line) => line.source === id || line.target === id);
  return { ids: new Set([id, ...lines.flatMap((line) => [line.source, line.target])]), lines };
}
