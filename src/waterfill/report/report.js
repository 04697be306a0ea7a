"use strict";
(() => {
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const records = JSON.parse($("#data").textContent);
for (const r of records) {
  r.rows = r.rows.map((row) => Object.fromEntries(r.columns.map((c, i) => [c, row[i]])));
  r.kindOf = new Map(r.rows.map((row) => [row.name, row.kind]));
}

// ---- numbers as people read them -------------------------------------------------------------
const known = (v) => typeof v === "number" && isFinite(v);
const count = (v) => (known(v) ? Math.round(v).toLocaleString("en-US") : "–");
function size(v) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let u = 0;
  while (Math.abs(v) >= 1000 && u < 4) { v /= 1000; u++; }
  return `${+v.toPrecision(4)} ${units[u]}`;
}
const nats = (v) => (!known(v) ? "–" : v === 0 ? "0" : Math.abs(v) >= 1e-3 ? (v >= 1000 ? count(v) : v.toPrecision(3)) : v.toExponential(2));
const power = (e) => "10" + String(e).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));
const tick = (v) => (v >= 1e-3 && v < 1e5 ? String(+v.toPrecision(3)) : Math.log10(v) % 1 === 0 ? power(Math.log10(v)) : v.toExponential(0));

// ---- drawing -----------------------------------------------------------------------------------
function add(parent, tag, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function make(parent, tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  parent.append(node);
  return node;
}
function logScale(values, from, to, pad = 0.06) {
  const logs = values.map(Math.log10);
  let lo = Math.min(...logs), hi = Math.max(...logs);
  if (hi - lo < 0.3) { lo -= 0.2; hi += 0.2; }
  const margin = (hi - lo) * pad;
  lo -= margin; hi += margin;
  const scale = (v) => from + ((Math.log10(v) - lo) / (hi - lo)) * (to - from);
  const steps = hi - lo > 2.2 ? [1] : hi - lo > 1.1 ? [1, 3] : [1, 2, 5];
  scale.ticks = [];
  const every = Math.max(1, Math.ceil((hi - lo) / 8));
  for (let e = Math.floor(lo); e <= hi; e++) {
    if (e % every === 0 || steps.length > 1) for (const s of steps) {
      const v = s * 10 ** e;
      if (Math.log10(v) >= lo && Math.log10(v) <= hi) scale.ticks.push(v);
    }
  }
  scale.ends = [10 ** lo, 10 ** hi];
  return scale;
}
function linearScale(lo, hi, from, to, wanted = 6) {
  const rough = (hi - lo) / wanted || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((s) => s * unit >= rough) * unit;
  const scale = (v) => from + ((v - lo) / (hi - lo || 1)) * (to - from);
  scale.ticks = [];
  for (let v = Math.ceil(lo / step) * step; v <= hi + step * 1e-9; v += step) scale.ticks.push(+v.toPrecision(12));
  scale.ends = [lo, hi];
  return scale;
}
function frame(svg, box, x, y, labelX, labelY, showX, showY) {
  for (const v of y.ticks) {
    add(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y(v), y2: y(v) });
    add(svg, "text", { x: box.left - 9, y: y(v) + 4, "text-anchor": "end" }, showY(v));
  }
  for (const v of x ? x.ticks : []) {
    add(svg, "line", { class: "grid", x1: x(v), x2: x(v), y1: box.top, y2: box.bottom });
    add(svg, "text", { x: x(v), y: box.bottom + 19, "text-anchor": "middle" }, showX(v));
  }
  add(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  add(svg, "text", { x: box.right, y: box.bottom + 40, "text-anchor": "end" }, labelX);
  add(svg, "text", { x: 0, y: box.top - 16 }, labelY);
}
function canvas(holder, height, label) {
  const width = Math.max(280, holder.clientWidth || 900);
  const svg = add(holder, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": label });
  return [svg, width];
}

// ---- tooltip: pointer or arrow keys, the nearest of the items {x, y, lines, mark(svg)} -----------
const tip = $("#tip");
function follow(svg, items, distance, hit) {
  let at = -1, hot = null;
  function show(i) {
    if (i === at) return;
    at = i;
    hot?.remove();
    hot = null;
    tip.hidden = i < 0;
    if (i < 0) return;
    const item = items[i];
    hot = item.mark(svg);
    hot.setAttribute("class", "hot");
    tip.replaceChildren(...item.lines.map((line, n) => Object.assign(document.createElement(n ? "div" : "b"), { textContent: line })));
    const box = svg.getBoundingClientRect(), zoom = box.width / svg.viewBox.baseVal.width;
    const left = box.left + item.x * zoom, top = box.top + item.y * zoom;
    const { offsetWidth: w, offsetHeight: h } = tip;
    tip.style.left = `${scrollX + Math.max(8, Math.min(left - w / 2, document.documentElement.clientWidth - w - 8))}px`;
    tip.style.top = `${scrollY + (top - h - 14 > 4 ? top - h - 14 : top + 18)}px`;
  }
  function nearest(event) {
    const box = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * zoom, y = (event.clientY - box.top) * zoom;
    let best = -1, least = Infinity;
    items.forEach((item, i) => { const d = distance(item, x, y); if (d < least) { least = d; best = i; } });
    return best;
  }
  svg.addEventListener("pointermove", (e) => show(nearest(e)));
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("click", (e) => { const i = nearest(e); if (hit && i >= 0) hit(items[i]); });
  svg.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (e.key === "Escape") show(-1);
    if (e.key === "Enter" && hit && at >= 0) hit(items[at]);
    if (!step || !items.length) return;
    e.preventDefault();
    show((at + step + items.length) % items.length);
  });
}
const near = (radius) => (item, x, y) => { const d = Math.hypot(item.x - x, item.y - y); return d < radius ? d : Infinity; };
const circle = (x, y, r) => (svg) => add(svg, "circle", { cx: x, cy: y, r });

