"use strict";
// Draws the charts of a page from the JSON in it: `figure[data-chart]` names the chart.

const page = JSON.parse(document.getElementById("data").textContent);
const charts = {};

// ---- Comparison: how close to backprop

const isRole = (role) => (arm) => arm.rule === role;

charts.closeness = (figure) => {
  const said = page.score.name + (page.score.unit ? ` (${page.score.unit})` : "");
  const names = {
    recovery: ["Recovery", "recovered of backprop's gain over frozen hidden layers (%)"],
    score: [said, said],
    difference: ["Difference to backprop", `${said}: arm − backprop, paired by seed`],
    equal_cost: ["At equal cost", `${said} when as much is spent as backprop spends`],
  };
  const there = Object.keys(names).filter((mode) => page.arms.some((arm) => arm.values[mode]));
  let mode = there.includes(page.start) ? page.start : there[0];
  if (there.length > 1) {
    const options = there.map((name) => [name, names[name][0]]);
    figure.querySelector(".controls").append(oneOf("", options, mode, (value) => { mode = value; figure.redraw(); }));
  }
  return (width) => (mode ? closeness(width, mode, names[mode][1]) : element("p", { class: "note" }, "no score yet"));
};

function closeness(width, mode, axis) {
  const better = page.score.better === "lower" && mode !== "recovery" ? 1 : -1;
  const isEnd = (arm) => isRole("backprop")(arm) || isRole("frozen")(arm);
  const rows = page.arms
    .filter((arm) => arm.values[mode] && !(mode === "recovery" && isEnd(arm)) && !(mode === "difference" && isRole("backprop")(arm)))
    .map((arm) => ({ name: arm.name, control: arm.control, ...arm.values[mode] }))
    .sort((a, b) => better * (a.mean - b.mean));
  const lines = { recovery: [[0, "frozen"], [100, "backprop"]], difference: [[0, "backprop"]] }[mode] ??
    page.arms.filter((arm) => isEnd(arm) && arm.values.score).map((arm) => [arm.values.score.mean, isRole("frozen")(arm) ? "frozen" : "backprop"]);
  const narrow = width < 620, height = narrow ? 38 : 24;
  const longest = d3.max(rows, (row) => row.name.length) ?? 0;
  const chars = Math.min(longest, 40);
  const marginLeft = narrow ? 4 : Math.max(90, chars * 6.9 + 12), marginRight = narrow ? 12 : 170;

  // an interval of few seeds may be wider than all means together, and a recovery beyond all
  // measure where frozen comes near backprop: what is outside is cut off, its label is not
  const ends = [...rows.map((row) => row.mean), ...lines.map(([at]) => at)];
  const span = (d3.max(ends) - d3.min(ends) || Math.abs(ends[0]) || 1) * 0.35;
  const reach = rows.flatMap((row) => row.interval ?? []);
  const [least, most] = mode === "recovery" ? [-100, 200] : [-Infinity, Infinity];
  const low = Math.max(least, d3.min(ends) - span, d3.min([...ends, ...reach]));
  const high = Math.min(most, d3.max(ends) + span, d3.max([...ends, ...reach]));
  const pad = (high - low) * 0.03 || 1;
  const domain = [mode === "recovery" && low >= 0 ? 0 : low - pad, high + pad];
  const colour = (row) => (row.control ? "var(--control)" : "var(--bar)");
  const dy = narrow ? 9 : 0, inset = narrow ? 24 : 5;
  const labelled = d3.sort(lines.filter(([at]) => at >= domain[0] && at <= domain[1]), ([at]) => at);
  const near = labelled.length === 2 && Math.abs(labelled[0][0] - labelled[1][0]) / (domain[1] - domain[0]) < 0.2;
  const plot = Plot.plot({
    width, height: rows.length * height + 70, marginLeft, marginRight, marginTop: 28, marginBottom: 42, style: bare,
    x: { domain, label: axis, labelAnchor: "center", labelArrow: "none", ticks: Math.max(3, Math.min(8, width / 110)), grid: true },
    y: { domain: rows.map((row) => row.name), axis: null, padding: 0 },
    marks: [
      Plot.ruleX(lines, { x: "0", stroke: "var(--soft)", strokeDasharray: "4 3" }),
      ...labelled.map((line, i) => Plot.text([line], {
        x: "0", text: "1", frameAnchor: "top", dy: -14, dx: near ? 6 * i - 3 : 0, fill: "var(--soft)",
        textAnchor: near ? ["end", "start"][i] : "middle",
      })),
      mode === "recovery"
        ? Plot.barX(rows, { x1: 0, x2: "mean", y: "name", fill: colour, insetTop: inset, insetBottom: 5, clip: true, className: "means" })
        : null,
      Plot.ruleY(rows.filter((row) => row.interval), {
        x1: (row) => row.interval[0], x2: (row) => row.interval[1], y: "name", stroke: "var(--ink)",
        strokeWidth: 1.5, dy, clip: true, className: "intervals",
      }),
      mode === "recovery"
        ? null
        : Plot.dot(rows, { x: "mean", y: "name", r: 4.5, fill: colour, dy, className: "means" }),
      Plot.text(rows.filter((row) => row.mean < domain[0]), { x: domain[0], y: "name", text: () => "‹ off the axis", textAnchor: "start", dx: 6, dy, fill: "var(--card)" }),
      narrow
        ? Plot.text(rows, { x: domain[0], y: "name", text: (row) => shorten(row.name, Math.floor((width - 150) / 6.8)), textAnchor: "start", dy: -8, title: "name", fill: "var(--ink)", ...halo })
        : Plot.text(rows, { x: domain[0], y: "name", text: (row) => shorten(row.name, 40), textAnchor: "end", dx: -8, title: "name" }),
      Plot.text(rows, {
        x: domain[1], y: "name", text: "label", textAnchor: narrow ? "end" : "start", dx: narrow ? 0 : 8,
        dy: narrow ? -8 : 0, fill: "var(--soft)", fontVariant: "tabular-nums", ...halo,
      }),
    ],
  });
  return plot;
}

