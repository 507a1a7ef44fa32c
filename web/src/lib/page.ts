/** Which home the page has, and how it makes a copy of itself with other data. */
import { embedded } from "./embedded";
import { escaped, escapeText, server } from "./live";
import type { Source } from "./source";
import type { PageData } from "./types";

const EMPTY = /^\{\{/; // the place for data, with none in it: the page stands on a server, or in development

/** This very page with other data, as the server's template would be filled. */
function copy(title: string, data: unknown): string {
  const policy = document.querySelector('meta[http-equiv="Content-Security-Policy"]')?.getAttribute("content") ?? "";
  const script = document.querySelector('script[type="module"]')?.textContent ?? "";
  const style = document.querySelector("style")?.textContent ?? "";
  const parts = escaped(title, data);
  return [
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
    `<meta http-equiv="Content-Security-Policy" content="${escapeText(policy)}">`,
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
    `<title>${parts.title} · throughline</title>`,
    `<script type="application/json" id="data">${parts.data}</` + "script>",
    `<script type="module">${script}</` + "script>",
    `<style>${style}</style>\n</head>\n<body>\n</body>\n</html>\n`,
  ].join("\n");
}

export function findSource(): Source {
  const inside = document.getElementById("data")?.textContent ?? "{{";
  if (EMPTY.test(inside)) return server;
  return embedded(JSON.parse(inside) as PageData, async (title, data) => copy(title, data));
}

/** The data of a page that holds one trace or comparison and what the run is, and nothing else. */
export async function only(
  source: Source,
  kept: Pick<Partial<PageData>, "traces" | "comparisons">,
): Promise<PageData> {
  const overview = await source.overview();
  return {
    overview: { ...overview, num_transfers: 0, num_traces: 1, num_comparisons: 0, has_analysis: false },
    status: { ...(await source.status()), devices: [] },
    training: [],
    transfers: [],
    pairs: { most: 0, results: [] },
    analysis: null,
    features: {
      strings: [],
      roles: [],
      names: [],
      models: {},
      num_left_out: 0,
      num_contexts_left_out: 0,
      num_partners_left_out: 0,
    },
    outdated_traces: [],
    totals: [],
    traces: [],
    comparisons: [],
    ...kept,
  };
}
