import { expect, test } from "vitest";
import { chosenLayers, describeLayer, halted, overall, span, type Job } from "../src/lib/training";
import type { StatusAnswer } from "../src/lib/types";

const job: Job = {
  model: "m", layers: [3, 4], host: "node", pid: 1, device: "cuda:0", at: 0, attempt: 2, failed: null, events: [], step: 50, num_steps: 2000,
  tokens_per_second: 10, eta_seconds: 90, loss: [0.1, 0.2], l0: [20, 21], fvu: [0.05, 0.06], dead: [0, 0.25], state: "running",
};

test("consecutive layers are told together", () => {
  expect(span([5, 0, 1, 2])).toBe("0-2, 5");
  expect(span([3])).toBe("3");
});

test("layers of an address are those the model has, and all if none is meant", () => {
  expect(chosenLayers("0-1,9", [0, 1, 2])).toEqual([0, 1]);
  expect(chosenLayers("x", [0, 1])).toEqual([0, 1]);
  expect(chosenLayers(null, [0, 1])).toEqual([0, 1]);
});

test("a layer's note has the numbers of its own place in the job", () => {
  const lines = describeLayer("m", 4, { state: "running", gate: null }, [job]);
  expect(lines).toEqual([
    "m layer 4: running",
    "step 50 of 2,000 on node cuda:0, attempt 2",
    "FVU 0.0600, L0 21.0, dead 25.0 %",
    "about 1:30 left",
  ]);
  expect(describeLayer("m", 0, { state: "done", gate: ["dead 40 %"] }, [job])).toEqual(["m layer 0: done", "failed the gate: dead 40 %"]);
});

test("why a job does not run is told, and nothing of one that does", () => {
  expect(halted(job)).toBe("");
  expect(halted({ ...job, state: "failed", failed: "out of memory" })).toBe("out of memory");
  expect(halted({ ...job, state: "stopped" })).toContain("--resume");
});

test("the whole is told with what is left", () => {
  const status = { layers: { done: 3, imported: 1, running: 2, waiting: 0, stopped: 0, failed: 1 }, eta_seconds: 3700 } as unknown as StatusAnswer;
  expect(overall(status)).toBe("4 of 7 layers trained, 2 running, 1 failed; about 1:01:40 left");
});