// ---- Comparison: curves

charts.curves = (figure) => {
  const hasScore = page.arms.some((arm) => arm.curves.some((curve) => curve.score.some((v) => v !== null)));
  const costed = page.arms.some((arm) => arm.relative), timed = page.arms.some((arm) => arm.seconds);
  const state = { y: hasScore ? "score" : "loss", x: "steps", logX: false, logY: false };
  const shown = new Map(); // arms by their slot: what is chosen has a colour
  const drawn = page.arms.filter((arm) => arm.curves.length);
  const free = () => d3.range(999).find((slot) => ![...shown.values()].includes(slot));
  const first = drawn.filter((arm) => arm.rule !== "backprop" && arm.rule !== "frozen" && !arm.control);
  for (const arm of first.slice(0, 6)) shown.set(arm, free());

  const set = (change) => (value) => { change(value); figure.redraw(); };
  const controls = figure.querySelector(".controls");
  if (hasScore)
    controls.append(oneOf("Show", [["score", page.score.name], ["loss", "loss"]], state.y, set((v) => (state.y = v))));
  const axes = [["steps", "steps"], ...(costed ? [["cost", "cost"]] : []), ...(timed ? [["time", "time"]] : [])];
  if (axes.length > 1) controls.append(oneOf("against", axes, state.x, set((v) => (state.x = v))));
  const logs = element("div", { class: "group" }, element("span", {}, "log"));
  logs.append(onOff("x", false, set((on) => (state.logX = on))), onOff("y", false, set((on) => (state.logY = on))));
  controls.append(logs);

  const chips = element("div", { class: "group", role: "group", "aria-label": "arms" });
  controls.append(chips);
  for (const arm of drawn) {
    const swatch = d3.create("svg").attr("width", 18).attr("height", 8);
    const line = swatch.append("line").attr("x2", 18).attr("y1", 4).attr("y2", 4).attr("stroke-width", 2.5);
    const paint = () => {
      const style = look(arm, shown);
      line.attr("stroke", style.colour).attr("stroke-dasharray", style.dash);
    };
    if (isRole("backprop")(arm) || isRole("frozen")(arm)) {
      paint();
      chips.append(element("span", { class: "group", style: "padding: 2px 8px; color: var(--ink)" }, swatch.node(), arm.name));
      continue;
    }
    const chip = onOff(swatch.node(), shown.has(arm), (on) => {
      if (on) shown.set(arm, free());
      else shown.delete(arm);
      paint();
      figure.redraw();
    });
    chip.append(arm.name);
    chips.append(chip);
    paint();
  }
  return (width) => curves(width, state, drawn, shown);
};

