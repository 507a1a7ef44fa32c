/** The arithmetic of a heat map: which cell is where, what of it is seen, and its colours. Rows are sources, columns targets. */
import { sequential } from "./colors";

export type Matrix = (number | null)[][];

/** What a row or a column stands for. */
export interface Place {
  model: string;
  layer: number;
}

export interface CellPlace {
  row: number;
  column: number;
}

/** How a map is moved: `k` times as large, shifted by shares of its own width and height. */
export interface View {
  k: number;
  x: number;
  y: number;
}

export const WHOLE: View = { k: 1, x: 0, y: 0 };

/** Consecutive places of one model, from `first` to before `end`. */
export function blocks(places: Place[]): { model: string; first: number; end: number }[] {
  const found: { model: string; first: number; end: number }[] = [];
  places.forEach(({ model }, i) => {
    const last = found.at(-1);
    if (last?.model === model) last.end = i + 1;
    else found.push({ model, first: i, end: i + 1 });
  });
  return found;
}

/** Places that get a number, when one needs `room` pixels and a cell has `size`: by equal steps, anew in each model. */
export function numbered(places: Place[], size: number, room: number): number[] {
  const step = Math.max(1, Math.ceil(room / size));
  return blocks(places).flatMap(({ first, end }) => {
    const own = Array.from({ length: Math.ceil((end - first) / step) }, (_, i) => first + i * step);
    // Not too near to the next model's first.
    return own.filter((place) => place === first || end - place >= step / 2);
  });
}

/** The cell at a point, given in shares of the map's width and height. */
export function cellAt(view: View, rows: number, columns: number, x: number, y: number): CellPlace | null {
  const column = Math.floor(((x - view.x) / view.k) * columns);
  const row = Math.floor(((y - view.y) / view.k) * rows);
  return row >= 0 && row < rows && column >= 0 && column < columns ? { row, column } : null;
}

/** The same view, moved as little as makes a cell all seen. */
export function reveal(view: View, cell: CellPlace, rows: number, columns: number): View {
  const shift = (from: number, place: number, size: number) => {
    const [first, end] = [from + (place / size) * view.k, from + ((place + 1) / size) * view.k];
    return first < 0 ? from - first : end > 1 ? from - (end - 1) : from;
  };
  return { k: view.k, x: shift(view.x, cell.column, columns), y: shift(view.y, cell.row, rows) };
}

/** Where a key leads from a cell; null if it does not lead anywhere. */
export function stepTo(key: string, from: CellPlace | null, rows: number, columns: number): CellPlace | null {
  const moves: Record<string, [number, number]> = {
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    Home: [0, -columns],
    End: [0, columns],
    PageUp: [-rows, 0],
    PageDown: [rows, 0],
  };
  const move = moves[key];
  if (!move) return null;
  if (!from) return { row: 0, column: 0 };
  const inside = (place: number, size: number) => Math.max(0, Math.min(size - 1, place));
  return { row: inside(from.row + move[0], rows), column: inside(from.column + move[1], columns) };
}

export const partOf = (value: number, [low, high]: [number, number]): number => (value - low) / (high - low || 1);

/** Red, green, blue and opacity of every cell, row by row; a cell without a value is transparent. */
export function pixels(values: Matrix, limits: [number, number]): Uint8ClampedArray<ArrayBuffer> {
  const scale = Array.from({ length: 256 }, (_, i) => (sequential(i / 255).match(/\d+/g) ?? []).map(Number));
  const columns = values[0]?.length ?? 0;
  const data = new Uint8ClampedArray(4 * values.length * columns);
  values.forEach((own, row) => {
    own.forEach((value, column) => {
      if (value === null) return;
      const [r = 0, g = 0, b = 0] = scale[Math.round(255 * Math.min(1, Math.max(0, partOf(value, limits))))] ?? [];
      data.set([r, g, b, 255], 4 * (row * columns + column));
    });
  });
  return data;
}

/** At which ends of a scale there are values beyond it. */
export function beyond(values: (number | null)[], [low, high]: [number, number]): { below: boolean; above: boolean } {
  const known = values.filter((value) => value !== null);
  return { below: known.some((value) => value < low), above: known.some((value) => value > high) };
}
