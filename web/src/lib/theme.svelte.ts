/** Light, dark, or as the system has it; kept in this browser. */

export type Theme = "auto" | "light" | "dark";
const KEY = "throughline-theme";

class Look {
  chosen = $state<Theme>("auto");
  system = $state(false);
  isDark = $derived(this.chosen === "dark" || (this.chosen === "auto" && this.system));

  constructor() {
    if (typeof window === "undefined") return;
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    this.system = dark.matches;
    dark.addEventListener("change", () => {
      this.system = dark.matches;
    });
    try {
      const kept = localStorage.getItem(KEY);
      if (kept === "light" || kept === "dark") this.choose(kept);
    } catch {
      // a page opened from a file may have no storage
    }
  }

  choose(theme: Theme): void {
    this.chosen = theme;
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // as above
    }
  }
}

export const look = new Look();
