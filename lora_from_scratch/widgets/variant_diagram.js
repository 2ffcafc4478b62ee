// One layer under a method: its parts to scale, and what is trained.
// The parts of each method and their meaning: variant_diagram.py.

const SIDE = 96; // pixels of the layer's longer side
const THIN = 10; // no side is drawn thinner

// "W_0" as W with a lowered 0, in text and in a drawing.
function lowered(text) {
  return text.split(/_(\w+)/).map((part, i) => (i % 2 ? make("sub", {}, part) : part));
}
function loweredSvg(text) {
  return text.split(/_(\w+)/).map((part, i, all) => makeSvg("tspan", i % 2
    ? { dy: 3, "font-size": 9 } : { dy: i && all[i] ? -3 : 0 }, part));
}

function render({ model, el }) {
  const methods = model.get("methods");
  const states = model.get("states");
  const most = model.get("most");
  const named = ([symbol, shape, state, start]) => ({ symbol, shape, state, start,
    sides: shape.map((side) => model.get(side)) });
  const partsOf = (name) => methods[name].parts.map(named);
  const size = ({ sides }) => sides.reduce((a, b) => a * b, 1);
  const shapeText = ({ sides }) => sides.map(count).join(" × ");
  const trained = (name) => partsOf(name)
    .reduce((sum, part) => sum + (part.state === "trained" ? size(part) : 0), 0);
  const words = ({ state, start }) =>
    [states[state], start].filter(Boolean).join(", ");

  const select = make("select", {}, ...Object.keys(methods).map((name) =>
    make("option", { value: name }, name)));
  select.addEventListener("change", () => {
    model.set("variant", select.value);
    model.save_changes();
  });
  const boxes = ["d_in", "d_out", "r"].map((name) => {
    const input = make("input",
      { type: "number", inputmode: "numeric", min: 1, max: most, step: 1 });
    input.addEventListener("change", () => {
      const others = ["d_in", "d_out"].filter((key) => key !== name);
      const top = name === "r" ? Math.min(...others.map((key) => model.get(key))) : most;
      const value = Math.max(1, Math.min(top, Math.round(Number(input.value)) || 1));
      if (value < model.get("r")) model.set("r", value);
      model.set(name, value);
      model.save_changes();
      show(); // also where the number asked for was out of range
    });
    return { name, input,
      node: make("label", {}, make("span", {}, ...lowered(name)), input) };
  });
  const controls = make("div", { class: "var-controls" },
    make("label", {}, make("span", {}, "method"), select),
    ...boxes.map((box) => box.node));

  const formula = make("p", { class: "var-formula" });
  const idea = make("p");
  const said = make("output", { "aria-live": "polite" });
  const list = make("ul");
  const drawing = drawLayer();
  const key = make("div", { class: "var-key" }, ...Object.entries(states).map(
    ([state, name]) => {
      const { svg, fills } = patterns(22, 16);
      const rect = (inset, color) => makeSvg("rect", { x: inset, y: inset,
        width: 22 - 2 * inset, height: 16 - 2 * inset, fill: color, class: "var-box" });
      svg.append(rect(1, state === "shared" ? "none" : fills[state]));
      if (state === "shared") svg.append(rect(4, fills[state]));
      return make("span", {}, svg, name);
    }));
  const { details } = dataTable("Compare the methods at this size", "", [], []);
  const box = details.querySelector(".lfs-scroll");
  const note = make("p", { class: "lfs-note" }, "Rectangles are to scale, but " +
    "thin sides are drawn wide enough to be seen. Computed: the sizes of the " +
    "trained parts, added up. Biases are left out.");

  startWidget(el, "lfs-variant", "One layer, and what a method adds to it");
  el.append(controls, idea, formula, drawing.svg, key, said, list, note, details);

  function show() {
    const variant = model.get("variant");
    const method = methods[variant];
    const parts = partsOf(variant);
    const whole = model.get("d_in") * model.get("d_out");
    select.value = variant;
    for (const { name, input } of boxes) input.value = model.get(name);
    idea.replaceChildren(...lowered(method.idea));
    const [equation, remark] = method.formula.split("; ");
    formula.replaceChildren(make("b", {}, ...lowered(equation)),
      ...(remark ? lowered(`; ${remark}.`) : []));
    list.replaceChildren(...parts.map((part) => make("li", {},
      make("b", {}, ...lowered(part.symbol)),
      part.sides.length > 1 ? `, ${shapeText(part)} = ${count(size(part))} numbers: `
        : `, ${shapeText(part)} numbers: `,
      ...lowered(words(part)))));

    const n = trained(variant);
    const shared = parts.filter((part) => part.state === "shared");
    said.textContent = `${variant} trains ${count(n)} numbers in this layer` +
      (n === whole ? ", all of them." : `, ${percent(n / whole)} of the ` +
        `${count(whole)} of full fine-tuning.`) + (shared.length
        ? ` ${shared.map((part) => part.symbol).join(" and ")} hold ` +
          `${count(shared.reduce((sum, part) => sum + size(part), 0))} more, ` +
          "once for the whole model." : "");
    drawing.show({ variant, parts, method, shapeText, states });
    drawing.svg.setAttribute("aria-label", `Diagram of a layer with ${variant}: ` +
      "the list below has the same parts.");

    const names = Object.keys(methods);
    const made = dataTable("", `One layer with ${count(model.get("d_in"))} inputs ` +
      `and ${count(model.get("d_out"))} outputs, r = ${count(model.get("r"))}.`,
      ["method", "trained numbers", "of full fine-tuning"],
      names.map((name) => [name, count(trained(name)), percent(trained(name) / whole)]));
    made.body[names.indexOf(variant)].classList.add("lfs-here");
    box.replaceChildren(made.details.querySelector("table"));
  }
  const traits = ["variant", "d_in", "d_out", "r"];
  for (const name of traits) model.on(`change:${name}`, show);
  show();

  const unwatch = watchWidth(drawing.svg, drawing.fit);
  return () => {
    unwatch();
    for (const name of traits) model.off(`change:${name}`, show);
  };
}

