// One self-contained file, for people who have no Node: it ships inside the Python package.
import { copyFileSync, mkdirSync } from "node:fs";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import type { Plugin } from "vite";
import { viteSingleFile } from "vite-plugin-singlefile";
import { defineConfig } from "vitest/config";

const PACKAGE = "../src/throughline/report/assets";

function intoPackage(): Plugin {
  return {
    name: "into-package",
    apply: "build",
    enforce: "post",
    closeBundle() {
      mkdirSync(PACKAGE, { recursive: true });
      copyFileSync("dist/index.html", `${PACKAGE}/page.html`);
    },
  };
}

export default defineConfig({
  plugins: [svelte(), viteSingleFile(), intoPackage()],
  build: { target: "es2022", modulePreload: false, reportCompressedSize: false },
  server: { proxy: { "/api": "http://127.0.0.1:8765" } },
  test: { include: ["tests/**/*.test.ts"], environment: "node" },
});
