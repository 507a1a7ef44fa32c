"use strict";
// The section of traces: the graph of one prompt as a picture, its chains, its reading by layer, and what was verified of it.
// Comes before page.js, whose elements, words and colours it uses when it is called.

const EDGES_OF_A_BOUNDARY = 6; // so many of the strongest between two layers are drawn, and from the last layer to each token
const DOT_WIDTH = 17;
const ROOM_BESIDE = 830; // pixels that a picture may have with the chains beside it; under a wider one they stand below

const placeKey = ([layer, position, feature]) => `${layer}/${position}/${feature}`;
const keyOf = (layer, f) => placeKey([layer.layer, f.position, f.feature]);
const effectOf = (f) => f.effect ?? f.predicted_effect; // the predicted one where nothing was measured
const labelOf = (f) => (f.label ? f.label.text : "unlabelled: " + f.top_tokens.slice(0, 3).map(visible).join(" "));
const labelScore = (f) => (f.label ? `F1 ${fixed(f.label.f1, 2)}` + (f.label.measure === "detection" ? " of detection" : "") : "");
const layersOf = (step) => range2(step.features[0][0], step.features[step.features.length - 1][0]);
const range2 = (first, last) => (first === last ? `layer ${first}` : `layers ${first}-${last}`);
const tokenAt = (trace, position) => `position ${position} ${quote(visible(trace.tokens[position] || ""))}`;
const supportColor = (value) => (value < 0 ? DIVERGING[1] : DIVERGING[3]); // the middle ones show on white and on black
const signedShort = (value) => (value >= 0 ? "+" : "") + fmt(value); // with digits where it is small, as effects along one path are
const measuredAndPredicted = (measured, predicted, show = signed) => (measured === null ? `predicted ${show(predicted)}, not measured` : `measured ${show(measured)}, predicted ${show(predicted)}`);

// ---- where everything stands

function layOutTrace(trace) {
  const columns = new Map(trace.layers.map((layer, i) => [layer.layer, i]));
  const shown = new Set(trace.layers.flatMap((layer) => layer.features.map((f) => keyOf(layer, f))));
  const passed = trace.chains.flatMap((chain) => chain.steps.flatMap((step) => step.features)).filter((place) => !shown.has(placeKey(place)));
  const hidden = new Map(passed.map((place) => [placeKey(place), place])); // chains pass them, but they are not among those shown
  const cells = new Map();
  const put = (layer, position, key) => { const cell = `${layer}/${position}`; cells.has(cell) ? cells.get(cell).push(key) : cells.set(cell, [key]); };
  for (const layer of trace.layers) for (const f of layer.features) put(layer.layer, f.position, keyOf(layer, f));
  for (const [key, [layer, position]] of hidden) put(layer, position, key);
  const most = Math.max(1, ...[...cells.values()].map((keys) => keys.length));
  const names = trace.tokens.map((t) => shorten(visible(t), 16));
  const left = Math.min(130, Math.max(40, 7.4 * Math.max(...names.map((t) => t.length)) + 14));
  const room = 30 + 7 * Math.max(8, ...trace.targets.map((t) => Math.min(12, t.text.length) + Math.min(12, t.against.length) + 6));
  const down = 38, top = 34;
  // Wide enough for the fullest cell; beyond that, as wide as the box beside the reading has place for.
  const across = Math.max(52, DOT_WIDTH * most + 10, Math.min(130, Math.floor((ROOM_BESIDE - left - room) / Math.max(1, trace.layers.length))));
  const right = left + across * trace.layers.length;
  const places = new Map();
  for (const [cell, keys] of cells) {
    const [layer, position] = cell.split("/").map(Number);
    keys.forEach((key, i) => places.set(key, { x: left + (columns.get(layer) + 0.5) * across + (i - (keys.length - 1) / 2) * DOT_WIDTH, y: top + (position + 0.5) * down }));
  }
  const ends = trace.targets.map((t) => ({ x: right + 8, y: top + (t.position + 0.5) * down }));
  return { names, left, right, top, down, across, places, hidden, ends, width: right + room, height: top + down * trace.tokens.length + 10 };
}

