/** Births and deaths of throughlines, and how long they live: the arithmetic of ribbons and of persistence. */
import type { Ribbon } from "./types";

export const MOST_BANDS = 12; // more colours cannot be told apart

/** By layer: how many are alive, born there, and have it as their last layer (of the last layer none is known to die). */
export interface Flow {
  live: number[];
  births: number[];
  deaths: number[];
}

export function flowOf({ alive }: Ribbon): Flow {
  const layers = alive.map((_, i) => i);
  const at = (born: number, layer: number) => alive[born]?.[layer] ?? 0;
  const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);
  return {
    live: layers.map((layer) => sum(layers.map((born) => at(born, layer)))),
    births: layers.map((layer) => at(layer, layer)),
    deaths: layers.map((layer) =>
      layer + 1 === layers.length
        ? 0
        : sum(layers.filter((born) => born <= layer).map((born) => at(born, layer) - at(born, layer + 1))),
    ),
  };
}

/** Layers of birth taken together into at most MOST_BANDS bands: from place to before place. */
export function bands(size: number, most = MOST_BANDS): [number, number][] {
  const num = Math.min(size, most);
  const bound = (i: number) => Math.round((i * size) / num);
  return Array.from({ length: num }, (_, i) => [bound(i), bound(i + 1)]);
}

/** Where a curve first comes down to one half, by a straight line between two of its points; null if it never does. */
export function halfLife(x: number[], value: (number | null)[]): number | null {
  const known = x.flatMap((place, i): [number, number][] => {
    const y = value[i];
    return y === null || y === undefined ? [] : [[place, y]];
  });
  for (let i = 1; i < known.length; i++) {
    const [[x0, y0], [x1, y1]] = [known[i - 1] as [number, number], known[i] as [number, number]];
    if (y0 > 0.5 && y1 <= 0.5) return x0 + ((y0 - 0.5) / (y0 - y1)) * (x1 - x0);
  }
  return null;
}
