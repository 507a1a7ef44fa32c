"use strict";
// Draws the whole page from the JSON in #data. Every text from data goes in through textContent, so none of it is ever markup.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const RUN = "RUN";
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const DIVERGING = ["#0b4f9c", "#5b9bd5", "#c9c9c4", "#f0a04b", "#b34700"];
const STANDINGS = { universal: "#0b4f9c", shared: "#5b9bd5", specific: "#f0a04b" };
const PAGE_SIZE = 200;

// ---- elements

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// ---- numbers and words

function fmt(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size >= 0.1 || size === 0 ? value.toFixed(size >= 100 ? 1 : 2) : String(Number(value.toPrecision(2)));
}
const fixed = (value, digits) => (typeof value === "number" ? value.toFixed(digits).replace(/^-(?=[0.]*$)/, "") : fmt(value)); // no -0.00
const exact = (value) => (value === null || value === undefined ? "–" : String(value)); // the four digits that data has
const percent = (value, digits = 1) => (typeof value === "number" ? (100 * value).toFixed(digits) + " %" : fmt(value));
const count = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : fmt(value));
const signed = (value) => (typeof value === "number" ? (value >= 0 ? "+" : "") + fixed(value, 2) : fmt(value));
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const quote = (text) => "“" + text + "”";
const visible = (text) => (text === "" ? "∅" : text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍"));
const shorten = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
function duration(seconds) {
  if (seconds < 60) return seconds.toFixed(1) + " s";
  if (seconds < 3600) return Math.floor(seconds / 60) + " min " + Math.round(seconds % 60) + " s";
  return (seconds / 3600).toFixed(1) + " h";
}
const range = (numbers) => {
  const known = [...new Set(numbers.filter((n) => n !== null && n !== undefined))].sort((a, b) => a - b);
  if (!known.length) return "–";
  return known.length === 1 ? count(known[0]) : `${count(known[0])} to ${count(known[known.length - 1])}`;
};

// ---- colours

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function ramp(stops, share) {
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  const [a, b] = [channels(stops[low]), channels(stops[low + 1])];
  return a.map((x, i) => Math.round(x + (b[i] - x) * (place - low)));
}
const rgb = (color) => `rgb(${color.join(" ")})`;
const isDark = (color) => 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 128;
const valueColor = (value, [low, high]) => (typeof value === "number" ? ramp(VIRIDIS, (value - low) / (high - low)) : null);
const gradient = (stops) => `linear-gradient(to right, ${stops.join(", ")})`;

// ---- the tip that follows the pointer

const tip = document.getElementById("tip");
function showTip(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
  const top = event.clientY + 14 + box.height > innerHeight ? event.clientY - 14 - box.height : event.clientY + 14;
  Object.assign(tip.style, { left: Math.max(0, left) + "px", top: Math.max(0, top) + "px" });
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, true);

// ---- pieces that several sections use

function section(id, title, lead, ...content) {
  document.getElementById("nav").append(h("a", { href: "#" + id }, title));
  document.getElementById("main").append(h("section", { id }, h("h2", {}, title), lead && h("p", { class: "lead" }, lead), ...content));
}
const empty = (what, command) => h("p", { class: "empty" }, what + " ", h("code", {}, `throughline ${command}`), command.includes(RUN) ? ` (${RUN} is this run's folder) makes it; then write the report again.` : "");
const select = (name, options, onchange, attributes) =>
  h("label", {}, name, h("select", { onchange: (event) => onchange(event.target.value), ...attributes }, options.map(([value, text]) => h("option", { value }, text))));
const tokens = (numbers, title) => h("span", { class: "chips", title }, numbers.map((n) => h("span", { class: "token" }, visible(data.strings[n]))));

function sortableTable(columns, rows, options = {}) {
  const body = h("tbody");
  const heads = columns.map((column, index) => h("th", { class: column.words && "words", scope: "col", title: column.why },
    h("button", { type: "button", title: column.why, onclick: () => sortBy(index) }, column.name)));
  let sorted = { index: -1, down: false };
  function sortBy(index) {
    sorted = { index, down: sorted.index === index && !sorted.down };
    heads.forEach((head, i) => (i === index ? head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    draw();
  }
  function draw() {
    const order = [...rows];
    if (sorted.index >= 0) {
      const of = columns[sorted.index].sort;
      const missing = (x) => x === null || x === undefined;
      order.sort((a, b) => {
        const [x, y] = [of(a), of(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        return (x < y ? -1 : x > y ? 1 : 0) * (sorted.down ? -1 : 1);
      });
    }
    body.replaceChildren(...order.map((row) => h("tr", { class: options.mark && options.mark(row) },
      columns.map((c) => h("td", { class: [c.words && "words", c.wide && "wide"].filter(Boolean).join(" ") || null, title: c.hover && c.hover(row) }, c.show(row))))));
  }
  draw();
  return h("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": options.label }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
}

// ---- 1. overview

function drawOverview() {
  const { study, info, models, steps } = data;
  document.getElementById("study-name").textContent = study.name;
  if (info.forced) document.querySelector(".top").append(h("span", { class: "tag warn", title: "see the overview" }, "quality gate overridden"));
  const layers = models.reduce((sum, model) => sum + model.layers.length, 0);
  const total = steps.reduce((sum, step) => sum + step.seconds, 0);
  const text = study.config ? `${study.text} (${study.config})` : study.text;
  const facts = [
    ["text", `${text}, pieces of up to ${study.context} tokens, ${percent(study.heldout, 0)} of the documents held out`],
    ["training", `${count(study.tokens)} tokens, ${plural(study.epochs, "epoch")}, seed ${study.seed}`],
    ["made", `${info.created}, commit ${info.commit || "not known"}`],
    ["hardware", Object.entries(info.hardware).map(([k, v]) => `${k} ${v}`).join(", ")],
    ["versions", Object.entries(info.versions).map(([k, v]) => `${k} ${v}`).join(", ")],
    ["time", steps.length ? `${duration(total)} in ${plural(steps.length, "step")}` : "no step is finished"],
  ];
  const table = h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, ["model", "from", "layers evaluated", "d_model", "d_sae", "architecture"].map((name, i) => h("th", { class: i < 2 || i === 5 ? "words" : null }, name)))),
    h("tbody", {}, models.map((m) => h("tr", {}, h("td", { class: "words" }, m.name), h("td", { class: "words" }, m.path),
      h("td", {}, m.layers.length || "none"), h("td", {}, fmt(m.d_model)), h("td", {}, range(m.d_sae)), h("td", { class: "words" }, m.architecture.join(", ")))))));
  section("overview", "Overview", `${study.name}: ${plural(models.length, "model")}` + (layers ? `, ${plural(layers, "dictionary").replace("dictionarys", "dictionaries")} evaluated.` : ", no dictionary evaluated yet."),
    info.forced && h("p", { class: "banner", role: "alert" },
      "The quality gate was overridden (--force): dictionaries that failed it are used below, and whatever is built on them may mean nothing."),
    table,
    h("dl", { class: "facts" }, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    steps.length > 0 && h("details", {}, h("summary", {}, "How long each step took"), sortableTable([
      { name: "step", words: true, show: (x) => x.name, sort: (x) => x.name },
      { name: "started", words: true, show: (x) => x.started, sort: (x) => x.started },
      { name: "took", show: (x) => duration(x.seconds), sort: (x) => x.seconds },
    ], steps, { label: "Steps" })));
}

// ---- 2. quality

function drawQuality() {
  const table = data.quality;
  if (!table) return section("quality", "Quality", null, empty("No dictionary has been evaluated.", `evaluate ${RUN}`));
  const rows = table.model.map((_, i) => Object.fromEntries(Object.keys(table).map((name) => [name, table[name][i]])));
  const number = (key, name, why, digits = 3) => ({ name, why, show: (r) => fixed(r[key], digits), sort: (r) => r[key] });
  const share = (key, name, why) => ({ name, why, show: (r) => percent(r[key]), sort: (r) => r[key] });
  const columns = [
    { name: "model", why: "the language model", words: true, show: (r) => r.model, sort: (r) => r.model },
    { name: "layer", why: "the residual stream after this block", show: (r) => r.layer, sort: (r) => r.layer },
    { ...number("fvu", "FVU", "fraction of variance unexplained: sum |x - x̂|² / sum |x - mean|²; 0 is perfect, 1 no better than the mean"), hover: (r) => "by eighth of the context: " + r.fvu_by_position.map((x) => fixed(x, 3)).join(", ") },
    number("fvu_within_kind", "FVU within kind", "the same after the mean of each kind of token (number, word, …) is taken out: what is left to explain beyond the kind"),
    { ...number("l0", "L0", "features active per token, mean", 1), hover: (r) => `${percent(r.l0 / r.d_sae)} of ${count(r.d_sae)} features` },
    share("dead", "dead", "share of features that never fire on the held-out tokens"),
    share("dense", "dense", "share of features that fire on more than a tenth of the tokens"),
    number("ce_loss_without_sae", "CE without", "cross-entropy of the model as it is, nats per token"),
    number("ce_loss_with_sae", "CE with", "cross-entropy with the dictionary's reconstruction in place of the layer, nats per token"),
    number("delta_ce", "ΔCE", "CE with minus CE without: what the reconstruction costs, nats per token", 4),
    number("ce_loss_score", "CE score (zero)", "share of the damage of setting the layer to zero that the reconstruction avoids; it saturates near 1"),
    number("ce_loss_score_mean", "CE score (mean)", "the same against setting the layer to its mean, which is the harder comparison"),
    number("kl_div_with_sae", "KL", "divergence of the next-token distribution with the dictionary from the one without, nats", 4),
    { ...share("answers_kept", "answers kept", "of the answers that the model gives exactly without the dictionary, the share still given with it"), show: (r) => (r.answers_kept === null ? "–" : `${percent(r.answers_kept)} of ${count(r.num_answers)}`) },
    { name: "gate", why: "which conditions of the quality gate the layer fails", words: true, wide: true, show: (r) => (r.gate.length ? r.gate.join("; ") : "passed"), sort: (r) => r.gate.join("; ") },
  ];
  const failed = rows.filter((r) => r.gate.length);
  const gate = data.study.gate;
  section("quality", "Quality", `On held-out text: n = ${range(table.num_tokens)} tokens, ${range(table.num_spliced_tokens)} of them for CE, KL and answers.`,
    h("p", {}, failed.length ? `${failed.length} of ${plural(rows.length, "layer")} fail the gate: ` + failed.slice(0, 12).map((r) => `${r.model} layer ${r.layer} (${r.gate.join("; ")})`).join(", ") + (failed.length > 12 ? ` and ${failed.length - 12} more.` : ".")
      : rows.length === 1 ? "The evaluated layer passes the gate." : `All ${rows.length} layers pass the gate.`),
    sortableTable(columns, rows, { label: "Quality by layer", mark: (r) => (r.gate.length ? "failed" : null) }),
    h("p", { class: "note" }, `The gate: L0 at most ${percent(gate.max_l0_share, 0)} of d_sae and at most d_model, FVU at most ${gate.max_fvu}, CE score (zero) at least ${gate.min_ce_recovered}, dead at most ${percent(gate.max_dead, 0)}. Hover over a heading for its meaning, over FVU for its course through the context; click to sort.`));
}

// ---- 3. transfer

// Value, interval, null, ceiling and sample of one cell, in words; row and column are indices into the result's layers.
function cellNumbers(result, row, column, separator) {
  const at = (name) => (result[name] ? result[name][row][column] : undefined);
  const parts = [`${result.source} layer ${result.source_layers[row]} → ${result.target} layer ${result.target_layers[column]}`, `value ${exact(at("value"))}`];
  if (result.low && result.high) parts.push(`95 % interval ${exact(at("low"))} to ${exact(at("high"))}`);
  parts.push(result.null ? `null ${exact(at("null"))}` : "no null", result.ceiling ? `ceiling ${exact(at("ceiling"))}` : "no ceiling");
  for (const name of Object.keys(result.others)) parts.push(`${name} ${exact(result.others[name][row][column])}`);
  parts.push(`n = ${count(result.num_tokens)} tokens`);
  return parts.join(separator);
}

// A grid of cells with keyboard, hover and click: at(row, column) gives [value, describe(separator)], or null where there is nothing.
function heatMap({ rows, columns, rowNames, columnNames, at, limits, cell, numbers, label, onpick, blocks, axes = true }) {
  const longest = blocks ? Math.max(...blocks.map((b) => b.name.length)) : 0;
  const layered = blocks && cell >= 12;
  const left = axes ? (blocks ? Math.min(150, 7 * longest + 16) + (layered ? 18 : 0) : 44) : 26;
  const top = blocks ? (layered ? 38 : 24) : axes ? 34 : 18;
  const width = left + columns * cell + 6, height = top + rows * cell + 6;
  const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": label + "; arrow keys move, numbers below" });
  const cells = [];
  for (let r = 0; r < rows; r++) {
    cells.push([]);
    for (let c = 0; c < columns; c++) {
      const found = at(r, c);
      const color = found && valueColor(found[0], limits);
      const node = s("rect", { class: "cell", x: left + c * cell, y: top + r * cell, width: cell, height: cell, "data-r": r, "data-c": c });
      node.style.fill = color ? rgb(color) : "var(--missing)";
      cells[r].push(node);
      svg.append(node);
      if (numbers && color) {
        const text = s("text", { x: left + (c + 0.5) * cell, y: top + (r + 0.5) * cell, "text-anchor": "middle", "dominant-baseline": "central", "pointer-events": "none" }, fixed(found[0], 2));
        text.style.fill = isDark(color) ? "#fff" : "#000";
        svg.append(text);
      }
    }
  }
  const step = Math.ceil(14 / cell);
  if (!blocks) {
    rowNames.forEach((name, i) => i % step === 0 && svg.append(s("text", { class: "soft", x: left - 6, y: top + (i + 0.5) * cell, "text-anchor": "end", "dominant-baseline": "central" }, name)));
    columnNames.forEach((name, i) => i % (step * (cell < 18 ? 2 : 1)) === 0 && svg.append(s("text", { class: "soft", x: left + (i + 0.5) * cell, y: top - 7, "text-anchor": "middle" }, name)));
    if (axes) {
      svg.append(s("text", { class: "soft", x: left, y: 11 }, "target layer →"));
      svg.append(s("text", { class: "soft", x: -top, y: 11, transform: "rotate(-90)", "text-anchor": "end" }, "← source layer"));
    }
  } else {
    for (const { name, begin, size, layers } of blocks) {
      if (layered) layers.forEach((layer, i) => svg.append(
        s("text", { class: "soft", x: left - 6, y: top + (begin + i + 0.5) * cell, "text-anchor": "end", "dominant-baseline": "central" }, layer),
        s("text", { class: "soft", x: left + (begin + i + 0.5) * cell, y: top - 6, "text-anchor": "middle" }, layer)));
      const middle = (begin + size / 2) * cell;
      svg.append(s("text", { x: left - (layered ? 26 : 8), y: top + middle, "text-anchor": "end", "dominant-baseline": "central" }, shorten(name, 20), s("title", {}, name)));
      svg.append(s("text", { x: left + middle, y: top - (layered ? 22 : 8), "text-anchor": "middle" }, shorten(name, Math.max(2, Math.floor((size * cell) / 6.5))), s("title", {}, name)));
      if (begin) {
        for (const line of [{ x1: left, x2: left + columns * cell, y1: top + begin * cell, y2: top + begin * cell }, { y1: top, y2: top + rows * cell, x1: left + begin * cell, x2: left + begin * cell }])
          svg.append(s("line", { ...line, stroke: "#fff", "stroke-width": 2, "pointer-events": "none" }));
      }
    }
  }
  let picked = null;
  function pick(r, c) {
    if (picked) cells[picked[0]][picked[1]].classList.remove("picked");
    picked = [Math.min(rows - 1, Math.max(0, r)), Math.min(columns - 1, Math.max(0, c))];
    const node = cells[picked[0]][picked[1]];
    node.classList.add("picked");
    const found = at(...picked);
    onpick(found ? found[1](" · ") : "this pair was not computed");
  }
  const place = (event) => (event.target.dataset && event.target.dataset.r !== undefined ? [Number(event.target.dataset.r), Number(event.target.dataset.c)] : null);
  svg.addEventListener("pointermove", (event) => {
    const here = place(event);
    if (!here) return hideTip();
    const found = at(...here);
    showTip(found ? found[1]("\n") : "this pair was not computed", event);
  });
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("click", (event) => { const here = place(event); if (here) pick(...here); });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    pick((picked ? picked[0] : 0) + (picked ? move[0] : 0), (picked ? picked[1] : 0) + (picked ? move[1] : 0));
  });
  return svg;
}