// In a bow within a row, so that lines do not lie on each other there; else level at both ends.
function curve(a, b, bow) {
  const middle = (a.x + b.x) / 2;
  return a.y === b.y ? `M${a.x} ${a.y}Q${middle} ${a.y + bow} ${b.x} ${b.y}` : `M${a.x} ${a.y}C${middle} ${a.y} ${middle} ${b.y} ${b.x} ${b.y}`;
}

// The strongest edges of every boundary, and from the last layer to each token of the answer, each relative to the strongest of them.
function strongestEdges(trace) {
  const boundaries = new Map();
  const add = (boundary, edge) => { boundaries.has(boundary) ? boundaries.get(boundary).push(edge) : boundaries.set(boundary, [edge]); };
  for (const [sl, sp, sf, tl, tp, tf, predicted, measured, activation] of trace.edges)
    add(sl, { source: [sl, sp, sf], target: [tl, tp, tf], predicted, measured, activation, value: measured ?? predicted });
  const last = trace.layers[trace.layers.length - 1];
  for (const f of last ? last.features : [])
    trace.targets.forEach((_, number) => {
      const predicted = f.predicted_effects[number], measured = f.effects[number] ?? null;
      add(`target ${number}`, { source: [last.layer, f.position, f.feature], number, predicted, measured, value: measured ?? predicted });
    });
  return [...boundaries.values()].flatMap((edges) => {
    const strongest = edges.filter((e) => e.value).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, EDGES_OF_A_BOUNDARY);
    return strongest.map((e) => ({ ...e, strength: Math.abs(e.value / strongest[0].value) }));
  });
}

// ---- the picture

function describeFeature(trace, layer, f) {
  const words = [`#${f.feature} ${labelOf(f)}`, `layer ${layer.layer}, ${tokenAt(trace, f.position)}`, `activation ${fmt(f.activation)}, off ${fmt(f.off_value)}`,
    `if off: ${measuredAndPredicted(f.effect, f.predicted_effect)}`];
  if (f.label) words[0] += ` (${labelScore(f)}, ${f.label.source})`;
  if (f.answer_if_off !== null) words.push(f.answer_if_off === trace.answer ? "the answer stays" : `the answer becomes ${quote(f.answer_if_off)}`);
  if (f.lifetime) words.push(`its throughline: ${range2(...f.lifetime)}`);
  return words;
}

function describeEdge(trace, edge) {
  const name = ([layer, position, feature]) => (feature < 0 ? `layer ${layer} reconstruction error` : `layer ${layer} #${feature}`) + ` at ${tokenAt(trace, position)}`;
  const target = edge.target ? name(edge.target) : `token ${quote(visible(trace.targets[edge.number].text))} over ${quote(visible(trace.targets[edge.number].against))}`;
  const words = [`${name(edge.source)} → ${target}`, `if the source is off, the target's ${edge.target ? "pre-activation" : "score"}: ${measuredAndPredicted(edge.measured, edge.predicted)}`];
  if (edge.target && edge.activation !== null) words.push(`its activation: measured ${signed(edge.activation)}`);
  return words;
}

function drawTokens(trace, at, svg) {
  trace.tokens.forEach((_, row) => {
    const y = at.top + (row + 0.5) * at.down;
    const text = s("text", { x: at.left - 8, y, "text-anchor": "end", "dominant-baseline": "central" }, at.names[row], s("title", {}, `position ${row}` + (row >= trace.num_prompt_tokens ? ", answer" : "")));
    text.style.fontFamily = "var(--mono)";
    if (row >= trace.num_prompt_tokens) text.style.fontWeight = "700";
    const line = s("line", { x1: at.left, x2: at.right, y1: y, y2: y });
    line.style.stroke = "var(--line)";
    svg.append(line, text);
  });
  svg.append(s("text", { class: "soft", x: at.left - 8, y: 14, "text-anchor": "end" }, "layer"), s("text", { class: "soft", x: at.right + 14, y: 14 }, "answer"));
  trace.layers.forEach((layer, column) => svg.append(s("text", { class: "soft", x: at.left + (column + 0.5) * at.across, y: 14, "text-anchor": "middle" }, layer.layer)));
  trace.targets.forEach((target, i) => {
    const words = `${visible(shorten(target.text, 12))}: p = ${fixed(target.probability, 2)}, score ${signed(target.score)} logits over ${visible(target.against)}`;
    const said = s("tspan", {}, visible(shorten(target.text, 12)));
    Object.assign(said.style, { fontWeight: "700", fontSize: "14px" });
    svg.append(s("text", { x: at.ends[i].x + 6, y: at.ends[i].y, "dominant-baseline": "central" }, said, s("tspan", { class: "soft", dx: 6 }, `over ${visible(shorten(target.against, 12))}`), s("title", {}, words)));
  });
}

