/** The views of the page, in the order of the navigation; the first of `names` is where the navigation leads. */
import type { Component } from "svelte";
import Compare from "../views/Compare.svelte";
import Feature from "../views/Feature.svelte";
import Features from "../views/Features.svelte";
import Overview from "../views/Overview.svelte";
import Trace from "../views/Trace.svelte";
import Training from "../views/Training.svelte";
import Transfer from "../views/Transfer.svelte";

export interface ViewOfPage {
  title: string;
  names: [string, ...string[]];
  component: Component;
  /** What one thing of it is shown by, at its second name. */
  single?: Component;
}

export const VIEWS: ViewOfPage[] = [
  { title: "Overview", names: ["overview"], component: Overview },
  { title: "Features", names: ["features", "feature"], component: Features, single: Feature },
  { title: "Transfer", names: ["transfer"], component: Transfer },
  { title: "Trace", names: ["trace"], component: Trace },
  { title: "Compare", names: ["compare"], component: Compare },
  { title: "Training", names: ["training"], component: Training },
];
