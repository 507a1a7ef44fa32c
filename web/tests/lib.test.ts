import { describe, expect, it } from "vitest";
import { diverging, limits, readable } from "../src/lib/colors";
import { csv, fileName } from "../src/lib/export";
import { duration, number, share, signed, token } from "../src/lib/format";
import { escaped, fill } from "../src/lib/live";
import { parse, to } from "../src/lib/route.svelte";

describe("addresses", () => {
  it("lead back to what they were made of", () => {
    const address = to("feature", ["zoo/pythia", 3, 45], { q: "a & b", none: null, empty: "" });
    expect(address).toBe("#/feature/zoo%2Fpythia/3/45?q=a+%26+b");
    const { view, parts, query } = parse(address);
    expect([view, parts, query.get("q"), query.has("none")]).toEqual(["feature", ["zoo/pythia", "3", "45"], "a & b", false]);
  });

  it("that are broken or empty lead somewhere", () => {
    expect(parse("").view).toBe("overview");
    expect(parse("#/trace/%E0%A4%A").parts).toEqual(["%E0%A4%A"]);
  });
});

describe("files", () => {
  it("quote what csv must, and no cell is a formula", () => {
    expect(csv(["a", "b"], [['x "y", z', -1], ["=1+1", null]])).toBe('a,b\r\n"x ""y"", z",-1\r\n\'=1+1,');
    expect(fileName("zoo/pythia", 3)).toBe("zoo-pythia-3");
  });

  it("hold data that cannot end their element, nor pass for a place", () => {
    const page = fill("<t>{{title}}</t><d>{{data}}</d>", "<x>", { text: "</script>{{title}}" });
    expect(page).toBe('<t>&#60;x&#62;</t><d>{"text":"\\u003c/script>{{title}}"}</d>');
    expect(JSON.parse(escaped("", { text: "<" }).data)).toEqual({ text: "<" });
  });
});

describe("numbers", () => {
  it("are written for people", () => {
    expect([number(0.123456), number(1234.5), number(1e-9), number(null), number(0)]).toEqual(["0.123", "1,235", "1.00e-9", "–", "0"]);
    expect([share(0.5), share(0.0004), signed(-0.123), signed(2)]).toEqual(["50.0 %", "0.04 %", "−0.12", "+2.00"]);
    expect([duration(0.05), duration(75), duration(3700)]).toEqual(["50 ms", "1:15", "1:01:40"]);
    expect(token(" a\n")).toBe("␣a⏎");
  });
});

describe("colours", () => {
  it("have a scale from 0 that ends at 1 for shares, and goes no further below than above", () => {
    expect(limits([0.3, 0.6])).toEqual([0, 1]);
    expect(limits([-50, 2])).toEqual([-2, 2]);
    expect(limits([null, undefined])).toEqual([0, 1]);
  });

  it("let text be read", () => {
    expect([readable("#ffffff"), readable("rgb(0, 0, 0)"), readable("#0072b2")]).toEqual(["#000000", "#ffffff", "#ffffff"]);
    expect(diverging(0, false)).toBe("rgb(246, 246, 244)");
    expect(diverging(-2, true)).toBe("rgb(0, 114, 178)");
  });
});
