// The nearest matrix of rank r beside the original, under a slider.
// The data and their meaning: rank_explorer.py.

const GREYS = ["#000000", "#ffffff"];
// ColorBrewer RdBu, which colour-blind readers can tell apart; zero is white.
const BLUE_TO_RED = [
  "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
  "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
];
const TOP_LEVEL = 254; // colours are numbered 0..254, 127 is the middle

// The red, green and blue of each level, between the stops given.
function palette(stops) {
  const parts = stops.map((hex) =>
    [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return Array.from({ length: TOP_LEVEL + 1 }, (_, level) => {
    const at = (level / TOP_LEVEL) * (parts.length - 1);
    const i = Math.min(Math.floor(at), parts.length - 2);
    return parts[i].map((low, c) => low + (parts[i + 1][c] - low) * (at - i));
  });
}

function paint(canvas, levels, colours) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  levels.forEach((level, i) => {
    const bounded = Math.max(0, Math.min(TOP_LEVEL, Math.round(level)));
    image.data.set([...colours[bounded], 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

function short(value) {
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

function render({ model, el }) {
  const [m, n] = model.get("shape");
  const [h, w] = model.get("drawn");
  const [low, high] = model.get("limits");
  const label = model.get("label");
  const error = model.get("error");
  const scale = model.get("scale");
  const left = typedArray(model.get("left"), Int8Array); // (maxR, h)
  const right = typedArray(model.get("right"), Int8Array); // (maxR, w)
  const original = typedArray(model.get("original"), Uint8Array);
  const colours = palette(model.get("signed") ? BLUE_TO_RED : GREYS);
  const maxR = scale.length;
  const lastR = error.length - 1; // the curve goes on past the slider
  const breakEven = (m * n) / (m + n);
  const stored = (r) => r * (m + n);
  const energy = (r) => 1 - error[r] ** 2;
  const range = `${short(low)} to ${short(high)}`;

  // Colour levels of the sum of the first r terms.
  function approximation(r) {
    const unit = TOP_LEVEL / (high - low);
    const levels = new Float64Array(h * w).fill(-low * unit);
    for (let q = 0; q < r; q++) {
      for (let i = 0; i < h; i++) {
        const factor = unit * scale[q] * left[q * h + i];
        for (let j = 0; j < w; j++) {
          levels[i * w + j] += factor * right[q * w + j];
        }
      }
    }
    return levels;
  }

  function picture() {
    const canvas = make("canvas", { width: w, height: h, role: "img" });
    const caption = make("figcaption");
    return { canvas, caption, figure: make("figure", {}, canvas, caption) };
  }
  const before = picture();
  const after = picture();
  paint(before.canvas, original, colours);
  before.canvas.setAttribute("aria-label", `${label}: original`);
  before.caption.append(
    make("b", {}, "original"), make("span", {}, `${count(m * n)} numbers`));

  const id = uniqueId("rank");
  const key = make("canvas", { width: TOP_LEVEL + 1, height: 1, role: "img",
    "aria-label": `Colours, from ${range}` });
  paint(key, [...colours.keys()], colours);
  const legend = make("div", { class: "rank-key" },
    make("span", {}, short(low)), key, make("span", {}, short(high)));

  const slider = make("input",
    { id, type: "range", min: 1, max: maxR, step: 1 });
  const less = make("button", { type: "button", "aria-label": "rank − 1" }, "−");
  const more = make("button", { type: "button", "aria-label": "rank + 1" }, "+");
  const name = make("label", { for: id }, "rank ", make("i", {}, "r"));
  const value = make("b", { class: "rank-value", "aria-hidden": "true" });
  const controls =
    make("div", { class: "rank-controls" }, name, value, less, more, slider);
  const said = make("output", { for: id, "aria-live": "polite" });

  const chart = drawChart({ error, maxR, breakEven, stored, size: m * n });

  const ranks = [];
  for (let r = 1; r <= lastR; r *= 2) ranks.push(r);
  const { details, body } = dataTable(
    "Show the numbers as a table",
    `${label}: rank, and what it keeps and costs. ` +
      `The whole matrix is ${count(m * n)} numbers.`,
    ["rank r", "energy kept", "relative error", "numbers stored", "share"],
    ranks.map((r) => [r, percent(energy(r)), percent(error[r]),
      count(stored(r)), percent(stored(r) / (m * n), 0)].map(String)));

  const window_ = h * w < m * n
    ? `, of the first ${h} rows and ${w} columns,` : "";
  const beyond = model.get("signed")
    ? " One entry in a hundred may lie beyond the ends of the colour scale." : "";
  const note = make("p", { class: "lfs-note" },
    "Measured: relative error = ‖W − Wᵣ‖ / ‖W‖ (Frobenius) from all singular " +
    `values of the ${m} × ${n} matrix; energy = 1 − error². The ` +
    `pictures${window_} are drawn with 8 bits a number.${beyond}`);

  startWidget(el, "lfs-rank", label);
  el.append(
    make("div", { class: "rank-pictures" }, before.figure, after.figure),
    legend, controls, said, chart.svg, note, details);

  function show() {
    const r = model.get("r");
    slider.value = r;
    slider.setAttribute("aria-valuetext", `rank ${r}`);
    less.setAttribute("aria-disabled", r === 1);
    more.setAttribute("aria-disabled", r === maxR);
    value.textContent = r;
    paint(after.canvas, approximation(r), colours);
    after.canvas.setAttribute("aria-label",
      `${label}: approximation of rank ${r}, relative error ${percent(error[r])}`);
    after.caption.replaceChildren(
      make("b", {}, `rank ${r}`), make("span", {}, `${count(stored(r))} numbers`));
    const cost = r > breakEven
      ? `${count(stored(r))} numbers, more than the ${count(m * n)} of the matrix,`
      : `${count(stored(r))} of ${count(m * n)} numbers ` +
        `(${percent(stored(r) / (m * n), 0)})`;
    said.textContent = `Rank ${r} stores ${cost} and keeps ` +
      `${percent(energy(r))} of the energy; relative error ${percent(error[r])}.`;
    chart.show(r);
    body.forEach((row, i) => row.classList.toggle("lfs-here", ranks[i] === r));
  }
  function choose(r) {
    const bounded = Math.max(1, Math.min(maxR, r));
    if (bounded === model.get("r")) return;
    model.set("r", bounded);
    model.save_changes();
  }
  slider.addEventListener("input", () => choose(Number(slider.value)));
  less.addEventListener("click", () => choose(model.get("r") - 1));
  more.addEventListener("click", () => choose(model.get("r") + 1));
  model.on("change:r", show);
  show();

  const unwatch = watchWidth(chart.svg, chart.fit);
  return () => {
    unwatch();
    model.off("change:r", show);
  };
}

// The error curve over a bar of the numbers stored: both have r as their axis.
function drawChart({ error, maxR, breakEven, stored, size }) {
  const svg = makeSvg("svg", { role: "img", height: 220, class: "rank-chart" });
  const lastR = error.length - 1;
  const top = Math.ceil(error[1] * 10) / 10 || 1; // of the error axis
  let r = 1;
  let width = 640;

  function draw() {
    const [x0, x1, y0, y1] = [44, width - 16, 24, 152];
    const x = (rank) => x0 + ((x1 - x0) * rank) / lastR;
    const y = (e) => y1 - ((y1 - y0) * e) / top;
    const line = (xa, ya, xb, yb, name) =>
      makeSvg("line", { x1: xa, y1: ya, x2: xb, y2: yb, class: name });
    const text = (tx, ty, anchor, words) =>
      makeSvg("text", { x: tx, y: ty, "text-anchor": anchor }, words);
    const curve = (from, to, name) => makeSvg("polyline", { class: name,
      points: error.slice(from, to + 1)
        .map((e, i) => `${x(from + i).toFixed(1)},${y(e).toFixed(1)}`).join(" ") });
    const rect = (to, name) => makeSvg("rect",
      { x: x0, y: 184, width: x(to) - x0, height: 12, class: name });

    const parts = [text(4, 12, "start", "relative error")];
    for (const e of [0, top / 2, top]) {
      parts.push(line(x0, y(e), x1, y(e), e ? "grid" : "axis"));
      parts.push(text(x0 - 6, y(e) + 4, "end", `${Math.round(100 * e)} %`));
    }
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((s) =>
      lastR / s <= width / 64) ?? 256;
    for (let tick = step; tick <= lastR; tick += step) {
      parts.push(line(x(tick), y1, x(tick), y1 + 4, "axis"));
      parts.push(text(x(tick), y1 + 18, "middle", tick));
    }
    parts.push(text(x0 - 6, y1 + 18, "end", "r ="));
    if (breakEven <= lastR) {
      const right = x(breakEven) > x1 - 150;
      parts.push(rect(breakEven, "room"));
      parts.push(line(x(breakEven), y0 - 6, x(breakEven), y1 + 4, "even"));
      parts.push(line(x(breakEven), 180, x(breakEven), 200, "even"));
      [`break-even at r = ${oneDigit(breakEven)}:`,
        `${count(size)} numbers, as`, "many as the matrix"].forEach((words, i) =>
        parts.push(text(x(breakEven) + (right ? -6 : 6), y0 + 16 + 16 * i,
          right ? "end" : "start", words)));
    }
    parts.push(rect(r, r > breakEven ? "bar over" : "bar"));
    parts.push(text(4, 214, "start", `${count(stored(r))} numbers stored`));
    parts.push(curve(1, Math.min(maxR, lastR), "curve"));
    if (maxR < lastR) parts.push(curve(maxR, lastR, "curve rest"));
    parts.push(line(x(r), y(error[r]), x(r), y1, "drop"));
    parts.push(makeSvg("circle",
      { cx: x(r), cy: y(error[r]), r: 5.5, class: "dot" }));

    svg.setAttribute("viewBox", `0 0 ${width} 220`);
    svg.setAttribute("aria-label", `Curve of relative error against rank. At ` +
      `rank ${r} the error is ${percent(error[r])}; break-even at rank ` +
      `${oneDigit(breakEven)}.`);
    svg.replaceChildren(...parts);
  }
  return {
    svg,
    show(rank) { r = rank; draw(); },
    fit(now) { width = now; draw(); },
  };
}

function oneDigit(value) {
  return String(Number(value.toFixed(1)));
}

export default { render };
