// Real weights on the levels of a 4-bit codebook; one of them can be dragged.
// The data and their meaning: nf4_explorer.py.

const TIMES = 20; // the outlier, at most, in multiples of its own value
const LINEAR = 0.62; // part of the axis that the block's own range takes
const ROW = 5; // pixels from weight to weight
const f32 = Math.fround;

// quantized() and errors() of nf4_explorer.py; a test compares the two.
export function quantize({ block, levels, position, blockSize, outlier }) {
  const table = levels.map(([level]) => f32(level));
  const middle = table.slice(1).map((level, i) => f32((table[i] + level) / 2));
  const weights = block.map((w, i) => f32(i === position ? f32(w) * outlier : w));
  const absmax = [];
  for (let i = 0; i < weights.length; i += blockSize) {
    absmax.push(Math.max(...weights.slice(i, i + blockSize).map(Math.abs)));
  }
  const blockOf = (i) => Math.floor(i / blockSize);
  const scaled = weights.map((w, i) =>
    f32(w * f32(1 / Math.max(absmax[blockOf(i)], f32(1e-38)))));
  const indices = scaled.map((x) => middle.filter((m) => m < x).length);
  const values = indices.map((index, i) => f32(table[index] * absmax[blockOf(i)]));

  const norm = (numbers) => Math.sqrt(numbers.reduce((sum, x) => sum + x * x, 0));
  function error(isIn) {
    const part = weights.map((_, i) => i).filter(isIn);
    const size = norm(part.map((i) => weights[i]));
    return size ? norm(part.map((i) => values[i] - weights[i])) / size : 0;
  }
  const isOther = (i) => i !== position;
  const isSame = (i) => blockOf(i) === blockOf(position);
  return {
    weights, absmax, scaled, indices, values, blockOf,
    used: new Set(indices.filter((_, i) => isOther(i) && isSame(i))).size,
    ratio: Math.abs(weights[position]) /
      (norm(weights.filter((_, i) => isOther(i))) / Math.sqrt(weights.length - 1)),
    errors: {
      "all": error(() => true),
      "others": error(isOther),
      "same block": error((i) => isOther(i) && isSame(i)),
      "other blocks": error((i) => !isSame(i)),
    },
  };
}