function drawEdges(trace, at, svg) {
  for (const edge of strongestEdges(trace)) {
    const source = placeKey(edge.source), target = edge.target && placeKey(edge.target);
    const [from, to] = [at.places.get(source), edge.target ? at.places.get(target) : at.ends[edge.number]];
    if (!from || !to) continue;
    const path = curve(from, to, -22);
    const line = s("path", { class: "edge", d: path, stroke: supportColor(edge.value), "stroke-width": (0.6 + 2.8 * edge.strength).toFixed(2), "stroke-opacity": (0.25 + 0.6 * edge.strength).toFixed(2) });
    const near = s("path", { class: "near", d: path }); // wide enough to be pointed at
    const words = describeEdge(trace, edge).join("\n");
    const group = s("g", { class: "edge-group", "data-source": source, "data-target": target || `target/${edge.number}` }, line, near);
    group.addEventListener("pointermove", (event) => showTip(words, event));
    group.addEventListener("pointerleave", hideTip);
    svg.append(group);
  }
}

function drawChains(trace, at, svg) {
  const seen = new Set();
  trace.chains.forEach((chain, number) => {
    const points = [...chain.steps.flatMap((step) => step.features.map((place) => at.places.get(placeKey(place)))), at.ends[chain.target]];
    const path = points.slice(1).map((b, i) => curve(points[i], b, 20)).join("");
    svg.append(s("path", { class: "chain" + (seen.has(chain.target) ? "" : " first"), d: path, "data-chain": number }));
    seen.add(chain.target);
  });
  for (const [key, place] of at.hidden) {
    const { x, y } = at.places.get(key);
    svg.append(s("circle", { class: "ring", cx: x, cy: y, r: 4, "data-key": key }, s("title", {}, `layer ${place[0]} #${place[2]}, ${tokenAt(trace, place[1])}: a chain passes it; it is not among those shown`)));
  }
}

function tracePicture(trace, light) {
  const at = layOutTrace(trace);
  const svg = s("svg", { width: at.width, height: at.height, viewBox: `0 0 ${at.width} ${at.height}`, id: "trace-picture", role: "group", "aria-label": `Graph of ${trace.model} on the prompt, layers across, positions down` });
  drawTokens(trace, at, svg);
  drawEdges(trace, at, svg);
  drawChains(trace, at, svg);
  const largest = Math.max(1e-9, ...trace.layers.flatMap((layer) => layer.features.map((f) => Math.abs(effectOf(f)))));
  for (const layer of trace.layers) {
    const maximum = Math.max(1e-9, ...layer.features.map((f) => f.activation));
    for (const f of layer.features) {
      const key = keyOf(layer, f), { x, y } = at.places.get(key);
      const dot = s("circle", { class: "dot", cx: x, cy: y, r: Math.sqrt(10 + 50 * Math.max(0, f.activation) / maximum).toFixed(1), "data-key": key });
      dot.style.fill = rgb(ramp(DIVERGING, 0.5 + effectOf(f) / (2 * largest)));
      const words = describeFeature(trace, layer, f);
      const link = s("a", { class: "dot-link", href: address(trace.model, layer.layer, f.feature), "aria-label": words.join("; ") }, dot);
      link.addEventListener("pointermove", (event) => { light(key); showTip(words.join("\n"), event); });
      link.addEventListener("pointerleave", () => { light(null); hideTip(); });
      link.addEventListener("focus", () => light(key));
      link.addEventListener("blur", () => light(null));
      svg.append(link);
    }
  }
  return svg;
}

// ---- beside and below it

