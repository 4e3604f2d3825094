// Drawing in SVG: elements, scales, axes, and the tooltip.
const DATA = JSON.parse(document.getElementById("data").textContent);
document.documentElement.style.setProperty("--thin", Math.min(0.65, 4 / Math.sqrt(DATA.trials.length)));
const byId = (id) => document.getElementById(id);

function add(parent, name, attributes = {}, text) {
  const node = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function formatValue(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

// Values to pixels. A domain of one value gets some room, so that nothing is divided by zero.
function scale([low, high], [from, to], log = false) {
  const f = log ? Math.log : (x) => x;
  let [a, b] = [f(low), f(high)];
  if (a === b) [a, b] = log ? [a - 0.1, b + 0.1] : [a - (Math.abs(a) || 1) * 0.1, b + (Math.abs(b) || 1) * 0.1];
  const at = (value) => from + ((f(value) - a) / (b - a)) * (to - from);
  return Object.assign(at, { log, low: log ? Math.exp(a) : a, high: log ? Math.exp(b) : b });
}

// A domain around values: 6 % of room at each end; logarithmic where they span a decade or `log` says so.
function paddedDomain(values, log) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const useLog = low > 0 && (log === undefined ? high / low >= 10 : log);
  const room = useLog ? Math.pow(high / low, 0.06) : (high - low) * 0.06;
  return { domain: useLog ? [low / room, high * room] : [low - room, high + room], log: useLog };
}

function ticks(at, count) {
  const found = [];
  if (at.log && at.high / at.low >= 4) {
    for (let decade = Math.floor(Math.log10(at.low)); decade <= Math.log10(at.high); decade++) {
      for (const lead of [1, 2, 5]) found.push(lead * 10 ** decade);
    }
    const inside = found.filter((value) => value >= at.low && value <= at.high);
    return inside.length > count * 1.5 ? inside.filter((value) => /^1/.test(value.toExponential())) : inside;
  }
  const rough = Math.max((at.high - at.low) / count, at.whole ? 1 : 0); // there is no trial 1.5
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((lead) => lead * power >= rough);
  for (let value = Math.ceil(at.low / step) * step; value <= at.high + step * 1e-9; value += step) found.push(value);
  return found.map((value) => Number(value.toPrecision(12)));
}

function drawAxes(svg, x, y, box, names) {
  for (const value of ticks(y, 5)) {
    add(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) });
    add(svg, "text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, formatValue(value));
  }
  for (const value of ticks(x, Math.max(4, (box.right - box.left) / 90))) {
    add(svg, "line", { class: "grid", x1: x(value), x2: x(value), y1: box.top, y2: box.bottom });
    add(svg, "text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, formatValue(value));
  }
  add(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  add(svg, "text", { x: box.right, y: box.bottom + 36, "text-anchor": "end" }, names.x);
  add(svg, "text", { class: "title", x: box.left, y: 13 }, names.y);
}

// Draws now and whenever the width changes; `draw` gets an empty svg and the box to draw in.
function chart(id, height, draw) {
  const svg = byId(id);
  if (!svg) return () => {};
  let width = 0;
  const redraw = () => {
    svg.replaceChildren();
    svg.setAttribute("height", height);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    draw(svg, { left: 58, right: width - 12, top: 26, bottom: height - 44, width, height });
  };
  new ResizeObserver(() => {
    const now = Math.floor(svg.parentElement.clientWidth);
    if (now > 0 && now !== width) { width = now; redraw(); }
  }).observe(svg.parentElement);
  return () => { if (width) redraw(); };
}

function addTooltip(node, lines) {
  const show = (event) => {
    const tip = byId("tip");
    tip.textContent = lines.filter(Boolean).join("\n");
    tip.hidden = false;
    const spot = event.clientX === undefined || event.type === "focus" ? node.getBoundingClientRect() : { x: event.clientX, y: event.clientY };
    const x = Math.min(spot.x + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const y = spot.y + 16 + tip.offsetHeight > window.innerHeight ? spot.y - tip.offsetHeight - 10 : spot.y + 16;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.max(8, y)}px`;
  };
  const hide = () => { byId("tip").hidden = true; };
  node.addEventListener("pointermove", show);
  node.addEventListener("pointerleave", hide);
  node.addEventListener("focus", show);
  node.addEventListener("blur", hide);
}

// Which trials the brushes leave; every view that lists trials listens.
const selection = { has: () => true };
function select(test) {
  selection.has = test;
  document.dispatchEvent(new Event("selection"));
}
