/** The server of a run. Every answer's type comes from its own description. */
import type { operations } from "./api";
import { AskError, type FeatureQuery, type JobEvent, type Live, type PairQuery, type Source } from "./source";
import type { Analysis, Comparison, JobAnswer, StatusAnswer, Trace } from "./types";

type Answers<Name extends keyof operations> = operations[Name]["responses"] extends {
  200: { content: { "application/json": infer Answer } };
}
  ? Answer
  : never;

const UNREACHABLE = "the server does not answer; is `throughline serve` still running?";
const AGAIN_MILLISECONDS = 2000;

type Value = string | number | boolean | string[] | number[] | undefined;

function address(path: string, query: Record<string, Value> = {}): string {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== "") asked.append(name, String(one));
    }
  }
  const text = asked.toString();
  return `/api/${path}${text ? `?${text}` : ""}`;
}

async function ask<Answer>(method: string, path: string, body?: unknown): Promise<Answer> {
  let answer: Response;
  try {
    answer = await fetch(path, {
      method,
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new AskError(0, UNREACHABLE);
  }
  if (answer.ok) return (await answer.json()) as Answer;
  const told = await answer.json().catch(() => null);
  throw new AskError(answer.status, told?.detail ?? `the server answered ${answer.status}`);
}

const get = <Answer>(path: string, query?: object): Promise<Answer> =>
  ask<Answer>("GET", address(path, query as Record<string, Value>));

const JOB_EVENTS = ["queued", "position", "running", "progress", "done", "failed", "cancelled"] as const;
const ENDS = ["done", "failed", "cancelled"];

/** Server-sent events of a job. A browser connects anew by itself; a server that was started again does not know the job. */
function follow(id: string, tell: (event: JobEvent) => void): () => void {
  const events = new EventSource(address(`jobs/${encodeURIComponent(id)}/events`));
  let over = false;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const end = (event: JobEvent) => {
    over = true;
    events.close();
    tell(event);
  };
  for (const name of JOB_EVENTS) {
    events.addEventListener(name, (message) => {
      const event = { ...JSON.parse((message as MessageEvent).data), name } as JobEvent;
      if (ENDS.includes(name)) end(event);
      else tell(event);
    });
  }
  const look = async () => {
    if (over) return;
    try {
      const job = await get<JobAnswer>(`jobs/${encodeURIComponent(id)}`);
      if (job.phase === "done" || job.phase === "cancelled") end({ name: job.phase });
      else if (job.phase === "failed") end({ name: "failed", error: job.error ?? "" });
      else if (events.readyState === EventSource.CLOSED) again();
    } catch (error) {
      if (error instanceof AskError && error.status === 404) {
        end({ name: "failed", error: "the server was started again and does not know this job; ask for it again" });
      } else {
        tell({ name: "lost" });
        again();
      }
    }
  };
  const again = () => {
    clearTimeout(timer);
    timer = setTimeout(look, AGAIN_MILLISECONDS);
  };
  events.addEventListener("error", () => {
    if (over) return;
    tell({ name: "lost" });
    again();
  });
  return () => {
    over = true;
    clearTimeout(timer);
    events.close();
  };
}

function followStatus(tell: (status: StatusAnswer | "lost") => void): () => void {
  let events: EventSource;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const open = () => {
    events = new EventSource(address("status/events"));
    events.addEventListener("status", (message) => tell(JSON.parse((message as MessageEvent).data)));
    events.addEventListener("error", () => {
      tell("lost");
      if (events.readyState === EventSource.CLOSED) timer = setTimeout(open, AGAIN_MILLISECONDS);
    });
  };
  open();
  return () => {
    clearTimeout(timer);
    events.close();
  };
}

const live: Live = {
  askTrace: (request) => ask<JobAnswer>("POST", address("traces"), request),
  askComparison: (request) => ask<JobAnswer>("POST", address("comparisons"), request),
  job: (id) => get<JobAnswer>(`jobs/${encodeURIComponent(id)}`),
  traceOf: (id) => get<Trace>(`jobs/${encodeURIComponent(id)}/result`),
  comparisonOf: (id) => get<Comparison>(`jobs/${encodeURIComponent(id)}/result`),
  cancel: (id) => ask<JobAnswer>("DELETE", address(`jobs/${encodeURIComponent(id)}`)),
  follow,
  followStatus,
};

export const server: Source = {
  overview: () => get<Answers<"overview_api_overview_get">>("overview"),
  features: (query: FeatureQuery) => get<Answers<"features_api_features_get">>("features", query),
  feature: (model, layer, feature) =>
    get<Answers<"feature_api_feature_get">>("feature", { model, layer, feature }),
  transfers: () => get<Answers<"transfers_api_transfers_get">>("transfers"),
  transfer: (metric, source, target) =>
    get<Answers<"transfer_api_transfer_get">>("transfer", { metric, source, target }),
  pairs: (query: PairQuery) => get<Answers<"pairs_api_pairs_get">>("pairs", query),
  // Asked for only where there is one: a browser complains of every address that has no answer.
  analysis: async () => ((await server.overview()).has_analysis ? get<Analysis>("analysis") : null),
  traces: () => get<Answers<"traces_api_traces_get">>("traces"),
  trace: (id) => get<Trace>(`traces/${encodeURIComponent(id)}`),
  comparisons: () => get<Answers<"comparisons_api_comparisons_get">>("comparisons"),
  comparison: (id) => get<Comparison>(`comparisons/${encodeURIComponent(id)}`),
  totals: () => get<Answers<"totals_api_totals_get">>("totals"),
  status: () => get<Answers<"status_api_status_get">>("status"),
  training: () => get<Answers<"training_api_training_get">>("training"),
  page: async (title, data) => {
    const answer = await fetch("/page.html");
    if (!answer.ok) throw new AskError(answer.status, "the server did not send the page");
    return fill(await answer.text(), title, data);
  },
  leftOut: [],
  start: null,
  live,
};

export const escapeText = (text: string): string => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

/** Title and data as they stand in a page: no `<` can end the element that data stand in. */
export const escaped = (title: string, data: unknown) => ({
  title: escapeText(title),
  data: JSON.stringify(data).replace(/</g, "\\u003c"),
});

/** The page's template with a title and data in it, in one pass, so that data which looks like a place for more stays data. */
export function fill(template: string, title: string, data: unknown): string {
  const parts: Record<string, string> = escaped(title, data);
  return template.replace(/\{\{(title|data)\}\}/g, (_, name: string) => parts[name] ?? "");
}
