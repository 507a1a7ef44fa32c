/** Names for the types that are made from the server's description (`npm run types`). */
import type { components } from "./api";

type Schemas = components["schemas"];

export type ActiveFeature = Schemas["ActiveFeature"];
export type Agreement = Schemas["Agreement"];
export type Analysis = Schemas["Analysis"];
export type Chain = Schemas["Chain"];
export type Comparison = Schemas["Comparison"];
export type ComparisonRow = Schemas["ComparisonRow"];
export type ComparisonTotals = Schemas["ComparisonTotals"];
export type CompareRequest = Schemas["CompareRequest"];
export type Context = Schemas["Context"];
export type Curve = Schemas["Curve"];
export type FeatureAnswer = Schemas["FeatureAnswer"];
export type FeatureName = Schemas["FeatureName"];
export type FeaturePage = Schemas["FeaturePage"];
export type FeatureRow = Schemas["FeatureRow"];
export type Finding = Schemas["Finding"];
export type JobAnswer = Schemas["JobAnswer"];
export type Label = Schemas["Label"];
export type LayerReading = Schemas["LayerReading"];
export type Overview = Schemas["Overview"];
export type PackedModel = Schemas["PackedModel"];
export type PageData = Schemas["PageData"];
export type PairPage = Schemas["PairPage"];
export type QualityAnswer = Schemas["QualityAnswer"];
export type Ribbon = Schemas["Ribbon"];
export type ScoredLabel = Schemas["ScoredLabel"];
export type SharedFeature = Schemas["SharedFeature"];
export type StatusAnswer = Schemas["StatusAnswer"];
export type Trace = Schemas["Trace"];
export type TraceEdge = Schemas["TraceEdge"];
export type TraceRequest = Schemas["TraceRequest"];
export type TraceRow = Schemas["TraceRow"];
export type TrainingCurve = Schemas["TrainingCurve"];
export type TransferAnswer = Schemas["TransferAnswer"];
export type TransferInfo = Schemas["TransferInfo"];
