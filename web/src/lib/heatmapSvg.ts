/** Heat maps side by side as one svg, for saving: every cell a rectangle, with labels and the colour bar. */
import { readable, sequential } from "./colors";
import { fixed, number } from "./format";
import { blocks, numbered, partOf, type Matrix, type Place } from "./heatmap";

export interface Panel {
  title: string;
  values: Matrix;
}

export interface Look {
  ink: string;
  page: string;
  empty: string;
}

export interface Picture {
  title: string;
  words: string[]; // below the title: what is drawn, and what it rests on
  panels: Panel[];
  rows: Place[];
  columns: Place[];
  rowTitle: string;
  columnTitle: string;
  limits: [number, number];
  look: Look;
}

const NAMES: Record<string, string> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text: string): string => text.replace(/[&<>"']/g, (c) => NAMES[c] ?? c);

function text(x: number, y: number, words: string, rest = ""): string {
  return `<text x="${x}" y="${y}" ${rest}>${escaped(words)}</text>`;
}

const MARGIN = { left: 64, top: 26, right: 18, bottom: 54 };
const BAR = 84;

export function heatmapSvg(picture: Picture): { svg: string; width: number; height: number } {
  const { panels, rows, columns, look, limits } = picture;
  const size = Math.max(5, Math.min(40, 640 / Math.max(rows.length, columns.length)));
  const [wide, high] = [Math.max(size * columns.length, 60), size * rows.length];
  const head = 34 + 16 * picture.words.length;
  const step = MARGIN.left + wide + MARGIN.right;
  const width = Math.max(step * panels.length + BAR, 460);
  const height = head + MARGIN.top + Math.max(high, 120) + MARGIN.bottom;
  const parts = [`<rect width="${width}" height="${height}" fill="${look.page}"/>`];
  parts.push(text(12, 22, picture.title, 'font-size="15" font-weight="bold"'));
  picture.words.forEach((words, i) => parts.push(text(12, 40 + 16 * i, words)));
  panels.forEach((panel, i) => {
    parts.push(panelSvg(picture, panel, i * step + MARGIN.left, head + MARGIN.top, size));
  });
  const [left, top, tall] = [step * panels.length + 8, head + MARGIN.top, Math.max(high, 120)];
  for (let i = 0; i < 64; i++) {
    const y = top + (tall * (63 - i)) / 64;
    parts.push(`<rect x="${left}" y="${y}" width="14" height="${tall / 64 + 0.5}" fill="${sequential(i / 63)}"/>`);
  }
  for (const part of [0, 0.5, 1]) {
    const value = limits[0] + part * (limits[1] - limits[0]);
    parts.push(text(left + 19, top + tall * (1 - part) + 4, number(value)));
  }
  const svg =
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" ` +
    `font-family="system-ui, sans-serif" font-size="12" fill="${look.ink}">${parts.join("\n")}</svg>`;
  return { svg, width, height };
}

function panelSvg(picture: Picture, panel: Panel, left: number, top: number, size: number): string {
  const { rows, columns, limits, look } = picture;
  const [wide, high] = [size * columns.length, size * rows.length];
  const parts = [text(0, -9, panel.title, 'font-weight="bold"')];
  panel.values.forEach((own, row) => {
    own.forEach((value, column) => {
      const fill = value === null ? look.empty : sequential(partOf(value, limits));
      parts.push(`<rect x="${column * size}" y="${row * size}" width="${size}" height="${size}" fill="${fill}" shape-rendering="crispEdges"/>`);
      const [x, y] = [(column + 0.5) * size, (row + 0.5) * size + 4];
      if (value === null && size >= 12) parts.push(text(x, y, "–", 'text-anchor="middle"'));
      else if (value !== null && size >= 30) {
        parts.push(text(x, y, fixed(value), `text-anchor="middle" font-size="11" fill="${readable(fill)}"`));
      }
    });
  });
  for (const row of numbered(rows, size, 14)) {
    parts.push(text(-5, (row + 0.5) * size + 4, String(rows[row]?.layer), 'text-anchor="end" font-size="10"'));
  }
  for (const column of numbered(columns, size, 20)) {
    parts.push(text((column + 0.5) * size, high + 13, String(columns[column]?.layer), 'text-anchor="middle" font-size="10"'));
  }
  const [down, across] = [blocks(rows), blocks(columns)];
  const line = (x1: number, y1: number, x2: number, y2: number) =>
    `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${look.page}" stroke-width="2"/>`;
  for (const { first } of down.slice(1)) parts.push(line(0, first * size, wide, first * size));
  for (const { first } of across.slice(1)) parts.push(line(first * size, 0, first * size, high));
  if (down.length > 1 || across.length > 1) {
    for (const { model, first, end } of down) {
      const y = ((first + end) / 2) * size;
      parts.push(text(0, 0, model, `transform="translate(-26 ${y}) rotate(-90)" text-anchor="middle" font-size="11"`));
    }
    for (const { model, first, end } of across) {
      parts.push(text(((first + end) / 2) * size, high + 27, model, 'text-anchor="middle" font-size="11"'));
    }
  }
  parts.push(text(0, 0, picture.rowTitle, `transform="translate(-44 ${high / 2}) rotate(-90)" text-anchor="middle"`));
  parts.push(text(wide / 2, high + 44, picture.columnTitle, 'text-anchor="middle"'));
  return `<g transform="translate(${left} ${top})">${parts.join("\n")}</g>`;
}
