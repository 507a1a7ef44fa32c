/**
 * Where the page's data come from: a server (`live.ts`) or the page itself (`embedded.ts`).
 * Views ask a `Source` and do not know which it is; what only a server can do is in `source.live`, null without one.
 */
import type {
  Analysis,
  CompareRequest,
  Comparison,
  ComparisonRow,
  ComparisonTotals,
  FeatureAnswer,
  FeaturePage,
  JobAnswer,
  Overview,
  PairPage,
  StatusAnswer,
  Trace,
  TraceRequest,
  TraceRow,
  TrainingCurve,
  TransferAnswer,
  TransferInfo,
} from "./types";

export type SortBy = "f1" | "density" | "max" | "num_active" | "layer" | "label";

/** Which features, in which order, and which page of them; what is left out is not asked for. */
export interface FeatureQuery {
  q?: string;
  model?: string[];
  layer?: number[];
  min_density?: number;
  max_density?: number;
  min_f1?: number;
  labelled?: boolean;
  source?: string;
  sort?: SortBy;
  descending?: boolean;
  offset?: number;
  limit?: number;
}

/** The matched features behind one cell of `matching`. */
export interface PairQuery {
  source: string;
  target: string;
  source_layer: number;
  target_layer: number;
  offset?: number;
  limit?: number;
}

export interface Source {
  overview(): Promise<Overview>;
  features(query: FeatureQuery): Promise<FeaturePage>;
  feature(model: string, layer: number, feature: number): Promise<FeatureAnswer>;
  transfers(): Promise<TransferInfo[]>;
  transfer(metric: string, source: string, target: string): Promise<TransferAnswer>;
  pairs(query: PairQuery): Promise<PairPage>;
  /** null where the run has none yet. */
  analysis(): Promise<Analysis | null>;
  traces(): Promise<TraceRow[]>;
  trace(id: string): Promise<Trace>;
  comparisons(): Promise<ComparisonRow[]>;
  comparison(id: string): Promise<Comparison>;
  totals(): Promise<ComparisonTotals[]>;
  status(): Promise<StatusAnswer>;
  training(): Promise<TrainingCurve[]>;
  /** A page of its own that holds only what `choose` says, as one file to send to somebody. */
  page(title: string, data: unknown): Promise<string>;
  /** What a page without a server leaves out, in sentences. */
  readonly leftOut: string[];
  /** The address that the page begins at if it is opened without one; null for the overview. */
  readonly start: string | null;
  readonly live: Live | null;
}

/** What becomes of a job, as it happens. */
export type JobEvent =
  | { name: "queued" | "running" }
  | { name: "position"; position: number }
  | { name: "progress"; doing: string; step: number; num_steps: number }
  | { name: "lost" } // the connection; it is tried again
  | { name: "done" | "cancelled" }
  | { name: "failed"; error: string };

/** What only a server can do. */
export interface Live {
  askTrace(request: Partial<TraceRequest> & { prompt: string }): Promise<JobAnswer>;
  askComparison(request: Partial<CompareRequest> & { prompt: string }): Promise<JobAnswer>;
  job(id: string): Promise<JobAnswer>;
  traceOf(id: string): Promise<Trace>;
  comparisonOf(id: string): Promise<Comparison>;
  cancel(id: string): Promise<JobAnswer>;
  /** Tells what happens to a job until it ends; the function given back stops that. */
  follow(id: string, tell: (event: JobEvent) => void): () => void;
  /** Tells the state of training whenever it changes, and `lost` when the server does not answer. */
  followStatus(tell: (status: StatusAnswer | "lost") => void): () => void;
}

/** What went wrong, in the server's words: `status` is HTTP's, 0 if nobody answered. */
export class AskError extends Error {
  constructor(
    readonly status: number,
    sentence: string,
  ) {
    super(sentence);
  }
}
