// Recorded runs as curves with all their seeds; the reader chooses the axes.
// The data and their meaning: ablation_explorer.py.

const COLORS = ["var(--ink)", "#e69f00", "#009e73", "#56b4e9", "#d55e00",
  "#0072b2", "#cc79a7", "#7a5230"]; // after Okabe and Ito
const MARKS = [[24, 0, 1], [4, 45, 1.15], [3, 0, 1.25], [4, 0, 1.25],
  [3, 180, 1.25], [5, 0, 1.45, 0.6], [5, 0, 1.15], [4, 0, 1.4, 0.55]];
const ALONE = "all runs"; // the name of a line that is the only one
const DASHES = ["", "6 4", "2 3"];

// Corners of a mark: a polygon, or a star if it has an inner radius.
function mark(i, x, y, size) {
  const [sides, turn, outer, inner] = MARKS[i % MARKS.length];
  const n = inner ? 2 * sides : sides;
  return Array.from({ length: n }, (_, k) => {
    const angle = (2 * Math.PI * k) / n + (turn / 180 - 0.5) * Math.PI;
    const radius = size * (inner && k % 2 ? inner : outer);
    return `${(x + radius * Math.cos(angle)).toFixed(1)},` +
      (y + radius * Math.sin(angle)).toFixed(1);
  }).join(" ");
}

// The points of a view, line by line, left to right: points() in Python.
function pointsOf({ fields, metrics, runs, view }) {
  const ix = fields.findIndex((f) => f.key === view.x);
  const im = metrics.findIndex((m) => m.key === view.metric);
  const at = fields.map((f) => view.at[f.key]);
  const groups = new Map();
  for (const run of runs) {
    const [codes] = run;
    const fits = at.every((place, i) => i === ix ||
      typeof place === "string" || codes[i] === place || codes[i] < 0);
    if (codes[ix] < 0 || !fits) continue;
    const line = codes.map((c, i) => (i !== ix && at[i] === "each" ? c : -1));
    const key = [...line, codes[ix]];
    if (!groups.has(String(key))) groups.set(String(key), { key, runs: [] });
    groups.get(String(key)).runs.push(run);
  }
  const sorted = [...groups.values()].sort((a, b) => {
    const i = a.key.findIndex((c, j) => c !== b.key[j]);
    return a.key[i] - b.key[i];
  });

  const points = [];
  for (const group of sorted) {
    const line = group.key.slice(0, -1);
    const point = { code: group.key.at(-1), rate: null };
    let chosen = group.runs;
    if (at.some((place, i) => i !== ix && place === "tuned")) {
      [point.rate, chosen] = tuned({ fields, metrics, runs }, chosen);
    }
    point.values = chosen.filter((run) => run[2]).map((run) => run[2][im])
      .filter((value) => value !== null);
    point.diverged = chosen.filter((run) => !run[2]).length;
    if (!point.values.length && !point.diverged) continue;
    point.line = line.map((c, i) => (c < 0 ? "" : valueText(fields[i], c)))
      .filter(Boolean).join(", ") || ALONE;
    point.low = Math.min(...point.values);
    point.high = Math.max(...point.values);
    point.mean = point.values.reduce((a, b) => a + b, 0) / point.values.length;
    points.push(point);
  }
  return points;
}

// The rate with the lowest validation loss of the first seed, and its runs.
function tuned({ fields, metrics, runs }, chosen) {
  const i = fields.findIndex((f) => f.key === "lr");
  const j = metrics.findIndex((m) => m.key === "validation_loss");
  const first = Math.min(...runs.map((run) => run[1]));
  const tried = chosen.filter((run) => run[1] === first &&
    run[2] && run[2][j] !== null)
    .sort((a, b) => a[2][j] - b[2][j] || a[0][i] - b[0][i]);
  if (!tried.length) return [null, chosen];
  const best = tried[0][0][i];
  return [best, chosen.filter((run) => run[0][i] === best)];
}

function valueText(field, code) {
  return field.prefix + field.values[code];
}

