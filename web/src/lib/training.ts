/** Where training is, in words: what the grid and the tables of the Training view say. */
import { count, duration, share } from "./format";
import type { StatusAnswer } from "./types";

export type ModelState = StatusAnswer["models"][string];
export type LayerState = ModelState["layers"][string];
export type Phase = LayerState["state"];
export type Job = ModelState["jobs"][number];

/** A sign for each state, so that none is told by its colour alone. */
export const SIGNS: Record<Phase, string> = {
  done: "✓",
  imported: "⇩",
  running: "▶",
  waiting: "·",
  stopped: "‖",
  failed: "✕",
};

export const MEANINGS: Record<Phase, string> = {
  done: "done",
  imported: "imported",
  running: "running",
  waiting: "waiting",
  stopped: "stopped",
  failed: "failed",
};

/** `0-5`, `0-2, 5` or `3`: consecutive layers together. */
export function span(layers: number[]): string {
  const known = [...new Set(layers)].sort((a, b) => a - b);
  const starts = known.filter((layer) => !known.includes(layer - 1));
  const ends = known.filter((layer) => !known.includes(layer + 1));
  return starts.map((first, i) => (first === ends[i] ? `${first}` : `${first}-${ends[i]}`)).join(", ");
}

/** The layers that a text such as `0-2, 5` names among `known`; all of them if it names none. */
export function chosenLayers(text: string | null, known: number[]): number[] {
  const wanted = new Set<number>();
  for (const part of (text ?? "").split(",")) {
    const [first, last = first] = part.split("-").map((number) => Number.parseInt(number, 10));
    if (first === undefined || last === undefined || Number.isNaN(first) || Number.isNaN(last)) continue;
    for (const layer of known) if (layer >= first && layer <= last) wanted.add(layer);
  }
  return wanted.size ? known.filter((layer) => wanted.has(layer)) : known;
}

/** How many layers are trained, what becomes of the others, and how long it takes. */
export function overall({ layers, eta_seconds }: StatusAnswer): string {
  const total = Object.values(layers).reduce((sum, number) => sum + number, 0);
  const trained = (layers.done ?? 0) + (layers.imported ?? 0);
  const others = (["running", "waiting", "stopped", "failed"] as const)
    .filter((name) => layers[name])
    .map((name) => `${layers[name]} ${name}`);
  const left = eta_seconds === null ? "" : `; about ${duration(eta_seconds)} left`;
  return [`${trained} of ${total} layers trained`, ...others].join(", ") + left;
}

export const stepOf = (job: { step: number; num_steps: number }): string =>
  job.step ? `${count(job.step)} of ${count(job.num_steps)}` : "starting";

/** What is known of one layer, for the note beside it and for who does not see the grid. */
export function describeLayer(model: string, layer: number, { state, gate }: LayerState, jobs: Job[]): string[] {
  const job = jobs.find((one) => one.layers.includes(layer) && one.state === state);
  const place = job?.layers.indexOf(layer) ?? -1;
  const lines = [`${model} layer ${layer}: ${MEANINGS[state]}`];
  if (gate) lines.push(gate.length ? `failed the gate: ${gate.join("; ")}` : "passed the gate");
  if (!job) return lines;
  lines.push(`step ${stepOf(job)} on ${job.host} ${job.device}${job.attempt > 1 ? `, attempt ${job.attempt}` : ""}`);
  const [fvu, l0, dead] = [job.fvu[place], job.l0[place], job.dead[place]];
  if (fvu !== undefined && l0 !== undefined && dead !== undefined) {
    lines.push(`FVU ${fvu.toPrecision(3)}, L0 ${l0.toPrecision(3)}, dead ${share(dead)}`);
  }
  if (state === "running" && job.eta_seconds != null) lines.push(`about ${duration(job.eta_seconds)} left`);
  if (job.failed) lines.push(job.failed);
  return lines;
}

/** Why a job does not run; empty for one that does. */
export function halted(job: Job): string {
  if (job.state === "failed") return job.failed ?? "it did not say why";
  if (job.state === "stopped") return `it was not heard of for a minute, at step ${stepOf(job)}; --resume goes on from its last checkpoint`;
  return "";
}