const scale = (limits) => h("span", {}, fmt(limits[0]), h("span", { class: "ramp", style: { background: gradient(VIRIDIS) } }), fmt(limits[1]));

function summarize(result) {
  const flat = (name) => (result[name] || []).flat().filter((x) => typeof x === "number");
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const values = flat("value");
  if (!values.length) return "No value could be computed.";
  let text = `${plural(values.length, "pair")} of layers: mean value ${fixed(mean(values), 3)}`;
  const nulls = flat("null"), ceilings = flat("ceiling");
  if (nulls.length) {
    let above = 0, compared = 0;
    const floor = result.low || result.value;
    floor.forEach((line, r) => line.forEach((x, c) => {
      if (typeof x !== "number" || typeof result.null[r][c] !== "number") return;
      compared += 1;
      above += x > result.null[r][c];
    }));
    text += `, mean null ${fixed(mean(nulls), 3)}; in ${above} of ${compared} the ${result.low ? "whole 95 % interval" : "value"} lies above the null`;
  }
  if (ceilings.length) text += `; mean ceiling ${fixed(mean(ceilings), 3)}`;
  return `${text}. n = ${count(result.num_tokens)} tokens of ${plural(result.num_documents, "document")}, ${percent(result.coverage, 0)} of the source's tokens aligned, seed ${result.seed}.`;
}

