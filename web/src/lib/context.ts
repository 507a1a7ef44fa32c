/** What every view has at hand: the source of data, and the run it is about. */
import { getContext, setContext } from "svelte";
import type { Source } from "./source";
import type { Overview } from "./types";

const KEY = Symbol("page");

export interface Page {
  source: Source;
  /** The run as it was when the page was opened. */
  overview: Overview;
}

export const setPage = (page: Page): Page => setContext(KEY, page);

export const getPage = (): Page => getContext<Page>(KEY);
