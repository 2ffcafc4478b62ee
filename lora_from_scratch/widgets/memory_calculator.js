// The bytes of one training step, item by item, for settings that can be moved.
// The settings and the sizes of the models: memory_calculator.py.

const METHODS = { full: "full fine-tuning", lora: "LoRA", qlora: "QLoRA" };
const PRECISIONS = { fp32: "float32", bf16: "bfloat16", nf4: "NF4",
  dq: "NF4, double quant." };
const OPTIMIZERS = { adamw: "AdamW (32 bits)", adam8: "Adam (8 bits)",
  sgd: "SGD (no moments)" };
const TARGETS =
  { qv: "queries, values", attention: "attention", mlp: "MLP", all: "all-linear" };
const CHOSEN = { qv: /(q_proj|v_proj|c_attn)$/, attention: /attn\./,
  mlp: /mlp\./, all: /./ };
const BITS = { fp32: 32, bf16: 16, nf4: 4 + 32 / 64,
  dq: 4 + 8 / 64 + 32 / (64 * 256) };
const MOMENTS = { adamw: 8, adam8: 2, sgd: 0 };

const precisionOf = (s) =>
  s.method !== "qlora" ? s.precision : s.double_quant ? "dq" : "nf4";
const targetsOf = (a, s) =>
  a.linears.map(([name]) => name).filter((name) => CHOSEN[s.targets].test(name));
const tokensOf = (a, s) => a.positions ? Math.min(s.tokens, a.positions) : s.tokens;

// training_ledger of memory.py; a test compares the two on a grid of settings.
export function ledger(a, s) {
  const full = s.method === "full";
  const bits = BITS[precisionOf(s)];
  const chosen = full ? [] : targetsOf(a, s);
  const matrices = (layers, of) => layers.reduce((sum, x) => sum + of(x), 0);
  const inBlocks = a.layers * matrices(a.linears, ([, dIn, dOut]) => dIn * dOut);
  const n = full ? a.parameters : a.layers * s.r * matrices(
    a.linears.filter(([name]) => chosen.includes(name)),
    ([, dIn, dOut]) => dIn + dOut);
  const trained = n * (full && bits < 32 ? 2 : 4);
  const rest = a.parameters - inBlocks;
  const perToken = s.batch * tokensOf(a, s);
  const largest = Math.max(...a.linears.map(([, dIn, dOut]) => dIn * dOut));
  return {
    "frozen weights":
      full ? 0 : (inBlocks * bits + rest * Math.max(16, bits)) / 8,
    "trained weights": trained,
    "gradients": trained,
    "optimizer": n * MOMENTS[s.optimizer],
    "activations": perToken * kept(a, s, full, chosen, bits < 32 ? 2 : 4),
    "logits": perToken * 2 * 4 * a.vocab,
    "unpacked matrix": !full && bits < 16 ? 2 * largest : 0,
  };
}

// activation_bytes of memory.py, per token.
function kept(a, s, full, chosen, size) {
  const gpt2 = a.kind === "gpt2";
  const adapted = ([name]) => chosen.includes(name);

  const norm = (reached) => !reached ? 0 : gpt2 ? size * (a.d + 2)
    : 4 * a.d + 4 + (full ? size * a.d : 0);
  function inputs(layers, here = false) {
    const own = layers.filter(adapted).length;
    const shared = (full || own) && !here ? size * layers[0][1] : 0;
    return shared + own * size * s.r;
  }
  function block(reached) {
    const cuts = gpt2 ? [0, 1, 2, 3, 4] : [0, 3, 4, 6, 7];
    const [enter, leave, rise, fall] =
      [0, 1, 2, 3].map((i) => a.linears.slice(cuts[i], cuts[i + 1]));
    let sum = norm(reached) + inputs(enter);
    reached ||= enter.some(adapted);
    if (reached) {
      sum += size * (2 * a.q + 2 * a.kv) + 4 * a.heads;
      if (gpt2 && !s.checkpointing) sum += size * 2 * a.kv;
    }
    sum += inputs(leave, reached);
    reached ||= leave.some(adapted);
    sum += norm(reached) + inputs(rise);
    reached ||= rise.some(adapted);
    if (reached) sum += size * a.f * (gpt2 ? 4 : 3);
    return sum + inputs(fall);
  }

  const blocks = s.checkpointing
    ? a.layers * size * a.d + block(full || a.layers > 1)
    : block(full) + (a.layers - 1) * block(true);
  return blocks + norm(true) + (full ? size * a.d : 0) + 4 * a.vocab;
}

// "q_proj" for "self_attn.q_proj", but "attn.c_proj": GPT-2 has two c_proj.
function shortNames(a, names) {
  const last = (name) => name.slice(name.lastIndexOf(".") + 1);
  const alike = (name) => a.linears.filter(([x]) => last(x) === last(name));
  return names.map((name) => alike(name).length > 1 ? name : last(name));
}