function look(arm, shown) {
  if (arm.rule === "backprop") return { colour: "var(--ink)", dash: "none", width: 2.5, front: true };
  if (arm.rule === "frozen") return { colour: "var(--soft)", dash: "6 4", width: 2, front: true };
  if (shown.has(arm)) return { ...slotStyle(shown.get(arm)), width: 2, front: true };
  return { colour: "var(--faint)", dash: "none", width: 1, front: false };
}

function curves(width, state, drawn, shown) {
  const factor = (arm) => ({ steps: 1, cost: arm.relative, time: arm.seconds })[state.x];
  const usable = drawn.filter((arm) => factor(arm));
  const marks = [], ends = [], points = [];
  const positive = (list) => list.map((p) => ((state.logY && p.y <= 0) || (state.logX && p.x <= 0) ? { x: p.x, y: NaN } : p));
  const order = [...usable].sort((a, b) => look(a, shown).front - look(b, shown).front);
  for (const arm of order) {
    const style = look(arm, shown);
    const line = (list, extra) => Plot.line(list, { x: "x", y: "y", stroke: style.colour, strokeDasharray: style.dash, clip: true, ...extra });
    if (style.front)
      for (const curve of arm.curves)
        if (arm.curves.length > 1)
          marks.push(line(positive(zip(curve.steps, curve[state.y], factor(arm))), { strokeWidth: 0.8, strokeOpacity: 0.3, strokeDasharray: "none", className: "seed" }));
    const mean = positive(zip(arm.average.steps, arm.average[state.y], factor(arm)));
    marks.push(line(mean, { strokeWidth: style.width, strokeOpacity: style.front ? 1 : 0.8, className: `mean mean-${page.arms.indexOf(arm)}` }));
    for (const p of mean) if (Number.isFinite(p.y)) points.push({ ...p, arm });
    const last = mean.findLast((p) => Number.isFinite(p.y));
    if (last && style.front) ends.push({ ...last, text: shorten(arm.name, 26), title: arm.name, colour: style.colour });
  }
  const unit = { steps: "steps", cost: "cost (steps of backprop that cost as much)", time: "time (s)" }[state.x];
  const what = state.y === "loss" ? "loss" : `${page.score.name}${page.score.unit ? ` (${page.score.unit})` : ""}`;
  const wide = width >= 720, marginRight = wide ? 200 : 12, height = Math.max(wide ? 400 : 300, ends.length * 14 + 80);
  const valid = points.map((p) => p.y);
  const every = usable.filter((arm) => look(arm, shown).front).flatMap((arm) => arm.curves.flatMap((c) => c[state.y].filter((v) => v !== null && (!state.logY || v > 0))));
  // one diverged arm must not press all others flat: what is far above the rest is cut off
  const all = d3.sort([...valid, ...every]);
  let domain = all.length ? [all[0], all[all.length - 1]] : [0, 1];
  const cut = state.y === "loss" && !state.logY && all.length ? d3.quantile(all, 0.9) * 2.5 : Infinity;
  if (domain[1] > cut) domain = [domain[0], cut];
  if (domain[0] === domain[1]) domain = state.logY ? [domain[0] / 2, domain[0] * 2] : [domain[0] - 0.5, domain[1] + 0.5];
  const plot = Plot.plot({
    width, height, marginLeft: 52, marginRight, marginTop: 26, marginBottom: 40, style: bare,
    x: { type: state.logX ? "log" : "linear", label: unit, labelAnchor: "center", labelArrow: "none", grid: false, ticks: state.logX ? 4 : Math.max(3, width / 140), tickFormat: state.logX ? logFormat : undefined },
    y: { type: state.logY ? "log" : "linear", domain, nice: !state.logY, label: what, labelArrow: "none", grid: true, ticks: state.logY ? 5 : 7, tickFormat: state.logY ? logFormat : undefined },
    marks: [
      page.chance !== null && state.y === "score" && page.chance >= domain[0] && page.chance <= domain[1]
        ? [Plot.ruleY([page.chance], { stroke: "var(--faint)", strokeDasharray: "2 3" }), Plot.text([page.chance], { y: (d) => d, text: () => "chance", frameAnchor: "right", dy: -6, dx: -2, fill: "var(--soft)" })]
        : null,
      ...marks,
      Plot.tip(points, Plot.pointer({
        x: "x", y: "y", ...tipStyle, maxRadius: 30,
        title: (p) => `${p.arm.name}\n${what}: ${short(p.y)}\n${state.x === "steps" ? "step" : state.x}: ${short(p.x)}`,
      })),
    ],
  });
  if (wide) endLabels(plot, ends);
  return plot;
}