function drawTransfer() {
  const { results, limits } = data.transfer;
  if (!results.length) return section("transfer", "Transfer", null, empty("Nothing has been computed about transfer.", `transfer ${RUN}`));
  const metrics = [...new Set(results.map((r) => r.metric))];
  const names = [...new Set(results.flatMap((r) => [r.source, r.target]))];
  const state = { metric: metrics[0], source: results[0].source, target: results[0].target };
  const pairBox = h("div", { id: "transfer-pair" }), blockBox = h("div", { id: "transfer-all" });
  const change = (key) => (value) => { state[key] = value; draw(); };
  const options = (values) => values.map((v) => [v, v]);

  function drawPair() {
    const result = results.find((r) => r.metric === state.metric && r.source === state.source && r.target === state.target);
    if (!result) return pairBox.replaceChildren(h("p", { class: "empty" }, `${state.metric} from ${state.source} to ${state.target} was not computed.`));
    const scaleLimits = limits[state.metric];
    const [rows, columns] = [result.source_layers.length, result.target_layers.length];
    const line = h("p", { class: "reading-line", "aria-live": "polite" }, "Click a cell, or move with the arrow keys, for its numbers.");
    const onpick = (text) => { line.textContent = text; };
    const map = (name, cell, numbers) => heatMap({
      rows, columns, rowNames: result.source_layers, columnNames: result.target_layers, limits: scaleLimits, cell, numbers, onpick, axes: name === "value",
      at: (r, c) => [result[name][r][c], (separator) => cellNumbers(result, r, c, separator)], label: `${result.metric}, ${name}, ${result.source} to ${result.target}`,
    });
    const cell = Math.max(11, Math.min(52, Math.floor(470 / Math.max(rows, columns))));
    const small = Math.max(5, Math.min(22, Math.floor(190 / Math.max(rows, columns))));
    pairBox.replaceChildren(
      h("p", {}, `Value: ${result.quantity}. Null: ${result.null_words || "none for this metric"}. Ceiling: ${result.ceiling_words || "none for this pair"}.`),
      h("p", {}, summarize(result)),
      h("div", { class: "maps" },
        h("figure", {}, h("h3", {}, "value"), h("div", { class: "picture" }, map("value", cell, cell >= 34))),
        ["null", "ceiling"].filter((name) => result[name]).map((name) => h("figure", {}, h("h3", {}, name), h("div", { class: "picture" }, map(name, small, false)))),
        h("figure", {}, h("h3", {}, "colours"), scale(scaleLimits), h("p", { class: "note" }, "one scale for all maps of the metric; grey: nothing there"),
          Object.keys(result.details).length > 0 && h("dl", { class: "facts note" }, Object.entries(result.details).map(([k, v]) => [h("dt", {}, k), h("dd", {}, fmt(v))])))),
      line);
  }

  function drawBlocks() {
    const own = results.filter((r) => r.metric === state.metric);
    const blocks = [];
    for (const name of names) {
      const layers = [...new Set(own.flatMap((r) => [...(r.source === name ? r.source_layers : []), ...(r.target === name ? r.target_layers : [])]))].sort((a, b) => a - b);
      const previous = blocks[blocks.length - 1];
      if (layers.length) blocks.push({ name, layers, begin: previous ? previous.begin + previous.size : 0, size: layers.length });
    }
    const places = blocks.flatMap((b) => b.layers.map((layer) => ({ model: b.name, layer })));
    const byPair = new Map(own.map((r) => [JSON.stringify([r.source, r.target]), r]));
    const at = (r, c) => {
      const result = byPair.get(JSON.stringify([places[r].model, places[c].model]));
      if (!result) return null;
      const [i, j] = [result.source_layers.indexOf(places[r].layer), result.target_layers.indexOf(places[c].layer)];
      return i < 0 || j < 0 ? null : [result.value[i][j], (separator) => cellNumbers(result, i, j, separator)];
    };
    const line = h("p", { class: "reading-line", "aria-live": "polite" });
    const map = heatMap({
      rows: places.length, columns: places.length, at, blocks, limits: limits[state.metric], numbers: false, label: `${state.metric} between all layers of all models`,
      cell: Math.max(6, Math.min(32, Math.floor(640 / places.length))), onpick: (text) => { line.textContent = text; },
    });
    blockBox.replaceChildren(h("h3", {}, `All models: ${state.metric} between all ${places.length} layers`),
      h("p", { class: "note" }, "Rows are layers of the source, columns layers of the target, each model from its first layer to its last. ", scale(limits[state.metric])),
      h("div", { class: "picture" }, map), line);
  }
  const draw = () => { drawPair(); drawBlocks(); };
  section("transfer", "Transfer", "What carries over from one layer's dictionary to another layer, within a model and between models.",
    h("div", { class: "controls" }, select("metric", options(metrics), change("metric"), { id: "transfer-metric" }), select("source (rows)", options(names), change("source"), { id: "transfer-source" }),
      select("target (columns)", options(names), change("target"), { id: "transfer-target" })), pairBox, blockBox);
  document.getElementById("transfer-source").value = state.source;
  document.getElementById("transfer-target").value = state.target;
  draw();
}

