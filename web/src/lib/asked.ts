/** What was asked of the server, by job: so that it can be asked again when the server has forgotten it. Kept in this tab. */
import type { CompareRequest, TraceRequest } from "./types";

export type Asked = Partial<TraceRequest & CompareRequest> & { prompt: string };
const KEY = "throughline-asked";
const MOST = 40;

function all(): [string, Asked][] {
  try {
    const kept: unknown = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept : [];
  } catch {
    return [];
  }
}

export function remember(job: string, request: Asked): void {
  try {
    const kept = all().filter(([id]) => id !== job);
    sessionStorage.setItem(KEY, JSON.stringify([...kept, [job, request]].slice(-MOST)));
  } catch {
    // without storage it can be typed again
  }
}

export const asked = (job: string): Asked | null => all().find(([id]) => id === job)?.[1] ?? null;