// ---- Comparison: gradients along training

const SCALES = {
  cosine: {
    label: "Cosine with the exact gradient",
    at: [-0.5, -0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99],
    colours: ["--n2", "--n1", "--z", "--p1", "--p2", "--p3", "--p4", "--p5", "--p6"],
  },
  ratio: {
    label: "Its norm ÷ that of the exact one",
    at: [0.125, 0.5, 0.8, 1.25, 2, 8],
    colours: ["--n2", "--n1", "--z", "--z", "--z", "--p3", "--p5"],
  },
};
SCALES.ratio.colours = ["--n2", "--n1", "--p1", "--z", "--p2", "--p4", "--p6"];
const audit = { value: "cosine" };

charts.audit = (figure) => {
  const arm = page.arms[Number(figure.dataset.arm)];
  return (width) => {
    const cells = arm.audit.flatMap(({ step, groups }) => groups.map((g) => ({ step, ...g })));
    const names = [...new Set(cells.map((cell) => cell.name))];
    const steps = [...new Set(cells.map((cell) => cell.step))];
    const last = cells.filter((cell) => cell.step === steps[steps.length - 1]);
    const scale = SCALES[audit.value];
    const chars = Math.min(20, d3.max(names, (name) => name.length));
    const marginLeft = chars * 6.4 + 10, marginRight = 44;
    const every = Math.ceil((steps.length * 38) / (width - marginLeft - marginRight));
    const plot = Plot.plot({
      width, height: names.length * 17 + 42, marginLeft, marginRight, marginTop: 2, marginBottom: 38, style: { ...bare, fontSize: "11px" },
      x: { type: "band", domain: steps, label: "step", labelAnchor: "center", labelArrow: "none", tickFormat: d3.format("~s"), ticks: steps.filter((_, i) => i % every === 0), padding: 0.04, tickSize: 3 },
      y: { type: "band", domain: names, label: null, tickFormat: (name) => shortenStart(name, 20), tickSize: 0, padding: 0.08 },
      color: { type: "threshold", domain: scale.at, range: scale.colours.map((name) => `var(${name})`) },
      marks: [
        Plot.cell(cells, { x: "step", y: "name", fill: (cell) => cell[audit.value] ?? NaN, className: "cells" }),
        Plot.text(last, { y: "name", text: (cell) => (cell[audit.value] === null ? "–" : audit.value === "cosine" ? d3.format(".2f")(cell.cosine).replace("-", "−") : d3.format(".3~r")(cell.ratio)), frameAnchor: "right", textAnchor: "start", dx: 6, fill: "var(--ink)" }),
        Plot.tip(cells, Plot.pointer({ x: "step", y: "name", ...tipStyle, title: (c) => `${c.name}, step ${c.step}\ncosine ${short(c.cosine)}\nnorm ratio ${short(c.ratio)}` })),
      ],
    });
    return element("div", {}, element("h3", {}, arm.name), plot);
  };
};

function auditControls() {
  const place = document.getElementById("audit-controls");
  if (!place) return;
  const key = element("div", { class: "key" });
  const paint = () => {
    const { at, colours } = SCALES[audit.value];
    key.replaceChildren();
    colours.forEach((colour, i) => {
      key.append(element("i", { style: `background: var(${colour})` }));
      if (i < at.length) key.append(element("b", {}, short(at[i])));
    });
  };
  const options = Object.entries(SCALES).map(([name, { label }]) => [name, label]);
  place.append(oneOf("", options, audit.value, (value) => {
    audit.value = value;
    paint();
    for (const figure of document.querySelectorAll("figure[data-chart=audit]")) figure.redraw();
  }), key);
  paint();
}