// ---- 4. analysis

// A picture that was drawn for a file. In an img nothing of it can run or fetch.
function drawing(figure) {
  const source = "data:image/svg+xml," + encodeURIComponent(figure.svg);
  return h("figure", { class: "drawing" }, h("img", { src: source, alt: figure.caption, "data-name": figure.name }),
    h("figcaption", {}, figure.caption, " ", h("small", {}, `figures/${figure.name}.svg, .png and .pdf`)));
}

function drawAnalysis() {
  const analysis = data.analysis;
  if (!analysis) return section("analysis", "Analysis", null, empty("The matrices have not been analysed.", `report ${RUN}`), data.figures.map(drawing));
  const topics = [...new Set(analysis.findings.map((f) => f.topic))];
  const beyond = analysis.findings.filter((f) => f.beyond_null).length;
  const home = (figure) => topics.find((topic) => figure.topics.some((word) => topic.toLowerCase().includes(word)));
  const others = data.figures.filter((f) => home(f) === undefined);
  section("analysis", "Analysis", `${plural(analysis.findings.length, "finding")}, ${beyond} beyond the null; n = ${count(analysis.num_tokens)} tokens, seed ${analysis.seed}.`,
    topics.map((topic) => [h("h3", {}, topic), h("ul", { class: "findings" }, analysis.findings.filter((f) => f.topic === topic).map((f) =>
      h("li", { class: f.beyond_null ? null : "null" }, f.sentence, " ", !f.beyond_null && h("span", { class: "tag" }, "nothing beyond the null"),
        Object.keys(f.numbers).length > 0 && h("div", {}, h("small", {}, Object.entries(f.numbers).map(([k, v]) => `${k} ${fmt(v)}`).join(" · ")))))),
      data.figures.filter((f) => home(f) === topic).map(drawing)]),
    others.length > 0 && [h("h3", {}, "figures"), others.map(drawing)]);
}

