"use strict";
// What the charts share. Colours are CSS variables, so that a chart follows the colour scheme
// without being drawn again; every text is set as text, never as HTML.

const SLOTS = 8; // colours of --s0, --s1, ...; the next eight arms take them again, dashed
const slotStyle = (slot) => ({
  colour: `var(--s${slot % SLOTS})`,
  dash: ["none", "5 3", "2 2"][Math.floor(slot / SLOTS) % 3],
});

const element = (name, properties = {}, ...inside) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...inside);
  return node;
};

// Buttons of which one is pressed.
function oneOf(label, options, chosen, choose) {
  const group = element("div", { class: "group", role: "group", "aria-label": label });
  if (label) group.append(element("span", {}, label));
  for (const [value, text] of options) {
    const press = () => {
      for (const button of group.querySelectorAll("button"))
        button.setAttribute("aria-pressed", button === own);
      choose(value);
    };
    const own = element("button", { type: "button", "aria-pressed": value === chosen, onclick: press }, text);
    group.append(own);
  }
  return group;
}

// A button that is pressed or not.
function onOff(text, pressed, change) {
  const button = element("button", { type: "button", "aria-pressed": pressed }, text);
  button.onclick = () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", now);
    change(now);
  };
  return button;
}

// A number for a tip: four digits, and a minus sign that is one.
const short = (value) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? d3.format(".2e")(value) : d3.format(",.4~r")(value);
  return text.replace(/-/g, "−");
};

const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const shortenStart = (text, most) => (text.length > most ? `…${text.slice(1 - most)}` : text);
const bare = { background: "none", color: "var(--ink)", fontSize: "12px" };
const halo = { stroke: "var(--card)", strokeWidth: 4 };
const tipStyle = { fill: "var(--card)", stroke: "var(--faint)" };

// Ticks that are whole decades, or those of the scale itself where there are none.
const logTicks = ([low, high]) => {
  const decades = d3.range(Math.ceil(Math.log10(low)), Math.floor(Math.log10(high)) + 1).map((e) => 10 ** e);
  const every = Math.ceil(decades.length / 6);
  return decades.length > 1 ? decades.filter((_, i) => i % every === 0) : undefined;
};
const logFormat = (value) => (value >= 1e-3 && value < 1e5 ? d3.format(",~r")(value) : d3.format(".0~e")(value).replace("-", "−"));

// Pairs of a step and a value; a value that is none is a gap in the line.
const zip = (steps, values, scale = 1) =>
  steps.map((step, i) => ({ x: step * scale, y: values[i] === null ? NaN : values[i] }));

// Labels behind the ends of lines, moved apart where they would overlap.
function endLabels(plot, labels) {
  const y = plot.scale("y"), x = plot.scale("x"), gap = 14;
  const placed = labels
    .filter((label) => Number.isFinite(y.apply(label.y)))
    .map((label) => ({ ...label, at: y.apply(label.y) }))
    .sort((a, b) => a.at - b.at);
  const [bottom, top] = y.range;
  for (let i = 1; i < placed.length; i++) placed[i].at = Math.max(placed[i].at, placed[i - 1].at + gap);
  const over = placed.length ? placed[placed.length - 1].at - bottom : 0;
  if (over > 0) placed[placed.length - 1].at -= over;
  for (let i = placed.length - 2; i >= 0; i--) placed[i].at = Math.min(placed[i].at, placed[i + 1].at - gap);
  d3.select(plot).append("g").attr("class", "ends").attr("font-size", 12).attr("text-anchor", "start")
    .attr("stroke", "var(--card)").attr("stroke-width", 3).attr("paint-order", "stroke")
    .selectAll("text").data(placed).join("text")
    .attr("x", (d) => x.apply(d.x) + 8).attr("y", (d) => d.at).attr("dy", "0.32em").attr("fill", (d) => d.colour)
    .text((d) => d.text)
    .append("title").text((d) => d.title ?? d.text);
}