function chainList(trace, lightChain) {
  if (!trace.chains.length) return h("p", { class: "note" }, "No chain leads from the first layer to the answer.");
  return h("ol", { class: "chains" }, trace.chains.map((chain, number) => {
    const on = () => lightChain(number), off = () => lightChain(null);
    const together = `all off: ${measuredAndPredicted(chain.measured_together, chain.predicted_together)}`;
    const then = chain.answer_if_off === null ? "" : chain.answer_if_off === trace.answer ? ", the answer stays" : `, the answer becomes ${quote(chain.answer_if_off)}`;
    return h("li", { tabindex: 0, "data-chain": number, onpointerenter: on, onpointerleave: off, onfocusin: on, onfocusout: off },
      h("div", { class: "steps" }, chain.steps.map((step, i) => [i > 0 && h("span", { class: "arrow" }, " → "),
        h("a", { href: address(trace.model, step.features[0][0], step.features[0][2]), title: (step.lifetime ? `its throughline: ${range2(...step.lifetime)}; ` : "") + `activation ${fmt(step.activation)}, ${tokenAt(trace, step.features[0][1])}` }, `#${step.features[0][2]}`),
        " ", h("span", { class: step.label.startsWith("unlabelled") ? "unlabelled" : null }, step.label), h("small", {}, ` ${layersOf(step)}`)]),
        h("span", { class: "arrow" }, " → "), h("b", {}, quote(visible(trace.targets[chain.target].text)))),
      h("small", {}, `along it: ${measuredAndPredicted(chain.measured, chain.predicted, signedShort)}; ${together}${then}` + (chain.num_alternatives ? `; ${plural(chain.num_alternatives, "path")} much like it` : "")));
  }));
}

function layerReading(trace, light, remember) {
  return h("div", { class: "reading", tabindex: 0, role: "region", "aria-label": "Reading by layer" }, trace.layers.map((layer) => h("div", {},
    h("h4", {}, `Layer ${layer.layer} `, h("small", {}, `${fmt(layer.num_active)} active per token, ${plural(layer.num_nodes, "node")}, FVU here ${fixed(layer.fvu, 2)}` + (layer.error_effect === null ? "" : `, without its error ${signed(layer.error_effect)}`))),
    layer.features.length === 0 ? h("small", {}, "no feature shown") : layer.features.map((f) => {
      const key = keyOf(layer, f);
      const link = h("a", { href: address(trace.model, layer.layer, f.feature), title: describeFeature(trace, layer, f).join("\n"), onpointerenter: () => light(key), onpointerleave: () => light(null) },
        h("span", {}, "#" + f.feature), h("span", { class: f.label ? null : "unlabelled" }, labelOf(f)), h("span", { class: "n", title: "activation" }, fixed(f.activation, 2)),
        h("span", { class: "n", title: "held-out score of the label" }, f.label ? "F1 " + fixed(f.label.f1, 2) : ""), h("span", { class: "n" }, (f.effect === null ? "pred. " : "off ") + signed(effectOf(f))));
      return remember(key, link);
    }))));
}

function agreementTable(found) {
  const rows = [found.nodes, found.controls, found.within, found.across];
  const share = (a) => (a.sign === null ? "–" : `${percent(a.sign, 0)} of ${count(a.num_signed)}`);
  const heads = [["predicted and measured", ""], ["n", "pairs of a prediction and a measurement"], ["r", "Pearson"], ["r shuffled", "the null: predictions in random order"], ["slope", "of measured on predicted, through the origin"],
    ["same sign", "of effects large enough to have one: above 2 % of the answer score (features), or of the largest change (edges)"]];
  return h("div", { class: "scroll" }, h("table", { class: "agreement" }, h("thead", {}, h("tr", {}, heads.map(([name, why], i) => h("th", { class: i ? null : "words", title: why || null }, name)))),
    h("tbody", {}, rows.map((a) => h("tr", {}, h("td", { class: "words" }, a.what), h("td", {}, count(a.num)), h("td", {}, fixed(a.pearson, 2)), h("td", {}, fixed(a.shuffled, 2)), h("td", {}, fixed(a.slope, 2)), h("td", {}, share(a)))))));
}