function numberText(value, { times, digits }) {
  return (times * value).toLocaleString("en-US",
    { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function render({ model, el }) {
  const label = model.get("label");
  const fields = model.get("fields");
  const metrics = model.get("metrics");
  const runs = model.get("runs");
  const same = model.get("same");
  const canTune = metrics.some((m) => m.key === "validation_loss");
  const isTuned = (f) => f.key === "lr" && canTune;
  const rates = fields.find((f) => f.key === "lr");
  let points = [];
  let here = 0; // which of the points shown is said and ringed

  function change(changes) {
    model.set("view", { ...model.get("view"), ...changes });
    model.save_changes();
  }

  // What runs along x cannot be held, and what leaves x must stand somewhere.
  function changeX(x) {
    const { x: old, at } = model.get("view");
    const left = fields.find((f) => f.key === old);
    const places = { ...at, [old]: isTuned(left) ? "tuned" : "each" };
    change({ x, at: places, hidden: [], point: null });
  }

  function menu(title, options, choose) {
    const select = make("select", {}, ...options.map(([value, text]) =>
      make("option", { value }, text)));
    select.addEventListener("change", () => choose(select.value));
    const node = make("label", {}, make("span", {}, title), select);
    return { node, select };
  }
  const metricMenu = menu("measured",
    metrics.map((m) => [m.key, m.title]), (metric) => change({ metric }));
  const xMenu = menu("along the axis",
    fields.map((f) => [f.key, f.title]), changeX);
  const menus = fields.map((f) => menu(f.title, [
    ["each", "a line each"],
    ...(isTuned(f) ? [["tuned", "tuned"]] : []),
    ...f.values.map((v, code) => [code, v]),
  ], (value) => {
    const place = /^\d/.test(value) ? Number(value) : value;
    const at = { ...model.get("view").at, [f.key]: place };
    change({ at, hidden: [], point: null });
  }));

  const legend = make("div", { class: "abl-lines", role: "group",
    "aria-label": "lines shown" });
  const id = uniqueId("point");
  const slider = make("input", { id, type: "range", min: 0, step: 1 });
  const less = make("button",
    { type: "button", "aria-label": "previous point" }, "−");
  const more = make("button",
    { type: "button", "aria-label": "next point" }, "+");
  const controls = make("div", { class: "abl-point" },
    make("label", { for: id }, "point"), less, more, slider);
  const said = make("output", { for: id, "aria-live": "polite" });
  const chart = drawRuns(pick);
  const { details, body } = dataTable("Show the numbers as a table", "", [], []);
  const box = details.querySelector(".lfs-scroll");
  const note = make("p", { class: "lfs-note" },
    "A mark is the mean of its seeds, the bar goes from the lowest to the " +
    "highest seed, each dot is a seed. A hollow mark is a single run. ↑ lies " +
    "above the axis." +
    (canTune ? " Tuned: the learning rate with the lowest validation loss of " +
      "the first seed." : "") + (same ? ` The same in all runs: ${same}.` : ""));

  startWidget(el, "lfs-ablation", label);
  el.append(
    make("div", { class: "abl-menus" }, metricMenu.node, xMenu.node,
      ...menus.map((m) => m.node)),
    legend, chart.svg, controls, said, note, details);

  // The names of all lines, with a box to tick: also the key to the marks.
  function showLegend(names, hidden) {
    const old = [...legend.querySelectorAll("label")];
    if (old.map((l) => l.textContent).join() !== names.join()) {
      legend.replaceChildren(...names.map((name, i) => {
        const tick = make("input", { type: "checkbox" });
        tick.addEventListener("change", () => {
          const off = new Set(model.get("view").hidden);
          if (tick.checked) off.delete(name); else off.add(name);
          change({ hidden: [...off] });
        });
        return make("label", { style: `--line-color: ${COLORS[i % 8]}` }, tick,
          makeSvg("svg", { width: 30, height: 14, "aria-hidden": "true" },
            makeSvg("line", { x1: 0, y1: 7, x2: 30, y2: 7, class: "abl-curve",
              "stroke-dasharray": DASHES[Math.floor(i / 8) % 3] }),
            makeSvg("polygon", { class: "abl-mark", points: mark(i, 15, 7, 4.5) })),
          name);
      }));
    }
    legend.querySelectorAll("input").forEach((tick, i) => {
      tick.checked = !hidden.includes(names[i]);
    });
  }

  function show() {
    const view = model.get("view");
    const x = fields.find((f) => f.key === view.x);
    const metric = metrics.find((m) => m.key === view.metric);
    const all = pointsOf({ fields, metrics, runs, view });
    const names = [...new Set(all.map((p) => p.line))];
    metricMenu.select.value = view.metric;
    xMenu.select.value = view.x;
    menus.forEach(({ node, select }, i) => {
      node.hidden = fields[i].key === view.x;
      select.value = view.at[fields[i].key];
    });
    showLegend(names, view.hidden);

    points = all.filter((p) => !view.hidden.includes(p.line));
    for (const p of points) {
      p.number = names.indexOf(p.line);
      p.name = (p.line === ALONE ? "" : `${p.line}, `) + valueText(x, p.code);
      if (p.rate !== null) p.chosen = String(rates.values[p.rate]);
    }
    const best = bestOf(points, metric);
    const wanted = view.point && points.findIndex((p) =>
      p.line === view.point[0] && p.code === view.point[1]);
    here = wanted >= 0 && wanted !== null ? wanted : Math.max(0, points.indexOf(best));

    slider.max = Math.max(0, points.length - 1);
    slider.value = here;
    slider.setAttribute("aria-valuetext", points[here]?.name ?? "no point");
    less.setAttribute("aria-disabled", here === 0);
    more.setAttribute("aria-disabled", here >= points.length - 1);
    said.textContent = sentence(points[here], metric, points[here] === best);
    chart.show({ points, here, x, metric, names });
    showTable(x, metric);
  }
  function sentence(p, metric, isBest) {
    if (!p) return "No line is shown. Tick one above.";
    const unit = metric.unit === "%" ? " %" : ` ${metric.unit}`;
    const rate = p.chosen ? ` (learning rate ${p.chosen})` : "";
    const stopped = p.diverged
      ? ` ${p.diverged} of ${p.diverged + p.values.length} runs diverged.` : "";
    if (!p.values.length) return `${p.name}${rate}:${stopped}`;
    const word = metric.unit === "%" ? "highest" : "lowest";
    const rank = isBest && points.length > 1
      ? ` The ${word} mean of the points shown.` : "";
    return `${p.name}${rate}: ${metric.title} ${numberText(p.mean, metric)}` +
      `${unit}, ${seeds(p, metric)}.${stopped}${rank}`;
  }

  function showTable(x, metric) {
    const unit = metric.unit === "numbers" ? "" : ` (${metric.unit})`;
    const isRate = points.some((p) => p.chosen);
    const head = ["line", x.title, ...(isRate ? ["learning rate"] : []),
      "mean", "lowest", "highest", "seeds"];
    const cells = points.map((p) => {
      const found = p.values.length
        ? [p.mean, p.low, p.high].map((v) => numberText(v, metric))
        : ["diverged", "–", "–"];
      const n = p.values.length + (p.diverged ? ` + ${p.diverged} diverged` : "");
      return [p.line, String(x.values[p.code]), ...(isRate ? [p.chosen ?? "–"] : []),
        ...found, String(n)];
    });
    const made = dataTable("", `${label}: ${metric.title}${unit}, every point ` +
      "that is drawn.", head, cells);
    made.body[here]?.classList.add("lfs-here");
    box.replaceChildren(made.details.querySelector("table"));
  }

  function pick(number) {
    const bounded = Math.max(0, Math.min(points.length - 1, number));
    const p = points[bounded];
    if (p && bounded !== here) change({ point: [p.line, p.code] });
  }
  slider.addEventListener("input", () => pick(Number(slider.value)));
  less.addEventListener("click", () => pick(here - 1));
  more.addEventListener("click", () => pick(here + 1));
  model.on("change:view", show);
  show();

  const unwatch = watchWidth(chart.svg, chart.fit);
  return () => {
    unwatch();
    model.off("change:view", show);
  };
}

function bestOf(points, metric) {
  const sign = metric.unit === "%" ? -1 : 1;
  return points.filter((p) => p.values.length)
    .reduce((a, b) => (a && sign * a.mean <= sign * b.mean ? a : b), undefined);
}

function seeds(p, metric) {
  const n = p.values.length;
  if (n === 1) return "1 seed";
  if (p.low === p.high) return `the same with ${n} seeds`;
  return `${n} seeds from ${numberText(p.low, metric)} to ` +
    numberText(p.high, metric);
}

// Beyond this, one run would press all others flat: it gets an arrow instead.
function limitOf(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const common = sorted[Math.floor(0.75 * (sorted.length - 1))];
  return common > sorted[0] ? common + 3 * (common - sorted[0]) : Infinity;
}

// Ends and marks of the measured axis.
function scaleOf(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (low > 0 && high / low > 12) { // decades, and 2 and 5 if there is room
    const decades = Math.log10(high / low);
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e++) {
      for (const m of decades > 3 ? [1] : [1, 2, 5]) {
        const tick = Number(`${m}e${e}`);
        if (tick >= low / 1.5 && tick <= high * 1.5) ticks.push(tick);
      }
    }
    const ends = [Math.log(low / 1.3), Math.log(high * 1.3)];
    return { ticks, at: (v) => (Math.log(v) - ends[0]) / (ends[1] - ends[0]) };
  }
  const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  const [from, to] = [low - room, high + room];
  const rough = (to - from) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const ticks = [];
  for (let k = Math.ceil(from / step); k * step <= to; k++) ticks.push(k * step);
  return { ticks, at: (v) => (v - from) / (to - from) };
}

function tickText(value, { unit }) {
  if (unit === "numbers" && value >= 1000) {
    return value >= 1e6 ? `${value / 1e6}M` : `${value / 1e3}k`;
  }
  return String(Number(value.toPrecision(6)));
}

function drawRuns(pick) {
  const height = 320;
  const svg = makeSvg("svg", { role: "img", height, class: "abl-chart" });
  let shown;
  let places = []; // of the points, in pixels
  let width = 640;

  function draw() {
    const { points, here, x, metric, names } = shown;
    const [x0, x1, y0, y1] = [56, width - 20, 44, height - 54];
    const text = (tx, ty, anchor, words, name = "") =>
      makeSvg("text", { x: tx, y: ty, "text-anchor": anchor, class: name }, words);
    const line = (xa, ya, xb, yb, name) =>
      makeSvg("line", { x1: xa, y1: ya, x2: xb, y2: yb, class: name });
    const unit = metric.unit === "numbers" ? "numbers" : metric.unit;
    const parts = [
      text(4, 14, "start", `${metric.title} (${unit})`),
      text(x1, height - 6, "end", x.title + (x.scale === "log"
        ? " (logarithmic axis)" : "")),
      line(x0, y1, x1, y1, "axis"),
    ];

    const used = [...new Set(points.map((p) => p.code))].sort((a, b) => a - b);
    const along = (code) => {
      if (x.scale === "text") return used.indexOf(code);
      return x.scale === "log" ? Math.log(x.values[code]) : x.values[code];
    };
    const ends = [along(used[0] ?? 0), along(used.at(-1) ?? 0)];
    const lines = new Set(points.map((p) => p.number));
    const order = names.map((_, i) => i).filter((i) => lines.has(i));
    const inner = [x0 + 26, x1 - 26];
    const px = (code) => (ends[1] > ends[0]
      ? inner[0] + ((along(code) - ends[0]) / (ends[1] - ends[0])) * (inner[1] - inner[0])
      : (inner[0] + inner[1]) / 2);
    const gaps = used.slice(1).map((code, i) => px(code) - px(used[i]));
    const apart = // beside, not on each other
      Math.min(10, 50 / order.length, (0.6 * Math.min(...gaps, 80)) / order.length);
    const shifted = (p) => px(p.code) +
      (order.indexOf(p.number) - (order.length - 1) / 2) * apart;

    const values = points.flatMap((p) => p.values).map((v) => v * metric.times);
    const limit = metric.key.endsWith("_loss") && points.length > 3
      ? limitOf(values) : Infinity;
    const inside = values.filter((v) => v <= limit);
    const scale = scaleOf(inside.length ? inside : [0, 1]);
    const py = (v) => y1 - (y1 - y0) * Math.min(1, scale.at(v * metric.times));
    const above = (p) => p.mean * metric.times > limit;
    for (const tick of scale.ticks) {
      const y = py(tick / metric.times);
      if (y > y1 + 1 || y < y0 - 1) continue;
      parts.push(line(x0, y, x1, y, "grid"));
      parts.push(text(x0 - 6, y + 4, "end", tickText(tick, metric)));
    }
    let last = -Infinity;
    for (const code of used) {
      const words = String(x.values[code]);
      const half = 3.4 * words.length;
      parts.push(line(px(code), y1, px(code), y1 + 4, "axis"));
      if (px(code) - half < last + 6) continue;
      last = px(code) + half;
      parts.push(text(px(code), y1 + 18, "middle", words));
    }

    const beyond = (p) => !p.values.length || above(p);
    places = points.map((p) => [shifted(p), beyond(p) ? y0 - 16 : py(p.mean)]);
    if (points.some(beyond)) parts.push(line(x0, y0 - 6, x1, y0 - 6, "abl-top"));
    for (const number of order) {
      const ours = points.map((p, i) => [p, ...places[i]])
        .filter(([p]) => p.number === number);
      const group = makeSvg("g", { style: `--line-color: ${COLORS[number % 8]}`,
        class: number === points[here]?.number ? "abl-line now" : "abl-line" });
      const measured = ours.filter(([p]) => p.values.length);
      if (x.scale !== "text") {
        group.append(makeSvg("polyline", { class: "abl-curve",
          "stroke-dasharray": DASHES[Math.floor(number / 8) % 3],
          points: measured.map(([, a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`)
            .join(" ") }));
      }
      for (const [p, a, b] of ours) {
        if (!p.values.length) { // stopped: a cross above the axis
          group.append(line(a - 5, b - 5, a + 5, b + 5, "abl-bar"),
            line(a - 5, b + 5, a + 5, b - 5, "abl-bar"));
          continue;
        }
        if (p.values.length > 1) {
          const [low, high] = [py(p.low), py(p.high)];
          group.append(line(a, low, a, high, "abl-bar"),
            line(a - 4, low, a + 4, low, "abl-bar"),
            line(a - 4, high, a + 4, high, "abl-bar"));
        }
        const one = p.values.length === 1 ? " one" : "";
        group.append(makeSvg("polygon",
          { class: `abl-mark${one}`, points: mark(number, a, b, 4.5) }));
        if (!one) {
          group.append(...p.values.map((v) => makeSvg("circle",
            { cx: a + Math.min(6, apart / 2 + 2), cy: py(v), r: 1.75,
              class: "abl-seed" })));
        }
      }
      parts.push(group);
    }
    for (const code of used) { // what lies above, in one label for each x
      const ours = points.filter((p) => p.code === code && p.values.length && above(p));
      if (!ours.length) continue;
      const means = ours.map((p) => p.mean);
      const ends = new Set([Math.min(...means), Math.max(...means)]
        .map((mean) => numberText(mean, metric)));
      const side = px(code) > (x0 + x1) / 2 ? -1 : 1;
      const out = Math.max(...ours.map((p) => side * (shifted(p) - px(code)))) + 9;
      parts.push(text(px(code) + side * Math.max(9, out), y0 - 12,
        side < 0 ? "end" : "start", `${[...ends].join(" to ")} ↑`));
    }
    if (points.length) {
      parts.push(makeSvg("circle", { cx: places[here][0], cy: places[here][1],
        r: 11, class: "abl-here" }));
    } else {
      parts.push(text((x0 + x1) / 2, (y0 + y1) / 2, "middle", "no line is shown"));
    }
    if (points.some((p) => p.diverged && !p.values.length)) {
      parts.push(text(x1, 14, "end", "× diverged"));
    }

    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", `${metric.title} (${metric.unit}) against ` +
      `${x.title}: ${points.length} points on ${order.length} ` +
      `${order.length === 1 ? "line" : "lines"}. The table below has the numbers.`);
    svg.replaceChildren(...parts);
  }
  svg.addEventListener("click", (event) => {
    const { left, top } = svg.getBoundingClientRect();
    const far = places.map(([a, b]) =>
      Math.hypot(a - event.clientX + left, b - event.clientY + top));
    if (far.length) pick(far.indexOf(Math.min(...far)));
  });
  return {
    svg,
    show(now) { shown = now; draw(); },
    fit(now) { width = now; draw(); },
  };
}

export default { render };