// ---- colours: by share of the file, so that the first colour is the main one --------------------
function palette(record, key) {
  const bytes = new Map();
  for (const row of record.rows) if (row.params || row.family === "tied") bytes.set(row[key], (bytes.get(row[key]) || 0) + row.nbytes);
  const order = [...bytes.keys()].sort((a, b) => bytes.get(b) - bytes.get(a));
  const colour = (value) => { const i = order.indexOf(value); return `var(--c${i < 0 || i > 6 ? 7 : i})`; };
  return [order, colour];
}
function legend(parent, order, colour) {
  const list = make(parent, "ul", { className: "legend" });
  for (const value of order.slice(0, 8)) {
    const swatch = document.createElement("i");
    swatch.style.background = colour(value);
    make(list, "li", {}, swatch, value || "other");
  }
}
function toggle(parent, label, options, value, change) {
  const group = make(parent, "span", { className: "toggle", role: "group", ariaLabel: label });
  for (const [key, text] of options) {
    const button = make(group, "button", { type: "button", textContent: text, ariaPressed: String(key === value) });
    button.addEventListener("click", () => {
      for (const b of group.children) b.ariaPressed = String(b === button);
      change(key);
    });
  }
}

// ---- picture 1 ------------------------------------------------------------------------------------
function scatter(holder, record) {
  const points = record.layers.filter(([, p, m]) => p > 0 && m > 0); // null > 0 is false
  const whole = record.predicted_whole > 0 && record.measured.kl_nats > 0 ? [record.predicted_whole, record.measured.kl_nats] : null;
  const [order, colour] = palette(record, "kind");
  legend(make(holder, "div", { className: "tools" }), order.filter((k) => points.some(([n]) => record.kindOf.get(n) === k)), colour);
  const [svg, width] = canvas(holder, Math.min(520, Math.max(360, holder.clientWidth * 0.55)), `Predicted against measured harm of ${points.length} tensors, nats per token, both axes logarithmic`);
  const height = svg.viewBox.baseVal.height;
  const box = { left: 62, right: width - 14, top: 34, bottom: height - 48 };
  const all = [...points.flatMap(([, p, m]) => [p, m]), ...(whole || [])];
  const x = logScale(all, box.left, box.right), y = logScale(all, box.bottom, box.top);
  const [lo, hi] = x.ends;
  const inside = (v) => Math.max(lo, Math.min(hi, v));
  const corners = [[lo, lo], [lo, lo * 2], [hi / 2, hi], [hi, hi], [hi, hi / 2], [lo * 2, lo]];
  add(svg, "path", { class: "band", d: "M" + corners.map(([a, b]) => `${x(inside(a))},${y(inside(b))}`).join("L") + "Z" });
  frame(svg, box, x, y, "predicted nats per token", "measured nats per token", tick, tick);
  add(svg, "line", { class: "ideal", x1: x(lo), y1: y(lo), x2: x(hi), y2: y(hi) });
  const items = points.map(([name, p, m]) => {
    add(svg, "circle", { class: "dot", cx: x(p), cy: y(m), r: points.length > 400 ? 3 : 5, style: `fill:${colour(record.kindOf.get(name))}` });
    return { x: x(p), y: y(m), name, lines: [name, `predicted ${nats(p)}, measured ${nats(m)}`, `measured is ${(m / p).toPrecision(3)} × predicted`], mark: circle(x(p), y(m), 8) };
  });
  if (whole) {
    const [px, py] = [x(whole[0]), y(whole[1])];
    add(svg, "path", { class: "full", d: `M${px},${py - 8}L${px + 8},${py}L${px},${py + 8}L${px - 8},${py}Z` });
    add(svg, "text", { class: "strong halo", x: px - 14, y: py + 4, "text-anchor": "end" }, "whole model");
    items.push({ x: px, y: py, lines: ["whole model", `predicted ${nats(whole[0])}, measured ${nats(whole[1])}`], mark: circle(px, py, 12) });
  }
  follow(svg, items, near(28), (item) => item.name && jump(record, item.name));
}