// What a menu calls the settings of a measured run.
function nameOf(s) {
  const batch = s.batch > 1 ? `, batch ${s.batch}` : "";
  return `${s.architecture}, ${PRECISIONS[precisionOf(s)]}${batch}`;
}

function gigabytes(bytes) {
  const gb = bytes / 1e9;
  if (bytes > 0 && gb < 0.0005) return "under 0.001 GB";
  return `${gb >= 100 ? gb.toFixed(1) : gb >= 1 ? gb.toFixed(2) : gb.toFixed(3)} GB`;
}

function render({ model, el }) {
  const models = model.get("models");
  const steps = model.get("steps");
  const gpus = model.get("gpus");
  const measured = model.get("measured");
  const keys = ["architecture", "method", "targets", "precision", "optimizer",
    "r", "batch", "tokens", "checkpointing", "double_quant", "memory_gb"];
  const id = uniqueId("memory");
  const setting = () => Object.fromEntries(keys.map((k) => [k, model.get(k)]));
  function choose(changes) {
    for (const [key, value] of Object.entries(changes)) model.set(key, value);
    model.save_changes();
  }

  function field(key, name, control) {
    control.id = `${id}-${key}`;
    return make("div", { class: "memory-field" },
      make("label", { for: control.id }, name), control);
  }
  function menu(key, name, options,
    chosen = (value) => choose({ [key]: value })) {
    const select = make("select", {}, ...Object.entries(options).map(
      ([value, words]) => make("option", { value }, words)));
    select.addEventListener("change", () => chosen(select.value));
    return { select, box: field(key, name, select) };
  }
  function slider(key, name) {
    const input = make("input",
      { type: "range", min: 0, max: steps[key].length - 1, step: 1 });
    const value = make("b", { "aria-hidden": "true" });
    input.addEventListener("input", () =>
      choose({ [key]: steps[key][Number(input.value)] }));
    const box = field(key, name, input);
    box.firstChild.append(" ", value);
    return { input, box, show(shown) {
      input.value = steps[key].indexOf(shown);
      input.setAttribute("aria-valuetext", count(shown));
      value.textContent = count(shown);
    } };
  }

  const architecture = menu("architecture", "model",
    Object.fromEntries(Object.keys(models).map((name) => [name, name])));
  const method = menu("method", "method", METHODS);
  const targets = menu("targets", "adapted layers", TARGETS);
  // NF4 is what makes LoRA QLoRA, so the two menus move together.
  const precision = menu("precision", "base weights", PRECISIONS, (value) => {
    if (BITS[value] < 16)
      return choose({ method: "qlora", double_quant: value === "dq" });
    const method = model.get("method");
    choose({ method: method === "qlora" ? "lora" : method, precision: value });
  });
  const optimizer = menu("optimizer", "optimizer", OPTIMIZERS);
  const card = menu("memory_gb", "GPU", Object.fromEntries(
    Object.entries(gpus).map(([gb, names]) => [gb, `${gb} GB: ${names}`])),
    (value) => choose({ memory_gb: Number(value) }));
  const runs = Object.fromEntries(
    measured.map((run) => [nameOf(run.when), run]));
  const names = ["choose one", ...Object.keys(runs)];
  const measurement = menu("measured", "a measured run (LitGPT)",
    Object.fromEntries(names.map((name) => [name, name])),
    (name) => choose(runs[name].when));
  measurement.select.options[0].disabled = true; // a title, nothing to choose
  const rank = slider("r", "rank r");
  const batch = slider("batch", "sequences in a batch");
  const tokens = slider("tokens", "tokens in a sequence");
  const box = make("input", { type: "checkbox", id: `${id}-checkpointing` });
  box.addEventListener("change", () => choose({ checkpointing: box.checked }));
  const checkpointing = make("div", { class: "memory-check" }, box,
    make("label", { for: box.id }, "gradient checkpointing"));

  const controls = make("div", { class: "memory-controls" },
    architecture.box, method.box, targets.box, rank.box, precision.box,
    optimizer.box, batch.box, tokens.box, checkpointing);
  const fits = make("div", { class: "memory-controls memory-wide" }, card.box,
    measurement.box);
  const said = make("output", { "aria-live": "polite" });
  const svg = makeSvg("svg", { role: "img", height: 1, class: "memory-chart" });

  const first = ledger(models[model.get("architecture")], setting());
  const { details, body } = dataTable(
    "Show the numbers as a table", "What one training step holds in memory.",
    ["item", "bytes", "GB", "share"],
    [...Object.keys(first), "total"].map((item) => [item, "", "", ""]));
  const note = make("p", { class: "lfs-note" },
    "Computed from shapes; GB = 10⁹ bytes. Logits: their gradients, for a " +
    "moment. Activations: attention without a tokens × tokens matrix, no " +
    "dropout; 16 bits unless the base has 32. Unpacked matrix: the largest " +
    "of a 4-bit base in 16 bits, for one product. Not counted: the CUDA " +
    "context, workspaces, what the allocator reserves, an optimizer step's " +
    "temporaries. Gradients appear as activations go, so the items are " +
    "never all there at once. Measured runs: LitGPT, resource tables of " +
    "2023, on an A100.");

  startWidget(el, "lfs-memory", "Will it fit? What training needs in memory");
  el.append(controls, fits, said, svg, note, details);

  let width = 640;
  function show() {
    const s = setting();
    const a = models[s.architecture];
    const full = s.method === "full";
    architecture.select.value = s.architecture;
    method.select.value = s.method;
    targets.select.value = s.targets;
    precision.select.value = precisionOf(s);
    optimizer.select.value = s.optimizer;
    card.select.value = s.memory_gb;
    const run = measured.find(({ when }) =>
      Object.entries(when).every(([key, value]) => s[key] === value));
    measurement.select.value = run ? nameOf(run.when) : "choose one";
    box.checked = s.checkpointing;
    targets.select.disabled = rank.input.disabled = full;
    rank.show(s.r);
    batch.show(s.batch);
    tokens.show(tokensOf(a, s));

    const items = Object.entries(ledger(a, s));
    const total = items.reduce((sum, [, bytes]) => sum + bytes, 0);
    const limit = s.memory_gb * 1e9;
    const all = [...items, ["total", total]];
    all.forEach(([, bytes], i) => [count(Math.round(bytes)), gigabytes(bytes),
      percent(bytes / total)].forEach((text, j) => {
      body[i].children[j + 1].textContent = text;
    }));
    const names = shortNames(a, targetsOf(a, s)).join(", ");
    const how = full ? METHODS.full
      : `${METHODS[s.method]} of rank ${s.r} on ${names}`;
    const left = gigabytes(Math.abs(limit - total));
    said.textContent = `${s.architecture}, ${how}: ${gigabytes(total)} for ` +
      `${s.batch} × ${count(tokensOf(a, s))} tokens. ` +
      `Fits in ${s.memory_gb} GB: ` + (total <= limit
      ? `yes, with ${left} left for what is not counted.`
      : `no, ${left} are missing.`) + (!run ? ""
      : ` LitGPT measured ${gigabytes(1e9 * run.gb)} (circle); its layers kept ` +
        `${gigabytes(1e9 * run.beside_gb)} more for backward than is counted ` +
        "here (line).");
    draw(all, limit, total, run);
  }

  // A bar per item and one for the total, whose parts add up above it.
  function draw(all, limit, total, run) {
    const x0 = 120;
    const x1 = width - 100;
    const most = Math.max(total, limit,
      run ? Math.max(1e9 * run.gb, total + 1e9 * run.beside_gb) : 0);
    const x = (bytes) => x0 + ((x1 - x0) * bytes) / most;
    const height = 26 * (all.length + (run ? 1 : 0)) + 24;
    const parts = [];
    let start = 0;
    all.forEach(([item, bytes], i) => {
      const y = 20 + 26 * i;
      const from = item === "total" ? 0 : start;
      start += bytes;
      const over = item === "total" && total > limit ? " over" : "";
      parts.push(
        makeSvg("rect", { x: x(from), y, height: 16, class: `bar${over}`,
          width: Math.max(bytes ? 1 : 0, x(from + bytes) - x(from)) }),
        makeSvg("text", { x: x0 - 6, y: y + 13, "text-anchor": "end" }, item),
        makeSvg("text", { x: width - 2, y: y + 13, "text-anchor": "end" },
          gigabytes(bytes)));
    });
    if (run) {
      const y = 20 + 26 * all.length;
      parts.push(
        makeSvg("line", { x1: x(total), x2: x(total + 1e9 * run.beside_gb),
          y1: y + 8, y2: y + 8, class: "beside" }),
        makeSvg("circle", { cx: x(1e9 * run.gb), cy: y + 8, r: 6,
          class: "measured" }),
        makeSvg("text", { x: x0 - 6, y: y + 13, "text-anchor": "end" },
          "measured"),
        makeSvg("text", { x: width - 2, y: y + 13, "text-anchor": "end" },
          gigabytes(1e9 * run.gb)));
    }
    const words = limit < most ? ["start", 4] : ["end", -4];
    parts.push(
      makeSvg("line", { x1: x(limit), x2: x(limit), y1: 4, y2: height - 8,
        class: "limit" }),
      makeSvg("text", { x: x(limit) + words[1], y: 12,
        "text-anchor": words[0] }, gigabytes(limit).replace(/\.0+ /, " ")));
    svg.setAttribute("height", height);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", "Bars: " + all.map(([item, bytes]) =>
      `${item} ${gigabytes(bytes)}`).join(", ") +
      (run ? `. Measured: LitGPT, ${gigabytes(1e9 * run.gb)}.` : "."));
    svg.replaceChildren(...parts);
  }

  const changes = keys.map((key) => `change:${key}`);
  changes.forEach((change) => model.on(change, show));
  show();
  const unwatch = watchWidth(svg, (now) => { width = now; show(); });
  return () => {
    unwatch();
    changes.forEach((change) => model.off(change, show));
  };
}

export default { render };