// ---- 5. features

// One flat list of all features, with the best label of each; columns stay where they are.
const featureList = [], featureByAddress = new Map();
const address = (model, layer, feature) => `#feature/${encodeURIComponent(model)}/${layer}/${feature}`;
const column = (values, i) => (Array.isArray(values) ? values[i] : values);

function indexFeatures() {
  for (const [model, table] of Object.entries(data.features.models)) {
    const labels = new Map(), examples = new Map();
    const group = (map, rows) => rows.forEach((row, i) => (map.has(row) ? map.get(row).push(i) : map.set(row, [i])));
    if (table.labels) group(labels, table.labels.row);
    group(examples, table.examples.row);
    table.feature.forEach((feature, i) => {
      const own = labels.get(i) || [];
      const best = own.length ? own[0] : null;
      const f1 = best === null ? null : table.labels.f1[best];
      const labelled = best !== null && table.labels.reached[best];
      const top = table.top_tokens[i].map((n) => data.strings[n]);
      const label = labelled ? data.strings[table.labels.label[best]] : null;
      const entry = { model, table, i, feature, layer: table.layer[i], labels: own, f1: labelled ? f1 : null, label, top, examples: examples.get(i) || [],
        density: table.density[i], max: table.max[i], search: ((label || "") + "\u0000" + top.join("\u0000")).toLowerCase() };
      featureList.push(entry);
      featureByAddress.set(address(model, entry.layer, feature), entry);
    });
  }
}
const nameOf = (entry) => (entry.label ? h("span", {}, entry.label) : h("span", { class: "unlabelled" }, "unlabelled: " + (entry.top.slice(0, 4).map(visible).join(" ") || "never active")));

