/** The page's address: `#/view/part/…?key=value`, the same in both homes, so that every view can be shared and bookmarked. */

export interface Route {
  view: string;
  parts: string[];
  query: URLSearchParams;
}

export function parse(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [view = "", ...parts] = path.split("/").map(unescapePart);
  return { view: view || "overview", parts, query: new URLSearchParams(query) };
}

function unescapePart(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

type QueryValue = string | number | boolean | null | undefined;

/** The address of a view; what is null, undefined or empty is left out. */
export function to(view: string, parts: (string | number)[] = [], query: Record<string, QueryValue> = {}): string {
  const path = [view, ...parts].map((part) => encodeURIComponent(part)).join("/");
  const kept = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(kept.map(([key, value]) => [key, String(value)])).toString();
  return `#/${path}${text ? `?${text}` : ""}`;
}

export const toFeature = (model: string, layer: number, feature: number): string =>
  to("feature", [model, layer, feature]);

class Current {
  value = $state<Route>(parse(""));

  constructor() {
    if (typeof window === "undefined") return;
    this.value = parse(window.location.hash);
    window.addEventListener("hashchange", () => {
      this.value = parse(window.location.hash);
    });
  }
}

export const route = new Current();

/** Change the address; `replace` leaves no step to go back to, as for each key of a search. */
export function go(address: string, replace = false): void {
  if (address === window.location.hash) return;
  if (replace) {
    history.replaceState(null, "", address);
    route.value = parse(address);
  } else {
    window.location.hash = address;
  }
}

/** Change keys of the present address's query. */
export function ask(changes: Record<string, QueryValue>, replace = true): void {
  const { view, parts, query } = route.value;
  go(to(view, parts, { ...Object.fromEntries(query), ...changes }), replace);
}