// ---- Comparison: the search for a rate

charts.rates = (figure) => {
  const shades = ["--p1", "--p2", "--p3", "--p4", "--p5", "--p6"];
  const key = element("div", { class: "key" }, element("b", {}, "worse"));
  for (const shade of shades) key.append(element("i", { style: `background: var(${shade})` }));
  key.append(element("b", {}, "better, within the arm"));
  figure.querySelector(".controls").append(key);
  return (width) => rates(width, shades);
};

function rates(width, shades) {
  const sign = page.score.better === "lower" ? -1 : 1;
  const rows = page.arms.filter((arm) => arm.rates.length);
  const tried = rows.flatMap((arm) => {
    const [worst, best] = d3.extent(arm.rates.filter((r) => !r.failed && r.score !== null), (r) => sign * r.score);
    return arm.rates.map((rate) => {
      const part = rate.failed || rate.score === null ? null : best === worst ? 1 : (sign * rate.score - worst) / (best - worst);
      return { ...rate, part, arm: arm.name, chosen: rate.lr === arm.lr };
    });
  });
  const narrow = width < 620;
  const chars = Math.min(d3.max(rows, (arm) => arm.name.length), narrow ? 18 : 40);
  const [least, most] = d3.extent(tried, (rate) => rate.lr);
  const domain = [least / 1.5, most * 1.5];
  return Plot.plot({
    width, height: rows.length * 22 + 52, marginLeft: chars * 6.9 + 14, marginRight: 16, marginTop: 6, marginBottom: 42, style: bare,
    x: { type: "log", domain, label: "learning rate", labelAnchor: "center", labelArrow: "none", tickFormat: logFormat, ticks: logTicks(domain), grid: true },
    y: { type: "band", domain: rows.map((arm) => arm.name), label: null, tickSize: 0, tickFormat: (name) => shorten(name, chars) },
    marks: [
      Plot.dot(tried.filter((rate) => rate.chosen), { x: "lr", y: "arm", r: 8.5, stroke: "var(--ink)", strokeWidth: 1.5 }),
      Plot.dot(tried.filter((rate) => rate.part !== null), { x: "lr", y: "arm", r: 5.5, fill: (rate) => `var(${shades[Math.min(5, Math.floor(rate.part * 6))]})`, className: "tried" }),
      Plot.dot(tried.filter((rate) => rate.part === null), { x: "lr", y: "arm", r: 4, symbol: "times", stroke: "var(--bad)", strokeWidth: 1.8 }),
      Plot.tip(tried, Plot.pointer({ x: "lr", y: "arm", ...tipStyle, title: (rate) => `${rate.arm}\nrate ${short(rate.lr)}: ${rate.part === null ? "failed" : `${short(rate.score)} ${page.score.unit}`}${rate.chosen ? ", chosen" : ""}` })),
    ],
  });
}

// ---- Run: what was measured step by step

