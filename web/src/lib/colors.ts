/** Colours that people with any kind of colour vision tell apart: Okabe and Ito's, cividis, and blue to orange. */
import { interpolateCividis } from "d3-scale-chromatic";

/** Okabe and Ito 2008, without the yellow that is too light on white; index by series. */
export const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f6bb3", "#8a8a8a"];

export const series = (index: number): string => SERIES[index % SERIES.length] as string;

/** The colour of a share between 0 and 1. */
export const sequential = (part: number): string => interpolateCividis(Math.min(1, Math.max(0, part)));

/** Blue for what lowers, orange for what raises; `part` from -1 to 1. */
export function diverging(part: number, dark: boolean): string {
  const size = Math.min(1, Math.abs(part));
  const [r, g, b] = part < 0 ? [0, 114, 178] : [213, 94, 0];
  const [x, y, z] = dark ? [38, 41, 46] : [246, 246, 244];
  const mix = (from: number, towards: number) => Math.round(from + (towards - from) * size);
  return `rgb(${mix(x, r)}, ${mix(y, g)}, ${mix(z, b)})`;
}

/** Black or white, whichever can be read on a colour written as #rrggbb or rgb(r, g, b). */
export function readable(background: string): string {
  const parts = background.startsWith("#")
    ? [1, 3, 5].map((i) => Number.parseInt(background.slice(i, i + 2), 16))
    : (background.match(/\d+(\.\d+)?/g) ?? []).map(Number);
  const [r = 0, g = 0, b = 0] = parts.map((part) => {
    const s = part / 255;
    return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

/** Both ends of a colour scale, as `figures.style.color_limits` has them: from 0, and no further below it than above. */
export function limits(values: (number | null | undefined)[]): [number, number] {
  const finite = values.filter((v): v is number => typeof v === "number" && Number.isFinite(v));
  if (!finite.length) return [0, 1];
  const lowest = finite.reduce((a, b) => Math.min(a, b), Number.POSITIVE_INFINITY);
  const highest = finite.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const high = highest >= 0.25 && highest <= 1 ? 1 : highest > 0 ? highest : 1;
  return [Math.max(Math.min(lowest, 0), -high), high];
}