// ---- picture 2 ------------------------------------------------------------------------------------
function curve(holder, record, state = {}) {
  const bits = state.unit === "bits", k = bits ? 1 : 0;
  const weights = (8 * record.nbytes) / record.bits_per_weight || record.params;
  const place = (r) => (bits ? r.bits_per_weight : r.nbytes);
  const line = record.curve.filter((p) => known(p[k]) && p[2] > 0).sort((a, b) => a[0] - b[0]);
  const others = records.filter((r) => r !== record && (bits || r.params === record.params));
  const spots = [];
  const spot = (r, v, kind, error) => v > 0 && known(place(r)) && spots.push({ r, v, kind, error });
  for (const r of others) spot(r, r.measured.kl_nats ?? r.predicted_nats, "other");
  spot(record, record.predicted_nats, "ring");
  spot(record, record.measured.kl_nats, "full", record.measured.kl_nats_stderr);
  const tools = make(holder, "div", { className: "tools" });
  const again = (change) => { holder.replaceChildren(); curve(holder, record, Object.assign(state, change)); };
  toggle(tools, "Horizontal axis", [["bytes", "Bytes"], ["bits", "Bits per weight"]], state.unit || "bytes", (unit) => again({ unit }));
  toggle(tools, "Vertical axis", [["log", "Logarithmic"], ["linear", "Linear"]], state.scale || "log", (scale) => again({ scale }));
  const [svg, width] = canvas(holder, Math.min(460, Math.max(320, holder.clientWidth * 0.45)), `Predicted KL divergence against size, ${line.length} points; this file has ${size(record.nbytes)}`);
  const box = { left: 62, right: width - 22, top: 34, bottom: svg.viewBox.baseVal.height - 48 };
  const xs = [...line.map((p) => p[k]), ...spots.map((s) => place(s.r))];
  const ys = [...line.map((p) => p[2]), ...spots.map((s) => s.v)];
  if (!xs.length || !ys.length) return make(holder, "p", { className: "none", textContent: "The curve has no point that can be drawn." });
  const spread = Math.max(...xs) - Math.min(...xs) || Math.max(...xs) * 0.2;
  const x = linearScale(Math.max(0, Math.min(...xs) - spread * 0.04), Math.max(...xs) + spread * 0.04, box.left, box.right, width / 110);
  const y = state.scale === "linear" ? linearScale(0, Math.max(...ys) * 1.05, box.bottom, box.top) : logScale(ys, box.bottom, box.top);
  if (line.length) {
    const path = line.map((p) => `${x(p[k])},${y(p[2])}`).join("L");
    add(svg, "path", { class: "under", d: `M${x(line[0][k])},${box.bottom}L${path}L${x(line.at(-1)[k])},${box.bottom}Z` });
    frame(svg, box, x, y, bits ? "bits per weight" : "bytes of the file", "nats per token", bits ? String : size, state.scale === "linear" ? nats : tick);
    add(svg, "path", { class: "curve", d: `M${path}` });
  } else frame(svg, box, x, y, bits ? "bits per weight" : "bytes of the file", "nats per token", bits ? String : size, tick);
  const asked = known(record.budget_nbytes) ? (bits ? (8 * record.budget_nbytes) / weights : record.budget_nbytes) : null;
  if (asked && asked >= x.ends[0] && asked <= x.ends[1]) {
    const late = x(asked) > (box.left + box.right) / 2;
    add(svg, "line", { class: "budget", x1: x(asked), x2: x(asked), y1: box.top, y2: box.bottom });
    add(svg, "text", { class: "halo", x: x(asked) + (late ? -8 : 8), y: box.bottom - 10, "text-anchor": late ? "end" : "start" }, `budget ${size(record.budget_nbytes)}`);
  }
  const items = line.map((p) => ({ x: x(p[k]), y: y(p[2]), lines: [size(p[0]), `${nats(p[1])} bits per weight`, `predicted ${nats(p[2])} nats`], mark: circle(x(p[k]), y(p[2]), 5) }));
  for (const { r, v, kind, error } of spots) {
    const [px, py] = [x(place(r)), y(v)];
    if (error > 0 && v > error) for (const sign of [-1, 1]) add(svg, "line", { class: "error", x1: px, x2: px, y1: py, y2: y(v + sign * error) });
    add(svg, "circle", { class: kind, cx: px, cy: py, r: { ring: 8.5, full: 4.5, other: 5.5 }[kind] });
    const words = { ring: "predicted", full: `measured ${nats(v)}`, other: r.name }[kind];
    if (kind !== "ring") {
      const before = px + 7.5 * words.length > box.right; // the curve falls: free above right and below left
      add(svg, "text", { class: "strong halo", x: px + (before ? -12 : 12), y: py + (before ? 19 : -9), "text-anchor": before ? "end" : "start" }, words);
    }
    items.push({ x: px, y: py, lines: [r.name, `${size(r.nbytes)}, ${nats(r.bits_per_weight)} bits per weight`, `${kind === "ring" || !known(r.measured.kl_nats) ? "predicted" : "measured"} ${nats(v)} nats${error ? ` ± ${nats(error)}` : ""}`], mark: circle(px, py, 10) });
  }
  follow(svg, items, near(40));
}