function short(value, digits = 4) {
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

function bits(code) {
  return code.toString(2).padStart(4, "0");
}

function render({ model, el }) {
  const label = model.get("label");
  const block = model.get("block");
  const codebooks = model.get("codebooks");
  const position = model.get("position");
  const keys = ["codebook", "block_size", "outlier", "selected"];
  const result = (codebook, outlier) => quantize({ block, position, outlier,
    levels: codebooks[codebook], blockSize: model.get("block_size") });
  function choose(key, value) {
    if (model.get(key) === value) return;
    model.set(key, value);
    model.save_changes();
  }

  const id = uniqueId("nf4");
  function field(key, name, control) {
    control.id = `${id}-${key}`;
    return make("div", { class: "nf4-field" },
      make("label", { for: control.id }, ...name), control);
  }
  function menu(key, name, values, words = String) {
    const select = make("select", {}, ...values.map((value) =>
      make("option", { value }, words(value))));
    select.addEventListener("change", () =>
      choose(key, values[select.selectedIndex]));
    return { select, box: field(key, [name], select) };
  }
  function slider(key, name, from, to, step, toValue) {
    const input = make("input", { type: "range", min: from, max: to, step });
    const value = make("b", { "aria-hidden": "true" });
    input.addEventListener("input", () =>
      choose(key, toValue(Number(input.value))));
    const box = field(key, [name, " ", value], input);
    box.classList.add("nf4-slider");
    return { box, show(at, words) {
      input.value = at;
      input.setAttribute("aria-valuetext", words);
      value.textContent = words;
    } };
  }

  const codebook = menu("codebook", "codebook", Object.keys(codebooks));
  const size = menu("block_size", "block size", [16, 32, 64],
    (n) => `${n} weights`);
  const outlier = slider("outlier", `outlier, weight ${position + 1}`,
    1, TIMES, 0.1, (x) => x);
  const weight = slider("selected", "look at weight", 1, block.length, 1,
    (number) => number - 1);
  const said = make("output",
    { for: `${id}-outlier`, "aria-live": "polite" });
  const one = make("output", { for: `${id}-selected`, "aria-live": "polite" });
  const chart = drawBlock({ block, position, choose });
  const { details, body } = dataTable("Show the numbers as a table", " ",
    ["weight", "value", "÷ absmax", "level", "code", "dequantized", "error"],
    block.map((_, i) => [String(i + 1), "", "", "", "", "", ""]));
  const caption = details.querySelector("caption");
  const note = make("p", { class: "lfs-note" },
    "Computed in float32 as bitsandbytes does: weight ÷ absmax of its block, " +
    "nearest level, level × absmax. Error: root mean square over a group of " +
    "weights, relative to theirs. Lines: the levels, dotted if no weight is " +
    "on them; bars: the mark is where the outlier is × 1. Beyond the largest " +
    "weight the axis is logarithmic, in multiples of it. " +
    "INT4 has the levels k/7, and FP4 has two zeros: 15 levels each.");

  startWidget(el, "lfs-nf4", label);
  el.append(
    make("div", { class: "nf4-controls" }, codebook.box, size.box, outlier.box),
    said, chart.svg, weight.box, one, note, details);

  function show() {
    const s = Object.fromEntries(keys.map((key) => [key, model.get(key)]));
    const now = result(s.codebook, s.outlier);
    const before = result(s.codebook, 1);
    const levels = codebooks[s.codebook];
    codebook.select.value = s.codebook;
    size.select.value = s.block_size;
    outlier.show(s.outlier, `× ${s.outlier.toFixed(1)}`);
    weight.show(s.selected + 1, String(s.selected + 1));

    said.textContent = sentence(s, now, before, levels.length);
    const i = s.selected;
    const scale = now.absmax[now.blockOf(i)];
    const [level, code] = levels[now.indices[i]];
    const error = now.values[i] - now.weights[i];
    one.textContent = `Weight ${i + 1}${i === position ? ", the outlier" : ""}: ` +
      `${short(now.weights[i])} ÷ ${short(scale)} = ${short(now.scaled[i])} → ` +
      `level ${now.indices[i]}, which is ${short(level)}; code ${bits(code)} → ` +
      `${short(level)} × ${short(scale)} = ${short(now.values[i])}. ` +
      (error ? `Error ${short(error, 2)}.` : "No error.");

    caption.textContent = `${s.codebook}, blocks of ${s.block_size}; absmax ` +
      now.absmax.map((x) => short(x)).join(", ") + ".";
    body.forEach((row, j) => {
      [short(now.weights[j]), short(now.scaled[j]), now.indices[j],
        bits(levels[now.indices[j]][1]), short(now.values[j]),
        short(now.values[j] - now.weights[j], 2),
      ].forEach((text, k) => { row.children[k + 1].textContent = text; });
      row.classList.toggle("lfs-here", j === i);
    });
    const bars = Object.keys(codebooks).map((name) => ({ name,
      here: name === s.codebook,
      error: result(name, s.outlier).errors.others,
      before: result(name, 1).errors.others }));
    chart.show({ s, now, levels, bars });
  }

  function sentence(s, now, before, n) {
    const mates = s.block_size - 1;
    const rest = block.length - s.block_size;
    const moved = s.outlier > 1;
    const group = `The ${mates} others${rest ? " of its block" : ""} fall on ` +
      `${now.used} of ${n} levels`;
    const [from, to] = [before, now].map((x) => percent(x.errors["same block"]));
    const elsewhere = percent(now.errors["other blocks"]);
    return `${s.codebook}: weight ${position + 1} is ` +
      (moved ? `${s.outlier.toFixed(1)} times its value, ` : "the largest, ") +
      `${now.ratio.toFixed(1)} × the root mean square of the others. ` +
      (moved ? `${group}: their error goes from ${from} to ${to}.`
        : `${group}: their error is ${to}.`) +
      (rest ? ` In the other blocks it ${moved ? "stays at" : "is"} ` +
        `${elsewhere}.` : "") +
      (moved ? ` Over all ${block.length} weights it would look like ` +
        `${percent(now.errors.all)}: the outlier itself is exact.` : "");
  }

  const changes = keys.map((key) => `change:${key}`);
  changes.forEach((change) => model.on(change, show));
  show();
  const unwatch = watchWidth(chart.svg, chart.fit);
  return () => {
    unwatch();
    changes.forEach((change) => model.off(change, show));
  };
}

// A row per weight, in blocks with their levels; below, a bar per codebook.
// Along the axis a weight stands at multiples of the block's largest.
function drawBlock({ block, position, choose }) {
  const unit = Math.abs(block[position]);
  const sign = Math.sign(block[position]);
  const layer = makeSvg("g");
  const handle = makeSvg("g", { class: "nf4-handle" },
    makeSvg("circle", { r: 20, class: "nf4-reach" }), makeSvg("circle", { r: 7 }));
  const svg = makeSvg("svg",
    { role: "img", height: 1, class: "nf4-chart" }, layer, handle);
  let shown;
  let width = 640;
  let places = []; // of the weights, in pixels
  let press = null; // while the pointer is down

  const half = () => width / 2 - 12;
  function x(value) {
    const t = Math.abs(value) / unit;
    const far = t > 1 ? LINEAR + (1 - LINEAR) * Math.log(t) / Math.log(TIMES)
      : LINEAR * t;
    return width / 2 + Math.sign(value) * half() * far;
  }
  function timesAt(px) {
    const far = sign * (px - width / 2) / half();
    const t = TIMES ** ((far - LINEAR) / (1 - LINEAR));
    return Math.max(1, Math.min(TIMES, Math.round(10 * t) / 10));
  }

  function draw() {
    const { s, now, levels, bars } = shown;
    const parts = [];
    const text = (tx, ty, anchor, words, name = "") => parts.push(makeSvg("text",
      { x: tx, y: ty, "text-anchor": anchor, class: name }, words));
    const line = (xa, ya, xb, yb, name) => parts.push(makeSvg("line",
      { x1: xa, y1: ya, x2: xb, y2: yb, class: name }));
    const rect = (left, top, w, h, name) => parts.push(makeSvg("rect",
      { x: left, y: top, width: w, height: h, class: name }));

    places = [];
    let y = 0;
    now.absmax.forEach((scale, b) => {
      const first = b * s.block_size;
      const members = now.weights.map((_, i) => i)
        .filter((i) => now.blockOf(i) === b);
      const used = new Set(members.map((i) => now.indices[i]));
      text(2, y + 13, "start", `${first + 1}–${first + s.block_size}: absmax ` +
        `${short(scale, 3)}, ${used.size}/${levels.length} levels`);
      const [top, bottom] = [y + 20, y + 30 + ROW * s.block_size];
      rect(0, top, width, bottom - top, "nf4-band");
      levels.forEach(([level], index) => {
        const at = x(level * scale);
        line(at, top, at, bottom, used.has(index) ? "level" : "level idle");
      });
      for (const i of members) {
        const row = top + 5 + ROW * (i - first + 0.5);
        places.push([x(now.weights[i]), row]);
        line(x(now.weights[i]), row, x(now.values[i]), row, "nf4-error");
      }
      for (const i of members) {
        parts.push(makeSvg("circle",
          { cx: places[i][0], cy: places[i][1], r: 2.5, class: "nf4-weight" }));
      }
      y = bottom + 8;
    });
    const [here, row] = places[s.selected];
    parts.push(makeSvg("circle", { cx: here, cy: row, class: "nf4-here",
      r: s.selected === position ? 11 : 7 }));
    const [px, py] = places[position];
    const out = s.outlier < 4 ? sign : -sign;
    text(px + 14 * out, py + 4, out > 0 ? "start" : "end",
      s.outlier > 1 ? `× ${s.outlier.toFixed(1)}` : sign > 0 ? "drag →" : "← drag",
      "nf4-times");
    handle.setAttribute("transform", `translate(${px} ${py})`);

    for (const t of [-TIMES, -5, -1, 0, 1, 5, TIMES]) {
      if (width < 480 && Math.abs(t) === 5) continue; // no room for it
      const at = x(t * unit);
      line(at, y - 8, at, y - 3, "axis");
      text(at, y + 10, "middle",
        Math.abs(t) > 1 ? `×${Math.abs(t)}` : short(t * unit, 2));
    }
    y += 40;
    text(2, y, "start", `error of the other ${block.length - 1} weights`);
    const [x0, x1] = [44, width - 60];
    bars.forEach(({ name, here, error, before }, i) => {
      const at = y + 10 + 22 * i;
      const to = (share) => x0 + (x1 - x0) * share;
      text(x0 - 6, at + 12, "end", name);
      rect(x0, at, x1 - x0, 14, "nf4-band");
      rect(x0, at, to(error) - x0, 14, here ? "bar here" : "bar");
      line(to(before), at - 2, to(before), at + 16, "nf4-before");
      text(width - 2, at + 12, "end", percent(error));
    });
    const height = y + 14 + 22 * bars.length;
    svg.setAttribute("height", height);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", `${block.length} weights on the levels of ` +
      `${s.codebook}. Bars, error of the other ${block.length - 1} weights: ` +
      bars.map((bar) => `${bar.name} ${percent(bar.error)}`).join(", ") +
      ". The table below has the numbers.");
    layer.replaceChildren(...parts);
  }

  const inside = (event) => {
    const { left, top } = svg.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };
  svg.addEventListener("pointerdown", (event) => {
    const [px, py] = inside(event);
    const [hx, hy] = places[position];
    const holds = Math.hypot(px - hx, py - hy) <= 20;
    press = { holds, off: hx - px, moved: false };
    if (!holds) return;
    event.preventDefault();
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!press?.holds) return;
    press.moved = true;
    choose("outlier", timesAt(inside(event)[0] + press.off));
  });
  svg.addEventListener("pointerup", (event) => {
    if (press && !press.moved) {
      const [px, py] = inside(event);
      const far = places.map(([a, b]) => Math.hypot(a - px, b - py));
      const least = Math.min(...far);
      if (least < 30) choose("selected", far.indexOf(least));
    }
    press = null;
  });
  svg.addEventListener("pointercancel", () => { press = null; });
  return {
    svg,
    show(now) { shown = now; draw(); },
    fit(now) { width = now; draw(); },
  };
}

export default { render };