function drawContext(table, i) {
  const columns = table.examples;
  const numbers = columns.contexts[columns.context[i]].split(" ").map((n) => parseInt(n, 36));
  const shades = columns.shades[i];
  const stratum = data.strings[columns.stratum[i]];
  const cut = columns.cut[i];
  return h("div", { class: "context" },
    h("span", { class: "value", title: `document ${columns.document[i]}` }, stratum === "top" ? "top" : "quantile " + stratum, h("br"), fixed(columns.value[i], 2)),
    h("span", {}, cut & 2 ? "… " : null, numbers.map((n, at) => {
      const share = Number(shades[at]) / 9;
      const node = h("span", { class: at === columns.focus[i] ? "at focus" : "at", title: share ? `about ${Math.round(share * 100)} % of its largest activation` : null }, data.strings[n].replaceAll("\n", "↵"));
      if (share) node.style.backgroundColor = `rgb(var(--shade) / ${(0.08 + 0.55 * share).toFixed(2)})`;
      return node;
    }), cut & 1 ? " …" : null));
}

function labelScores(table, i) {
  const l = table.labels;
  const score = (name, value, why) => h("span", { title: why }, h("i", {}, name), " ", h("b", {}, fixed(value, 2)));
  if (data.strings[l.measure[i]] === "detection")
    return h("div", { class: "scores" }, score("balanced accuracy", l.balanced_accuracy[i], "of detection: a language model judged by the label in which held-out contexts the feature is active; 0.5 by chance"),
      score("F1", l.f1[i], "of detection"), score("precision", l.precision[i]), score("recall", l.recall[i]), score("base F1", l.base_f1[i], "F1 of always saying yes"),
      score("fuzzing", l.fuzzing[i], "balanced accuracy of judging whether the right tokens are marked"), h("span", {}, h("i", {}, "n"), " ", `${count(l.num_positive[i])} of ${count(l.num_tokens[i])} contexts`));
  return h("div", { class: "scores" }, score("F1", l.f1[i], "on held-out text"), score("precision", l.precision[i]), score("recall", l.recall[i]),
    score("base F1", l.base_f1[i], "F1 of always saying yes"), score("best neuron's F1", l.neuron_f1[i], "best single coordinate of the residual stream"),
    score("untrained F1", l.untrained_f1[i], "best feature of an untrained dictionary of the same shape"),
    h("span", {}, h("i", {}, "n"), " ", `${count(l.num_positive[i])} of ${count(l.num_tokens[i])} tokens`), score("threshold", l.threshold[i], "activation above which it counts as on"));
}

function featureDetail(entry) {
  const { table, i } = entry;
  const best = entry.labels[0];
  const here = address(entry.model, entry.layer, entry.feature);
  const others = entry.labels.slice(1);
  const text = (l) => `${quote(data.strings[table.labels.label[l]])} (${data.strings[table.labels.source[l]]})`;
  const kinds = (table.role_means[i] || []).map((x, k) => `${data.roles[k]} ${fmt(x)}`).join(", ");
  const fact = (name, value) => [h("dt", {}, name), h("dd", {}, value)];
  const list = (numbers) => (numbers.length ? tokens(numbers) : "–");
  return [
    h("h3", {}, nameOf(entry)),
    h("p", { class: "note" }, `${entry.model}, layer ${entry.layer}, feature `, h("a", { href: here }, "#" + entry.feature)),
    best === undefined ? h("p", {}, table.labels ? "No labeler has words for it." : ["Labels have not been made: ", h("code", {}, `throughline label ${RUN}`)])
      : [h("p", {}, entry.label ? `Label from ${data.strings[table.labels.source[best]]}.` : `Best candidate ${text(best)} is below the bar of F1 ${fixed(data.study.bar, 2)}.`), labelScores(table, best)],
    others.length > 0 && h("details", {}, h("summary", {}, plural(others.length, "further label")), others.map((l) => [h("p", {}, text(l)), labelScores(table, l)])),
    h("dl", { class: "facts" },
      fact("active on", `${percent(entry.density, 2)} of held-out tokens (${count(table.num_active[i])} of ${count(column(table.num_tokens, i))})`),
      fact("activation", `largest ${fmt(entry.max)}, mean where active ${fmt(table.mean_active[i])}`),
      kinds && fact("mean by kind of position", kinds),
      fact("active on tokens", [list(table.top_tokens[i]), typeof table.top_token_share[i] === "number" && table.top_tokens[i].length > 0 && h("small", {}, `${percent(table.top_token_share[i], 0)} of its activation is on the first`)]),
      fact("promotes", list(table.promoted[i])), fact("suppresses", list(table.suppressed[i]))),
    h("h3", {}, "Contexts"),
    h("p", { class: "note" }, entry.examples.length ? "Shading: activation, relative to the feature's largest. Underlined: the token whose activation stands at the left." : "No context is on this page for it."),
    entry.examples.map((e) => drawContext(table, e)),
  ];
}