function faithfulnessChart(points) {
  const [width, height, left, bottom] = [300, 150, 34, 24];
  const low = Math.min(0, ...points.flatMap((p) => [p.faithfulness, p.random])), high = Math.max(1, ...points.flatMap((p) => [p.faithfulness, p.random]));
  const x = (i) => left + 12 + (i * (width - left - 28)) / Math.max(1, points.length - 1), y = (v) => 8 + ((high - v) / (high - low)) * (height - bottom - 16);
  const line = (name, color) => {
    const path = s("polyline", { points: points.map((p, i) => `${x(i)},${y(p[name])}`).join(" "), fill: "none", "stroke-width": 2 });
    path.style.stroke = color;
    return path;
  };
  const rule = (value) => [s("line", { class: "rule", x1: left, x2: width, y1: y(value), y2: y(value) }), s("text", { class: "soft", x: left - 6, y: y(value), "text-anchor": "end", "dominant-baseline": "central" }, value)];
  return s("svg", { class: "faithfulness", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Faithfulness against the number of nodes; the numbers are in the table" },
    rule(0), rule(1), line("random", "var(--soft)"), line("faithfulness", "var(--accent)"),
    points.map((p, i) => s("text", { class: "soft", x: x(i), y: height - 8, "text-anchor": "middle" }, count(p.num))));
}

function faithfulnessTable(found) {
  const points = found.faithfulness;
  if (!points.length) return h("p", { class: "note" }, "Faithfulness: switching everything off changes no token's score enough for there to be something to explain.");
  const heads = [["nodes kept", ""], ["faithfulness", "the share of the score that these nodes alone bring back; 0 with none, 1 as the model"], [`${found.random_draws} random draws`, "the same of as many nodes drawn at random, mean"], ["completeness", "the faithfulness of all nodes but these: 0 if nothing else carries the answer"],
    ["answer kept", "whether every token of the answer is still preferred"], ["kept by random", "share of the draws"]];
  return h("div", { class: "curve" }, h("figure", {}, faithfulnessChart(points), h("figcaption", {}, "Faithfulness of the strongest nodes (blue) and of random ones (grey).")),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map(([name, why]) => h("th", { title: why || null }, name)))),
      h("tbody", {}, points.map((p) => h("tr", {}, h("td", {}, count(p.num) + (p.num === found.num_candidates ? " (all)" : "")), h("td", {}, fixed(p.faithfulness, 2)), h("td", {}, fixed(p.random, 2)), h("td", {}, fixed(p.completeness, 2)), h("td", {}, p.answer_kept ? "yes" : "no"), h("td", {}, percent(p.random_kept, 0))))))));
}

function verificationView(trace) {
  const found = trace.verification;
  if (!found) return h("p", { class: "banner", id: "trace-verification" }, "Not verified (--no-verify): effects, edges and chains are predictions of the linearised model.");
  return h("div", { id: "trace-verification" }, h("h3", {}, "What was verified in the real model"), agreementTable(found),
    h("p", { class: "note" }, `A random active feature, switched off, changes the answer score by ${fmt(found.random_effect)} logits (mean of ${count(found.num_random)}). Of the answer's influence, ${percent(found.replacement, 0)} reaches the first traced layer through features and not through errors (replacement); `,
      `of what comes into a node, weighted by its own influence, ${percent(found.completeness, 0)} is not from errors (completeness).`),
    faithfulnessTable(found));
}

function steeringView(trace) {
  const found = trace.steering;
  if (!found) return null;
  return h("div", { id: "trace-steering" }, h("h3", {}, "Set by hand"),
    h("p", {}, `${found.settings.join("; ")}: the model says ${quote(found.answer)}; ${quote(trace.answer)} has p = ${fixed(found.probability, 2)} then (scores ${found.scores.map(signed).join(", ")}).`),
    found.changed.length > 0 && sortableTable([
      { name: "layer", show: (c) => c.layer, sort: (c) => c.layer },
      { name: "position", show: (c) => c.position, sort: (c) => c.position },
      { name: "feature", show: (c) => h("a", { href: address(trace.model, c.layer, c.feature) }, "#" + c.feature), sort: (c) => c.feature },
      { name: "label", words: true, wide: true, show: (c) => c.label, sort: (c) => c.label },
      { name: "before", show: (c) => fixed(c.before, 2), sort: (c) => c.before },
      { name: "after", show: (c) => fixed(c.after, 2), sort: (c) => c.after },
    ], found.changed, { label: "Features that changed most" }));
}

// ---- the whole of one trace

