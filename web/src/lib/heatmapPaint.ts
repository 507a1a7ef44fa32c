/** Draws a heat map on its canvas: cells, lines between models, marked cells and what stands along the sides. */
import { readable, sequential } from "./colors";
import { fixed } from "./format";
import { blocks, numbered, partOf, type CellPlace, type Matrix, type Place, type View } from "./heatmap";

export interface Scene {
  raster: HTMLCanvasElement; // a pixel a cell
  values: Matrix;
  limits: [number, number];
  rows: Place[];
  columns: Place[];
  rowTitle: string;
  columnTitle: string;
  margin: { left: number; top: number; right: number; bottom: number };
  cell: number; // pixels of one that is not zoomed
  view: View;
  at: CellPlace | null;
  chosen: CellPlace | null;
}

const READABLE = 34; // pixels of a cell with room for its number
const FONT = "system-ui, sans-serif";

/** Where the cells are: the box that they are seen in, and the place of the first and the size of each as they are zoomed. */
interface Layout {
  wide: number;
  high: number;
  left: number;
  top: number;
  step: number;
}

export function paint(canvas: HTMLCanvasElement, scene: Scene): void {
  const context = canvas.getContext("2d");
  if (!context) return;
  const { rows, columns, margin, cell, view } = scene;
  const style = getComputedStyle(document.documentElement);
  const color = (name: string) => style.getPropertyValue(name).trim();
  const [wide, high] = [cell * columns.length, cell * rows.length];
  const layout = { wide, high, left: view.x * wide, top: view.y * high, step: view.k * cell };
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round((margin.left + wide + margin.right) * ratio);
  canvas.height = Math.round((margin.top + high + margin.bottom) * ratio);
  context.scale(ratio, ratio);
  context.translate(margin.left, margin.top);
  context.save();
  context.beginPath();
  context.rect(0, 0, wide, high);
  context.clip();
  hatch(context, layout, color("--empty"), color("--line"));
  cells(context, layout, scene, color("--page"));
  context.restore();
  sides(context, layout, scene, color("--ink"), color("--soft"));
}

/** Below the cells: what has no value lets it be seen. */
function hatch(context: CanvasRenderingContext2D, { wide, high }: Layout, background: string, line: string): void {
  context.fillStyle = background;
  context.fillRect(0, 0, wide, high);
  context.strokeStyle = line;
  context.lineWidth = 1;
  context.beginPath();
  for (let x = -high; x < wide; x += 6) {
    context.moveTo(x, high);
    context.lineTo(x + high, 0);
  }
  context.stroke();
}

function cells(context: CanvasRenderingContext2D, layout: Layout, scene: Scene, between: string): void {
  const { wide, high, left, top, step } = layout;
  context.imageSmoothingEnabled = false;
  context.drawImage(scene.raster, left, top, step * scene.columns.length, step * scene.rows.length);
  context.fillStyle = between;
  for (const { first } of blocks(scene.rows).slice(1)) context.fillRect(0, top + first * step - 1, wide, 2);
  for (const { first } of blocks(scene.columns).slice(1)) context.fillRect(left + first * step - 1, 0, 2, high);
  if (step >= READABLE) numbers(context, layout, scene);
  const marks: [CellPlace | null, number][] = [[scene.chosen, 3], [scene.at, 2]];
  for (const [place, thick] of marks) {
    if (place) outline(context, left + place.column * step, top + place.row * step, step, thick);
  }
}

/** The numbers of the cells that are seen. */
function numbers(context: CanvasRenderingContext2D, { wide, high, left, top, step }: Layout, { values, limits }: Scene): void {
  context.font = `11px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  const first = (shift: number) => Math.max(0, Math.floor(-shift / step));
  for (let row = first(top); row < values.length && top + row * step < high; row++) {
    const own = values[row] ?? [];
    for (let column = first(left); column < own.length && left + column * step < wide; column++) {
      const value = own[column] ?? null;
      if (value === null) continue;
      context.fillStyle = readable(sequential(partOf(value, limits)));
      context.fillText(fixed(value, Math.abs(value) >= 10 ? 0 : 2), left + (column + 0.5) * step, top + (row + 0.5) * step);
    }
  }
}

/** Light in dark, so that it is seen on every colour. */
function outline(context: CanvasRenderingContext2D, x: number, y: number, step: number, thick: number): void {
  context.lineWidth = thick + 2;
  context.strokeStyle = "#000000";
  context.strokeRect(x, y, step, step);
  context.lineWidth = thick;
  context.strokeStyle = "#ffffff";
  context.strokeRect(x, y, step, step);
}

/** The last part of a name, which tells models of one family apart. */
const shorten = (model: string): string => model.split("/").at(-1) ?? model;

function sides(context: CanvasRenderingContext2D, layout: Layout, scene: Scene, ink: string, soft: string): void {
  const { wide, high, left, top, step } = layout;
  const { rows, columns, margin } = scene;
  const inside = (place: number, end: number) => place >= 0 && place <= end;
  context.textBaseline = "middle";
  context.fillStyle = ink;
  context.font = `11px ${FONT}`;
  context.textAlign = "right";
  for (const row of numbered(rows, step, 13)) {
    const y = top + (row + 0.5) * step;
    if (inside(y, high)) context.fillText(String(rows[row]?.layer), -5, y);
  }
  context.textAlign = "center";
  for (const column of numbered(columns, step, 18)) {
    const x = left + (column + 0.5) * step;
    if (inside(x, wide)) context.fillText(String(columns[column]?.layer), x, high + 10);
  }
  const [down, across] = [blocks(rows), blocks(columns)];
  if (down.length > 1 || across.length > 1) {
    // A name stands at the middle of what is seen of its model.
    const middle = (first: number, end: number, shift: number, most: number) =>
      (Math.max(0, shift + first * step) + Math.min(most, shift + end * step)) / 2;
    const fitting = (model: string, first: number, end: number) =>
      context.measureText(model).width < (end - first) * step + 8 ? model : shorten(model);
    for (const { model, first, end } of down) {
      const y = middle(first, end, top, high);
      if (inside(y, high)) upright(context, fitting(model, first, end), -28, y);
    }
    for (const { model, first, end } of across) {
      const x = middle(first, end, left, wide);
      if (inside(x, wide)) context.fillText(fitting(model, first, end), x, high + 26);
    }
  }
  context.fillStyle = soft;
  context.font = `12px ${FONT}`;
  upright(context, scene.rowTitle, -margin.left + 9, high / 2);
  context.fillText(scene.columnTitle, wide / 2, high + margin.bottom - 9);
}

function upright(context: CanvasRenderingContext2D, words: string, x: number, y: number): void {
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.fillText(words, 0, 0);
  context.restore();
}