function drawFeatures() {
  indexFeatures();
  const f = data.features;
  if (!featureList.length) return section("features", "Features", null, empty("There are no feature tables.", `features ${RUN}`));
  const models = Object.keys(f.models);
  const state = { query: "", model: "", layer: "", sort: "f1", limit: PAGE_SIZE, open: null };
  const list = h("div", { class: "list", id: "feature-list", role: "list", "aria-label": "Features found" });
  const detail = h("div", { class: "detail", id: "feature-detail", tabindex: -1, "aria-live": "polite" }, h("p", { class: "note" }, "Choose a feature."));
  const counter = h("p", { class: "note", id: "feature-count", "aria-live": "polite" });
  const layerSelect = h("select", { id: "feature-layer", onchange: (event) => { state.layer = event.target.value; state.limit = PAGE_SIZE; draw(); } });
  const change = (key) => (value) => { state[key] = value; state.limit = PAGE_SIZE; if (key === "model") fillLayers(); draw(); };
  function fillLayers() {
    const layers = [...new Set(featureList.filter((e) => !state.model || e.model === state.model).map((e) => e.layer))].sort((a, b) => a - b);
    if (!layers.map(String).includes(state.layer)) state.layer = "";
    layerSelect.replaceChildren(h("option", { value: "" }, "all"), ...layers.map((x) => h("option", { value: x }, x)));
    layerSelect.value = state.layer;
  }
  const orders = {
    f1: (a, b) => (b.f1 ?? -1) - (a.f1 ?? -1), density: (a, b) => (b.density ?? -1) - (a.density ?? -1), rare: (a, b) => (a.density || 2) - (b.density || 2),
    max: (a, b) => (b.max ?? -1) - (a.max ?? -1), number: () => 0,
  };
  function find() {
    const query = state.query.trim().toLowerCase();
    const number = /^#\d+$/.test(query) ? Number(query.slice(1)) : null;
    return featureList.filter((e) => (!state.model || e.model === state.model) && (state.layer === "" || e.layer === Number(state.layer)) &&
      (number !== null ? e.feature === number : !query || e.search.includes(query) || (/^\d+$/.test(query) && e.feature === Number(query)))).sort(orders[state.sort]);
  }
  function draw() {
    const found = find();
    const shown = found.slice(0, state.limit);
    list.replaceChildren(...shown.map((entry) => h("a", { class: "row" + (entry === state.open ? " open" : ""), role: "listitem", href: address(entry.model, entry.layer, entry.feature) },
      h("span", { class: "what" }, nameOf(entry)), h("span", { class: "number" }, entry.f1 === null ? "" : "F1 " + fixed(entry.f1, 2)),
      h("span", { class: "where" }, `#${entry.feature} · layer ${entry.layer} · ${entry.model}`), h("span", { class: "number" }, `${percent(entry.density, 2)} · max ${fixed(entry.max, 1)}`))));
    const rest = found.length - shown.length;
    if (rest) list.append(h("p", { style: { padding: "0 12px" } }, h("button", { type: "button", class: "plain", onclick: () => { state.limit += PAGE_SIZE; draw(); } }, `show ${Math.min(rest, PAGE_SIZE)} more`)));
    if (!found.length) list.append(h("p", { class: "note", style: { padding: "0 12px" } }, "No feature matches."));
    counter.textContent = `${plural(found.length, "feature")} found` + (rest ? `; the first ${count(shown.length)} are listed, ${count(rest)} are not.` : ".");
  }
  const left = [];
  if (f.num_left_out) left.push(`${count(f.num_left_out)} of ${count(f.num_left_out + f.num_features)} features are not on this page (those named by traces, the labelled and the most active ones are)`);
  if (f.num_examples_left_out) left.push(`${count(f.num_examples_left_out)} of ${count(f.num_examples_left_out + f.num_examples)} contexts are not on this page (each feature lost the same)`);
  const without = data.models.map((m) => m.name).filter((name) => !models.includes(name));
  const unlabelled = models.filter((name) => !f.models[name].labels);
  section("features", "Features", `${plural(featureList.length, "feature")} of ${plural(models.length, "model")}; ${count(featureList.filter((e) => e.label).length)} have a label of F1 ${fixed(data.study.bar, 2)} or better on held-out text.`,
    left.length > 0 && h("p", { class: "note", id: "left-out" }, "To keep the page small, " + left.join("; ") + ". All are in the run's tables."),
    without.length > 0 && empty(`No feature table for ${without.join(", ")}.`, `features ${RUN}`),
    unlabelled.length > 0 && empty(`No labels for ${unlabelled.join(", ")}.`, `label ${RUN}`),
    h("div", { class: "controls" },
      h("label", {}, "search", h("input", { type: "search", id: "feature-search", placeholder: "label, token or #number", oninput: (event) => change("query")(event.target.value) })),
      select("model", [["", "all"], ...models.map((m) => [m, m])], change("model"), { id: "feature-model" }), h("label", {}, "layer", layerSelect),
      select("order", [["f1", "label F1"], ["density", "most often active"], ["rare", "least often active"], ["max", "largest activation"], ["number", "number"]], change("sort"), { id: "feature-sort" })),
    counter, h("div", { class: "browser" }, list, detail));
  fillLayers();
  draw();
  return function open(hash, focus) {
    // The model may stand in the address as it is, with its slash, or encoded.
    const parts = hash.slice("#feature/".length).split("/");
    const [layer, feature] = parts.slice(-2);
    let model = parts.slice(0, -2).join("/");
    try { model = decodeURIComponent(model); } catch { /* a stray % is part of the name */ }
    const entry = featureByAddress.get(address(model, Number(layer), Number(feature)));
    state.open = entry || null;
    detail.replaceChildren(...(entry ? featureDetail(entry) : [h("p", { class: "empty" }, `Feature #${feature} of layer ${layer} of ${model} is not on this page.`)]).flat(Infinity).filter(Boolean));
    for (const row of list.querySelectorAll(".row")) row.classList.toggle("open", Boolean(entry) && row.getAttribute("href") === address(entry.model, entry.layer, entry.feature));
    const box = detail.getBoundingClientRect();
    if (box.top < 50 || box.top > innerHeight - 200) document.getElementById("features").scrollIntoView();
    if (focus) detail.focus({ preventScroll: true });
  };
}

// ---- 6. trace: in trace.js

