import { describe, expect, it } from "vitest";
import { around, chainPath, endOf, fit, layOut, step } from "../src/lib/graph";
import { feature, trace } from "./made";

describe("layOut", () => {
  const found = trace({
    features: [
      feature(0, 1, 7, -4),
      feature(0, 1, 8, 1),
      feature(0, 1, 9, 0.5),
      feature(2, 1, 3, 2),
      feature(2, 3, 4, -1),
    ],
    edges: [
      { source: [0, 1, 7], target: [2, 1, 3], predicted: 1, measured: -2 },
      { source: [0, 1, 8], target: [2, 3, 4], predicted: 0.5, measured: null },
      { source: [0, 9, 9], target: [2, 3, 4], predicted: 9, measured: 9 }, // from a feature that is not shown
    ],
    chains: [[[0, 1, 7], [1, 1, 5], [2, 1, 3]]],
  });

  for (const named of [true, false]) {
    it(`puts no node on another, each in its layer and row (names: ${named})`, () => {
      const graph = layOut(found, 900, named);
      expect(graph.nodes).toHaveLength(6); // five shown, and one that only the chain goes through
      graph.nodes.forEach((a, i) => {
        for (const b of graph.nodes.slice(i + 1)) expect(Math.hypot(a.x - b.x, a.y - b.y)).toBeGreaterThan(a.r + b.r);
        const row = graph.rows[a.place[1]]!;
        expect(a.y - a.r).toBeGreaterThanOrEqual(row.y);
        expect(a.y + a.r).toBeLessThanOrEqual(row.y + row.height);
        const column = graph.columns[a.column]!;
        expect(column.layer).toBe(a.place[0]);
        expect(a.x).toBeGreaterThan(column.x);
        expect(a.x).toBeLessThan(column.x + column.width);
      });
      expect(graph.width).toBeLessThanOrEqual(901);
    });
  }

  it("makes circles larger with the effect", () => {
    const radius = new Map(layOut(found, 900, true).nodes.map((node) => [node.id, node.r]));
    expect(radius.get("0,1,7")).toBeGreaterThan(radius.get("2,1,3")!);
    expect(radius.get("2,1,3")).toBeGreaterThan(radius.get("0,1,9")!);
  });

  it("holds lines against the strongest between the same layers, measured where they were", () => {
    const lines = new Map(layOut(found, 900, true).lines.map((line) => [line.id, line]));
    expect(lines.get("0,1,7>2,1,3")).toMatchObject({ value: -2, strength: 1 });
    expect(lines.get("0,1,8>2,3,4")).toMatchObject({ value: 0.5, strength: 0.25 });
    expect([...lines.keys()].some((id) => id.startsWith("0,9,9"))).toBe(false);
    expect(lines.get(`2,1,3>${endOf(0)}`)).toMatchObject({ value: 2, strength: 1 });
  });

  it("draws a chain through all its features to its token", () => {
    const graph = layOut(found, 900, true);
    const { ids, path } = chainPath(graph, found, 0);
    expect([...ids]).toEqual(["0,1,7", "1,1,5", "2,1,3", endOf(0)]);
    expect(path.match(/M/g)).toHaveLength(3);
    expect(chainPath(graph, found, 5).path).toBe("");
  });

  it("lights a node with both ends of its lines", () => {
    expect(around(layOut(found, 900, true), "0,1,7").ids).toEqual(new Set(["0,1,7", "2,1,3"]));
  });
});

describe("step", () => {
  const { nodes } = layOut(trace({ features: [feature(0, 0, 1, 1), feature(0, 4, 2, 1), feature(2, 4, 3, 1)] }), 900, true);
  const at = (id: string) => nodes.find((node) => node.id === id)!;
  it("goes up and down in a layer, and to the nearest of the next that has any", () => {
    expect(step(nodes, at("0,0,1"), "ArrowDown").id).toBe("0,4,2");
    expect(step(nodes, at("0,0,1"), "ArrowUp").id).toBe("0,0,1");
    expect(step(nodes, at("0,0,1"), "ArrowRight").id).toBe("2,4,3");
    expect(step(nodes, at("2,4,3"), "ArrowLeft").id).toBe("0,4,2");
    expect(step(nodes, at("2,4,3"), "ArrowRight").id).toBe("2,4,3");
    expect(step(nodes, at("2,4,3"), "Home").id).toBe("0,0,1");
  });
});

describe("fit", () => {
  it("keeps what fits, and cuts between characters as people see them", () => {
    expect(fit("carry", 100)).toBe("carry");
    expect(fit("carry is there", 40)).toBe("carry…");
    expect(fit("👩‍👩‍👧👩‍👩‍👧👩‍👩‍👧", 30)).toBe("👩‍👩‍👧👩‍👩‍👧…");
    expect(fit("carry", 3)).toBe("");
  });
});