// ---- picture 3: one path per colour, so that ten thousand bars stay light --------------------------
function bars(holder, record, state = {}) {
  const rows = record.rows.filter((r) => r.params > 0 && r.nbytes > 0);
  if (!rows.length) return make(holder, "p", { className: "none", textContent: "No tensor takes bytes of its own." });
  const key = state.key || "kind", area = state.width !== "equal";
  const [order, colour] = palette(record, key);
  const tools = make(holder, "div", { className: "tools" });
  const again = (change) => { holder.replaceChildren(); bars(holder, record, Object.assign(state, change)); };
  toggle(tools, "Width of a bar", [["area", "Area is bytes"], ["equal", "Equal width"]], state.width || "area", (v) => again({ width: v }));
  toggle(tools, "Colour", [["kind", "By kind"], ["family", "By codec"]], key, (v) => again({ key: v }));
  legend(tools, order, colour);
  const [svg, width] = canvas(holder, 300, `Bits per weight of ${rows.length} tensors in the order of the model`);
  const box = { left: 40, right: width - 4, top: 34, bottom: 300 - 46 };
  const params = rows.reduce((s, r) => s + r.params, 0);
  // Norms and biases are kept at 16 or 32 bits; were the axis to reach them, the rest would be a stripe.
  const large = rows.filter((r) => r.params >= (0.2 * params) / rows.length);
  const high = large.reduce((m, r) => Math.max(m, r.bits_per_weight), 0) * 1.12;
  const y = linearScale(0, high, box.bottom, box.top, 5);
  frame(svg, box, null, y, "", "bits per weight", null, String);
  const paths = new Map(), items = [], blocks = [];
  let at = box.left, cut = 0;
  const gap = rows.length < 200 && !area ? 1 : 0;
  for (const row of rows) {
    const w = (box.right - box.left) * (area ? row.params / params : 1 / rows.length);
    const top = y(Math.min(row.bits_per_weight, high)), seam = area && w > 5 ? 1 : gap;
    cut += row.bits_per_weight > high;
    const d = `M${at.toFixed(2)},${box.bottom}V${top.toFixed(2)}h${(w - seam).toFixed(2)}V${box.bottom}Z`;
    paths.set(row[key], (paths.get(row[key]) || "") + d);
    const block = /(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\./.exec(row.name)?.[1];
    if (block !== undefined && blocks.at(-1)?.block !== block) blocks.push({ block, from: at, to: at });
    if (block !== undefined) blocks.at(-1).to = at + w;
    const [x0, t, span] = [at, top, Math.max(w - seam, 1)];
    items.push({
      x: at + w / 2, y: top, from: at, to: at + w, name: row.name,
      lines: [row.name, `${row.family}, ${nats(row.bits_per_weight)} bits × ${count(row.params)} = ${size(row.nbytes)}`, ...(row.why ? [row.why] : [])],
      mark: (s) => add(s, "rect", { x: x0, y: t, width: span, height: box.bottom - t }),
    });
    at += w;
  }
  for (const [value, d] of paths) add(svg, "path", { d, style: `fill:${colour(value)}` });
  const room = (box.right - box.left) / Math.max(blocks.length, 1);
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((n) => n * room > 34) || 1000;
  for (const { block, from, to } of blocks) {
    if (room > 5 || block % every === 0) add(svg, "line", { class: "axis", x1: from, x2: from, y1: box.bottom, y2: box.bottom + 6 });
    if (block % every === 0) add(svg, "text", { x: (from + to) / 2, y: box.bottom + 20, "text-anchor": "middle" }, block);
  }
  add(svg, "text", { x: box.right, y: box.bottom + 40, "text-anchor": "end" }, blocks.length ? "block" : "tensors in order");
  if (cut) add(svg, "text", { x: box.right, y: box.top - 14, "text-anchor": "end" }, `${count(cut)} small tensors reach beyond the top`);
  follow(svg, items, (item, x) => (x >= item.from && x <= item.to ? 0 : Infinity), (item) => jump(record, item.name));
}

// ---- the ledger -----------------------------------------------------------------------------------
function jump(record, name) {
  const row = record.lines?.get(name);
  if (!row) return;
  row.hidden = false; // it may be filtered out, or beyond the rows shown
  row.scrollIntoView({ block: "center" });
  row.classList.add("hit");
  setTimeout(() => row.classList.remove("hit"), 2500);
}
const PAGE = 400; // rows laid out at once: ten thousand take seconds, and nobody reads them all
function ledger(table, record) {
  const body = table.tBodies[0], lines = [...body.rows];
  const texts = record.rows.map((r) => `${r.name} ${r.kind} ${r.codec} ${r.why}`.toLowerCase());
  record.lines = new Map(record.rows.map((r, i) => [r.name, lines[i]]));
  const form = $("form", table.closest("section"));
  const [search, select, said] = [$("input", form), $("select", form), $("output", form)];
  const more = make(table.closest("section"), "button", { type: "button", className: "quiet more" });
  let order = lines.map((_, i) => i), limit = PAGE;
  function show(all = false) {
    const wanted = search.value.trim().toLowerCase().split(/\s+/), kind = select.value;
    let fit = 0, bytes = 0;
    for (const i of order) {
      const fits = (!kind || record.rows[i].kind === kind) && wanted.every((w) => texts[i].includes(w));
      lines[i].hidden = !fits || (fit >= limit && !all);
      if (fits) { fit++; bytes += record.rows[i].nbytes || 0; }
    }
    said.textContent = fit === lines.length ? "" : `${count(fit)} of ${count(lines.length)} rows, ${count(bytes)} bytes`;
    more.hidden = fit <= limit;
    more.textContent = `Show all ${count(fit)} rows`;
  }
  const value = (r, key) => (key === "shape" ? r.params : r[key]);
  const natural = new Intl.Collator("en", { numeric: true }).compare;
  const compare = (a, b) => (known(a) || known(b) ? (a ?? -Infinity) - (b ?? -Infinity) || 0 : natural(String(a ?? ""), String(b ?? "")));
  for (const button of $$("thead button", table)) button.addEventListener("click", () => {
    const head = button.parentElement, key = button.dataset.key;
    const up = head.ariaSort ? head.ariaSort === "descending" : !head.classList.contains("n");
    for (const h of head.parentElement.children) h.removeAttribute("aria-sort");
    head.ariaSort = up ? "ascending" : "descending";
    const values = record.rows.map((r) => value(r, key));
    order = lines.map((_, i) => i).sort((i, k) => (up ? 1 : -1) * compare(values[i], values[k]) || i - k);
    show();
    body.remove(); // moving rows is far quicker while nobody looks
    body.append(...order.map((i) => lines[i]));
    table.tHead.after(body);
  });
  form.hidden = false;
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("input", () => show());
  more.addEventListener("click", () => { limit = Infinity; show(); });
  addEventListener("beforeprint", () => show(true));
  addEventListener("afterprint", () => show());
  show();
}

// ---- the page ---------------------------------------------------------------------------------------
const root = document.documentElement, button = $("#theme"), dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
const remember = (theme) => { try { if (theme) localStorage.setItem("theme", theme); else return localStorage.getItem("theme"); } catch { return null; } };
if (["light", "dark"].includes(remember())) root.dataset.theme = remember();
button.hidden = false;
button.addEventListener("click", () => { remember((root.dataset.theme = isDark() ? "light" : "dark")); label(); });
dark.addEventListener("change", label);
label();
for (const copy of $$(".copy")) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    const code = copy.previousElementSibling;
    try { await navigator.clipboard.writeText(code.textContent); copy.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(code); copy.textContent = "Selected"; }
    setTimeout(() => { copy.textContent = "Copy"; }, 1600);
  });
}
for (const table of $$("table.ledger")) ledger(table, records[table.dataset.record]);
const pictures = { scatter, curve, bits: bars };
const states = new Map();
function draw(holder) {
  if (!states.has(holder)) states.set(holder, {});
  tip.hidden = true;
  holder.replaceChildren();
  pictures[holder.dataset.chart](holder, records[holder.dataset.record], states.get(holder));
}
for (const holder of $$(".chart")) draw(holder);
let width = innerWidth;
addEventListener("resize", () => {
  // Phones resize the window whenever their address bar slides; only a new width redraws.
  if (innerWidth === width) return;
  width = innerWidth;
  for (const holder of $$(".chart")) draw(holder);
});
})();