// A drawing with the fill of each state; ids in a page must differ.
function patterns(width, height) {
  const [lines, dots] = [uniqueId("lines"), uniqueId("dots")];
  const pattern = (id, child) => makeSvg("pattern",
    { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" },
    makeSvg("rect", { width: 6, height: 6, class: "var-ground" }), child);
  const svg = makeSvg("svg", { width, height, "aria-hidden": "true" },
    makeSvg("defs", {},
      pattern(lines, makeSvg("path", { d: "M-1,1l2,-2M0,6l6,-6M5,7l2,-2",
        class: "var-hatch" })),
      pattern(dots, makeSvg("circle", { cx: 3, cy: 3, r: 1.4, class: "var-dot" }))));
  return { svg, fills: { trained: "var(--accent)", frozen: `url(#${lines})`,
    drawn: `url(#${dots})`, shared: `url(#${dots})` } };
}

// Input above, output below; the matrix on the left, what is added on the right.
function drawLayer() {
  const { svg, fills } = patterns(640, 300);
  svg.removeAttribute("aria-hidden");
  svg.removeAttribute("width");
  fill(svg, { role: "img", class: "var-drawing" }, []);
  const layer = makeSvg("g");
  svg.append(layer);
  let shown;
  let width = 640;

  function draw() {
    const { variant, parts, method, shapeText, states } = shown;
    const longest = Math.max(...parts[0].sides);
    const made = [];
    const text = (x, y, words, anchor = "middle", name = "") => made.push(
      makeSvg("text", { x, y, "text-anchor": anchor, class: name },
        ...loweredSvg(words)));
    const path = (d, name = "var-wire") => made.push(makeSvg("path", { d, class: name }));
    const tall = (part) => Math.max(THIN, (SIDE * part.sides[0]) / longest);
    const wide = (part) => Math.max(THIN, (SIDE * (part.sides[1] ?? 0)) / longest);
    const lines = (part) => [`${part.symbol}: ${shapeText(part)}`,
      ...[states[part.state], part.start].filter(Boolean).join(", ").split(", ")];

    // A rectangle and its words, from y down; returns where it ends.
    function place(part, x, y, beside) {
      const [h, w] = [tall(part), wide(part)];
      const rect = (grow) => makeSvg("rect", { x: x - w / 2 - grow, y: y - grow,
        width: w + 2 * grow, height: h + 2 * grow, class: "var-box" });
      if (part.state === "shared") made.push(fill(rect(3), { fill: "none" }, []));
      made.push(fill(rect(0), { fill: fills[part.state] }, []));
      if (variant === "DyLoRA" && part.state === "trained") { // b = r / 2
        path(part.symbol === "A" ? `M${x - w / 2},${y + h / 2}h${w}v${h / 2}h${-w}z`
          : `M${x},${y}h${w / 2}v${h}h${-w / 2}z`, "var-cut");
      }
      lines(part).forEach((words, i) => text(beside ? x + w / 2 + 10 : x,
        beside ? y + h / 2 - 12 + 15 * i : y + h + 16 + 15 * i, words,
        beside ? "start" : "middle", i ? "" : "var-name"));
      return y + h + (beside ? 0 : 8 + 15 * lines(part).length);
    }
    const tallness = (part) => tall(part) + 8 + 15 * lines(part).length;

    const [W, ...added] = parts;
    const after = added.filter((part) => part.symbol === "m");
    const branch = added.filter((part) => part.symbol !== "m");
    const middle = width / 2;
    const apart = Math.min(width / 4, 130);
    const [left, right] = branch.length ? [middle - apart, middle + apart]
      : [middle, middle];
    const gap = 20;
    const high = Math.max(tallness(W),
      branch.reduce((sum, part) => sum + tallness(part) + gap, -gap));
    const [top, start] = [22, 48];
    const end = start + high;

    text(middle, 14, `x: ${count(W.sides[1])}`, "middle", "var-name");
    path(`M${left},${start}V${top + 10}H${right}V${start}M${middle},${top}v10`);
    const y = start + (high - tallness(W)) / 2;
    if (branch.length) path(`M${left},${start - 4}V${y}`);
    path(`M${left},${place(W, left, y)}V${end + 24}`);
    let at = start;
    branch.forEach((part, i) => {
      at = place(part, right, at);
      if (i < branch.length - 1) {
        path(`M${right},${at}v${gap}`);
        at += gap;
      }
    });
    let out = end + 24;
    if (branch.length) {
      path(`M${right},${at}V${out}H${middle + 10}M${left},${out}H${middle - 10}`);
      if (method.scale) text(right + 8, end + 16, `× ${method.scale}`, "start");
      made.push(makeSvg("circle", { cx: middle, cy: out, r: 10, class: "var-sum" }));
      text(middle, out + 5, "+", "middle", "var-name");
      out += 10;
    }
    for (const part of after) {
      path(`M${middle},${out}v16`);
      text(middle, out + 30, "÷ length of the rows, × m");
      path(`M${middle},${out + 36}v8`);
      out = place(part, middle, out + 44, true);
    }
    path(`M${middle},${out}v16`);
    text(middle, out + 32, `h: ${count(W.sides[0])}`, "middle", "var-name");

    const height = out + 40;
    svg.setAttribute("height", height);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    layer.replaceChildren(...made);
  }
  return {
    svg,
    show(now) { shown = now; draw(); },
    fit(now) { width = now; draw(); },
  };
}

export default { render };