function traceFacts(trace) {
  const scores = trace.targets.map((t) => `${quote(visible(t.text))} over ${quote(visible(t.against))} ${signed(t.score)}`).join(", ");
  return [
    ["prompt", quote(trace.prompt)],
    ["answer score", `${signed(trace.score)} logits, mean of ${scores}` + (trace.complete ? "" : "; the answer was cut at the longest length allowed")],
    ["off means", trace.off],
    ["predicted by", `${trace.linearization} gradients`],
    ...trace.notes.map((note) => ["note", note]),
  ];
}

function traceView(trace) {
  const nodes = new Map();
  const remember = (key, node) => { nodes.has(key) ? nodes.get(key).push(node) : nodes.set(key, [node]); return node; };
  const light = (key) => {
    for (const [own, items] of nodes) items.forEach((node) => node.classList.toggle("lit", own === key));
    for (const edge of picture.querySelectorAll(".edge-group")) edge.classList.toggle("lit", key !== null && (edge.dataset.source === key || edge.dataset.target === key));
    picture.classList.toggle("focused", key !== null);
  };
  const lightChain = (number) => {
    const places = new Set(number === null ? [] : trace.chains[number].steps.flatMap((step) => step.features.map(placeKey)));
    for (const [own, items] of nodes) items.forEach((node) => node.classList.toggle("lit", places.has(own)));
    for (const chain of picture.querySelectorAll(".chain")) chain.classList.toggle("lit", Number(chain.dataset.chain) === number);
    picture.classList.toggle("chained", number !== null);
  };
  const picture = tracePicture(trace, light);
  for (const dot of picture.querySelectorAll(".dot, .ring")) remember(dot.dataset.key, dot);
  const verdict = trace.correct === false ? `expected ${quote(trace.expected ?? "?")}` : trace.correct === true ? "correct" : "whether it is right is not known";
  const kind = trace.verification ? "effect" : "predicted effect";
  return [
    trace.forced && h("p", { class: "banner" }, "Made with dictionaries that failed the quality gate (--force)."),
    h("p", { class: "answer" + (trace.correct === false ? " wrong" : "") }, `${trace.model} answers ${quote(trace.answer)} (p = ${fixed(trace.answer_probability, 2)}), ${verdict}.`),
    h("dl", { class: "facts two" }, traceFacts(trace).map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])),
    h("div", { class: "legend" }, h("span", {}, `${kind} on the answer score when off: supports it`, h("span", { class: "ramp", style: { background: gradient(DIVERGING) } }), "works against it"),
      h("span", {}, "area: activation, relative to the largest shown in the layer"), h("span", {}, `lines: the ${EDGES_OF_A_BOUNDARY} strongest edges of a boundary, blue where the source supports the target; dark: the strongest chain to each token`), h("span", {}, "hover for numbers, click a circle for the feature")),
    h("div", { class: "traced" + (Number(picture.getAttribute("width")) > ROOM_BESIDE ? " wide" : "") }, h("div", { class: "picture" }, picture),
      h("div", { class: "beside" }, h("h3", {}, "Chains"), chainList(trace, lightChain))),
    verificationView(trace),
    steeringView(trace),
    h("h3", {}, "Layer by layer"), layerReading(trace, light, remember),
  ];
}

function outdatedNote() {
  const old = data.outdated_traces;
  return old.length > 0 && h("p", { class: "note" }, `${plural(old.length, "file")} of another version ${old.length === 1 ? "is" : "are"} left out (${old.join(", ")}); `, h("code", {}, `throughline trace ${RUN} "PROMPT"`), " and ", h("code", {}, `throughline compare ${RUN} "PROMPT"`), " make them again.");
}

function drawTraces() {
  if (!data.traces.length) return section("trace", "Trace", null, outdatedNote(), empty("No prompt has been traced.", `trace ${RUN} "PROMPT"`));
  const box = h("div", { id: "trace-view" });
  const show = (value) => box.replaceChildren(...traceView(data.traces[Number(value)]).flat(Infinity).filter(Boolean));
  section("trace", "Trace", "One prompt through every layer: which features are active, what passes from layer to layer, and what happens to the answer when something is switched off.",
    outdatedNote(), h("div", { class: "controls" }, select("trace", data.traces.map((t, i) => [i, `${t.model}: ${shorten(t.prompt, 80)}`]), show, { id: "trace-choice" })), box);
  show(0);
  return (number) => {
    document.getElementById("trace-choice").value = number;
    show(number);
    document.getElementById("trace").scrollIntoView();
  };
}