// ---- 7. compare

function comparisonView(comparison, showTrace) {
  const swatch = (standing) => h("span", { class: "swatch", style: { background: STANDINGS[standing] } });
  const bar = (shares) => h("span", { class: "bar", title: Object.keys(STANDINGS).map((k) => `${k} ${percent(shares[k])}`).join(", ") },
    Object.keys(STANDINGS).map((k) => h("i", { style: { background: STANDINGS[k], width: 100 * (shares[k] || 0) + "%" } })));
  const shown = (model) => comparison.features.filter((f) => f.model === model).length;
  const rows = comparison.models.map((model) => {
    const own = comparison.shares[model] || {}, base = comparison.all_shares[model] || {};
    const right = comparison.correct[model];
    return h("tr", { class: right === false ? "failed" : null },
      h("td", { class: "words" }, model), h("td", { class: "words" }, quote(comparison.answers[model] ?? "–"), right === false ? " (wrong)" : right === true ? " (correct)" : ""), h("td", {}, fixed(comparison.probabilities[model], 2)),
      h("td", {}, shown(model)), Object.keys(STANDINGS).map((k) => h("td", {}, percent(own[k], 0), h("small", {}, ` / ${percent(base[k], 0)}`))),
      h("td", { class: "words" }, bar(own), h("span", { style: { opacity: 0.55, display: "block", marginTop: "2px" } }, bar(base))),
      h("td", { class: "words" }, showTrace && comparison.traces[model] !== undefined ? h("button", { type: "button", class: "plain", onclick: () => showTrace(comparison.traces[model]) }, "trace") : null));
  });
  const heads = ["model", "answer", "p", "features shown", ...Object.keys(STANDINGS).map((k) => [swatch(k), k, h("small", {}, " / base")]), "shown above, base rate below", ""];
  const listed = comparison.features.filter((f) => f.standing !== "specific");
  const order = [...listed].sort((a, b) => Object.keys(b.partners).length - Object.keys(a.partners).length || Math.abs(b.effect) - Math.abs(a.effect));
  const link = (model, layer, feature) => h("a", { href: address(model, layer, feature) }, `layer ${layer} #${feature}`);
  return [
    comparison.forced && h("p", { class: "banner" }, "Made with dictionaries that failed the quality gate (--force)."),
    h("p", {}, `${quote(comparison.prompt)}: a feature is universal if it has a partner in every other model, shared if in some, specific if in none. Threshold for a partner: ${comparison.threshold}.`),
    h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { class: i < 2 || i > 6 ? "words" : null }, head)))), h("tbody", {}, rows))),
    h("p", { class: "note" }, "Base: the same share over all live features of the model, so what any prompt would show."),
    h("h3", {}, `${plural(listed.length, "feature")} with a partner`),
    listed.length > 0 && sortableTable([
      { name: "feature", words: true, show: (f) => [f.model + " ", link(f.model, f.layer, f.feature)], sort: (f) => f.model + String(f.layer).padStart(4, "0") },
      { name: "label", words: true, wide: true, show: (f) => f.label || h("span", { class: "unlabelled" }, "unlabelled"), sort: (f) => f.label },
      { name: "position", show: (f) => f.position, sort: (f) => f.position },
      { name: "activation", show: (f) => fixed(f.activation, 2), sort: (f) => f.activation },
      { name: "if off", why: "measured change of the answer score, logits", show: (f) => fixed(f.effect, 2), sort: (f) => f.effect },
      { name: "standing", words: true, show: (f) => [swatch(f.standing), f.standing], sort: (f) => f.standing },
      { name: "partners (Pearson r)", words: true, wide: true, show: (f) => Object.entries(f.partners).map(([model, [layer, feature, r]], i) => [i ? ", " : "", model + " ", link(model, layer, feature), ` (${fixed(r, 2)})`]), sort: (f) => Object.keys(f.partners).length },
    ], order, { label: "Features with a partner" }),
  ];
}

function drawComparisons(showTrace) {
  if (!data.comparisons.length) return section("compare", "Compare", null, empty("No prompt has been compared between models.", `compare ${RUN} "PROMPT"`));
  const box = h("div", { id: "compare-view" });
  const show = (value) => box.replaceChildren(...comparisonView(data.comparisons[Number(value)], showTrace).flat(Infinity).filter(Boolean));
  section("compare", "Compare", "The same prompt in several models: what is shared, what is specific.",
    h("div", { class: "controls" }, select("prompt", data.comparisons.map((c, i) => [i, shorten(c.prompt, 80)]), show, { id: "compare-choice" })), box);
  show(0);
}

// ---- start

drawOverview();
drawQuality();
drawTransfer();
drawAnalysis();
const openFeature = drawFeatures();
drawComparisons(drawTraces());

function follow(focus) {
  if (location.hash.startsWith("#feature/") && openFeature) openFeature(location.hash, focus);
  else if (location.hash.length > 1 && !focus) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
addEventListener("hashchange", () => follow(true));
// A second click on the address that is already open changes no hash, but should still show it.
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest("a[href^='#feature/']");
  if (link && link.getAttribute("href") === location.hash) follow(true);
});
follow(false);

const marks = new Map([...document.querySelectorAll("#nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
const watcher = new IntersectionObserver((entries) => entries.forEach((e) => marks.get(e.target.id)?.classList.toggle("here", e.isIntersecting)), { rootMargin: "-35% 0px -60% 0px" });
for (const id of marks.keys()) watcher.observe(document.getElementById(id));