charts.series = (figure) => {
  const panel = page.panels[Number(figure.dataset.panel)];
  let log = panel.log;
  const controls = figure.querySelector(".controls");
  const key = element("div", { class: "group" });
  panel.lines.forEach((line) => {
    const swatch = d3.create("svg").attr("width", 18).attr("height", 8);
    swatch.append("line").attr("x2", 18).attr("y1", 4).attr("y2", 4).attr("stroke-width", 2.5).attr("stroke", `var(${line.colour})`);
    key.append(element("span", { class: "group", style: "color: var(--ink); padding-right: 8px" }, swatch.node(), line.name));
  });
  controls.append(element("strong", {}, panel.title), key);
  const possible = panel.lines.some((line) => line.values.some((v) => v > 0));
  if (possible) controls.append(element("div", { class: "group" }, onOff("log y", log, (on) => { log = on; figure.redraw(); })));
  return (width) => {
    const points = panel.lines.flatMap((line) =>
      zip(line.steps, line.values).map((p) => ({ ...p, line, y: log && p.y <= 0 ? NaN : p.y })));
    const seen = points.filter((p) => Number.isFinite(p.y));
    const wide = width >= 560, marginRight = wide ? 92 : 14;
    const plot = Plot.plot({
      width, height: panel.height, marginLeft: 56, marginRight, marginTop: 24, marginBottom: 38, style: bare,
      x: { domain: page.domain, label: "step", labelAnchor: "center", labelArrow: "none", ticks: Math.max(3, width / 140) },
      y: { type: log && seen.length ? "log" : "linear", label: panel.unit, labelArrow: "none", grid: true, nice: !log, zero: panel.zero && !log, ticks: log ? 5 : 6, tickFormat: log ? logFormat : undefined },
      marks: [
        ...panel.lines.map((line, i) => Plot.line(points.filter((p) => p.line === line), {
          x: "x", y: "y", stroke: `var(${line.colour})`, strokeWidth: line.sparse ? 2 : 0.9,
          marker: line.sparse ? "dot" : undefined, className: `line line-${i}`,
        })),
        Plot.dot(zip(panel.doubts.steps, panel.doubts.values), { x: "x", y: "y", symbol: "times", r: 5, stroke: "var(--bad)", strokeWidth: 2 }),
        Plot.tickX(panel.refused, { x: (d) => d, y: undefined, stroke: "var(--bad)", insetBottom: panel.height - 74 }),
        Plot.tip(seen, Plot.pointer({ x: "x", y: "y", ...tipStyle, title: (p) => `${p.line.name}: ${short(p.y)}\nstep ${short(p.x)}` })),
      ],
    });
    if (wide) {
      const ends = panel.lines.map((line) => [line, seen.filter((p) => p.line === line).at(-1)]).filter(([, p]) => p);
      endLabels(plot, ends.map(([line, p]) => ({ ...p, text: short(p.y), title: line.name, colour: `var(${line.colour})` })));
    }
    return plot;
  };
};

// ---- Tables that are sorted by a click on a head

function sortable(table) {
  const value = (cell) => {
    const text = cell.textContent.replace(/−/g, "-").replace(/,/g, "");
    const found = /^[+-]?[\d.]+(e[+-]?\d+)?/.exec(text);
    const scale = { k: 1e3, M: 1e6, G: 1e9, ms: 1e-3, µs: 1e-6 }[(/^[+-]?[\d.]+ (k|M|G|ms|µs)/.exec(text) ?? [])[1]] ?? 1;
    return found ? Number(found[0]) * scale : NaN;
  };
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const compare = (a, b) => {
        const [x, y] = [a.cells[column], b.cells[column]];
        const [p, q] = [value(x), value(y)];
        if (column === 0) return x.textContent.localeCompare(y.textContent) * (down ? -1 : 1);
        if (Number.isNaN(p) || Number.isNaN(q)) return Number.isNaN(p) - Number.isNaN(q);
        return down ? q - p : p - q;
      };
      table.tBodies[0].append(...rows.sort(compare));
    };
    head.onclick = sort;
    head.onkeydown = (event) => { if (event.key === "Enter") sort(); };
  });
}

// ---- Start: a chart is drawn when it comes near, and again when its width changes

function mount(figure) {
  const draw = charts[figure.dataset.chart](figure);
  const place = figure.querySelector(".drawing");
  let width = 0;
  figure.redraw = () => {
    if (!width) return;
    figure.plot = draw(width);
    place.replaceChildren(figure.plot);
  };
  figure.show = () => {
    width = place.clientWidth;
    figure.redraw();
  };
  const resized = new ResizeObserver(() => {
    if (Math.abs(place.clientWidth - width) > 1) requestAnimationFrame(figure.show);
  });
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    figure.show();
    resized.observe(place);
  }, { rootMargin: "600px" }).observe(figure);
}

for (const figure of document.querySelectorAll("figure[data-chart]")) mount(figure);
for (const table of document.querySelectorAll("table.sortable")) sortable(table);
auditControls();
window.onbeforeprint = () => {
  for (const figure of document.querySelectorAll("figure[data-chart]")) if (!figure.plot) figure.show();
};
