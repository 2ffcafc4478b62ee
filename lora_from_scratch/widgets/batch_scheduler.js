// Continuous batching: who waits, the rows, the adapter slots, the padding.
// The data and their meaning: batch_scheduler.py.

const CELL = 22; // pixels from row to row, and from step to step
const PACE = 1000; // milliseconds of a step while it plays

// schedule() of batch_scheduler.py; a test compares the two. Two more things:
// why the first of the queue is held, and the slots, least recently used first.
export function schedule({ requests, maxRows, maxAdapters, policy, plans }) {
  const nameOf = (n) => requests[n][1];
  const queue = requests.map((_, n) => n)
    .sort((a, b) => requests[a][0] - requests[b][0] || a - b);
  const slots = Array(maxAdapters).fill(null);
  let order = slots.map((_, i) => i);
  let rows = []; // [request, tokens so far], in batch order
  const trace = [];
  const arrived = () => queue.filter((n) => requests[n][0] <= trace.length + 1);

  while (queue.length || rows.length) {
    const running = rows.length;
    const evicted = [];
    const joined = [];
    let held = "";

    // The slot for an adapter, or -1 if rows use them all.
    function take(name) {
      const inUse = [...rows.map(([n]) => n), ...joined].map(nameOf);
      let slot = slots.indexOf(name);
      if (slot < 0) slot = slots.indexOf(null);
      if (slot < 0) {
        slot = order.find((i) => !inUse.includes(slots[i])) ?? -1;
        if (slot < 0) return slot;
        evicted.push(slots[slot]);
      }
      slots[slot] = name;
      order = [...order.filter((i) => i !== slot), slot];
      return slot;
    }
    while (arrived().length && !held) {
      const name = nameOf(queue[0]);
      if (policy === "static" && running) held = "batch";
      else if (running + joined.length === maxRows) held = "rows";
      else if (name !== null && take(name) < 0) held = "slots";
      else joined.push(queue.shift());
    }

    const slotOf = (n) => (nameOf(n) === null ? -1 : slots.indexOf(nameOf(n)));
    joined.sort((a, b) => slotOf(a) - slotOf(b) || a - b);
    const prompts = joined.map((n) => requests[n][2]);
    const names = rows.map(([n]) => nameOf(n));
    const runs = names.filter((name, i) => name !== null && name !== names[i - 1]);
    rows = [...rows, ...joined.map((n) => [n, 0])].map(([n, t]) => [n, t + 1]);
    const batch = rows.map(([n, tokens]) =>
      [n, nameOf(n), requests[n][2] + tokens - 1]);

    const left = [];
    for (let i = rows.length - 1; i >= 0; i -= 1) {
      const [n, tokens] = rows[i];
      if (tokens < requests[n][3]) continue;
      left.push(n);
      const last = rows.pop();
      if (i < rows.length) rows[i] = last;
    }
    trace.push({
      step: trace.length + 1,
      joined: joined.map((n) => [n, nameOf(n), requests[n][2]]),
      left,
      rows: batch,
      prefill_tokens: padded(prompts),
      kv_tokens: padded(batch.map((row) => row[2])),
      slots: [...slots],
      evicted,
      plan: running ? plans[runs.length] : null,
      runs: runs.length,
      waiting: arrived().length,
      held, order,
      queue: arrived(),
    });
  }
  return trace;
}

// Useful tokens, and tokens when all are as long as the longest.
function padded(lengths) {
  return [lengths.reduce((a, b) => a + b, 0),
    lengths.length * Math.max(0, ...lengths)];
}

// What a whole schedule comes to.
function total(trace, { requests, maxRows }) {
  const sum = (value) => trace.reduce((all, now) => all + value(now), 0);
  const busy = trace.filter((now) => now.rows.length).length;
  const late = trace.flatMap((now) =>
    now.joined.map(([n]) => now.step - requests[n][0]));
  return {
    steps: trace.length,
    full: sum((now) => now.rows.length) / (busy * maxRows),
    wait: late.reduce((a, b) => a + b, 0) / late.length,
    evictions: sum((now) => now.evicted.length),
  };
}

function some(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

function list(words) {
  return words.length < 2 ? words.join("")
    : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

function render({ model, el }) {
  const label = model.get("label");
  const adapters = model.get("adapters");
  const most = model.get("most");
  const colors = model.get("colors");
  const traits = ["requests", "max_rows", "max_adapters", "policy", "step"];
  const place = (name) => adapters.indexOf(name);
  const letter = (name) => (name === null ? "–" : String.fromCharCode(65 + place(name)));
  const spoken = (name) => (name === null ? "base" : letter(name));
  const color = (name) => (name === null ? "var(--page)" : colors[place(name) % colors.length]);
  function choose(changes) {
    for (const key in changes) model.set(key, changes[key]);
    model.save_changes();
  }

  const id = uniqueId("sch");
  function field(key, name, control) {
    control.id = `${id}-${key}`;
    return make("div", { class: "sch-field" },
      make("label", { for: control.id }, ...name), control);
  }
  function menu(key, name, values, words = String) {
    const select = make("select", {}, ...values.map((value) =>
      make("option", { value }, words(value))));
    select.addEventListener("change", () => {
      stop();
      choose({ [key]: values[select.selectedIndex] });
    });
    return { select, box: field(key, [name], select) };
  }
  const upTo = (n) => Array.from({ length: n }, (_, i) => i + 1);
  const menus = {
    max_rows: menu("max_rows", "rows of the batch", upTo(most.rows)),
    max_adapters: menu("max_adapters", "adapter slots", upTo(most.adapters)),
    policy: menu("policy", "requests join", ["continuous", "static"], (policy) =>
      (policy === "static" ? "an empty batch only" : "whenever a row is free")),
  };
  function button(words, action) {
    const made = make("button", { type: "button" }, ...[words].flat());
    made.addEventListener("click", () => {
      if (made.getAttribute("aria-disabled") !== "true") action();
    });
    return made;
  }
  const chip = (name) => make("span",
    { class: "sch-chip", style: `background: ${color(name)}` }, letter(name));
  const tag = (n, name) => make("span", { class: "sch-tag" }, chip(name), ` ${n}`);

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    said.setAttribute("aria-live", "polite");
  }
  function start() {
    if (model.get("step") >= trace.length) choose({ step: 1 });
    timer = setInterval(() => {
      if (model.get("step") < trace.length) choose({ step: model.get("step") + 1 });
      if (model.get("step") >= trace.length) stop();
    }, PACE);
    play.textContent = "Pause";
    said.setAttribute("aria-live", "off");
  }
  function move(by) {
    stop();
    choose({ step: Math.max(1, Math.min(trace.length, model.get("step") + by)) });
  }
  const reset = button("Reset", () => {
    stop();
    choose({ requests: model.get("requests").slice(0, model.get("given")), step: 1 });
  });
  const back = button("Back", () => move(-1));
  const play = button("Play", () => (timer === null ? start() : stop()));
  const next = button("Step", () => move(1));
  const slider = make("input", { type: "range", min: 1, step: 1 });
  const at = make("b", { "aria-hidden": "true" });
  slider.addEventListener("input", () => {
    stop();
    choose({ step: Number(slider.value) });
  });
  const said = make("output", { for: `${id}-step`, "aria-live": "polite" });
  const whole = make("output", { class: "sch-whole", for: `${id}-policy ` +
    `${id}-max_rows ${id}-max_adapters`, "aria-live": "polite" });
  const waiting = make("p", { class: "sch-queue" });
  const places = make("ol", { class: "sch-slots" });
  const chart = drawBatch({ letter, color, choose: (step) => {
    stop();
    choose({ step });
  } });

  const sizes = { prompt: [8, most.prompt], answer: [6, most.answer] };
  const boxes = Object.entries(sizes).map(([key, [value, max]]) =>
    make("input", { type: "number", inputmode: "numeric", min: 1, max, value }));
  function add(name) {
    const requests = model.get("requests");
    const tokens = boxes.map((box) => {
      const n = Math.round(Number(box.value)) || 1;
      box.value = Math.max(1, Math.min(Number(box.max), n));
      return Number(box.value);
    });
    stop();
    const step = Math.min(model.get("step"), trace.length);
    choose({ requests: [...requests, [step + 1, name, ...tokens]] });
  }
  const adders = [...adapters, null].map((name) =>
    button([chip(name), ` ${name ?? "base model"}`], () => add(name)));

  let { details } = dataTable("Show every request as a table", " ", [], []);
  const box = details.querySelector(".lfs-scroll");
  const note = make("p", { class: "lfs-note" },
    "Computed by a model of the engine's scheduler that the tests compare " +
    "with recorded steps of the real one. Bars, the KV cache: prompt, new " +
    "tokens but the last (pale), padding (dashed). A thick edge marks a run of rows with one adapter, and " +
    "below, a request that joins. Rows of the base model are in no run. Steps " +
    "are not seconds: a long prompt makes a step longer.");

  startWidget(el, "lfs-scheduler", label);
  el.append(
    make("div", { class: "sch-controls" }, ...Object.values(menus).map((m) => m.box)),
    make("div", { class: "sch-steps" }, reset, back, play, next,
      field("step", ["step ", at], slider)),
    said, waiting, places, chart.svg, whole,
    make("fieldset", {},
      make("legend", {}, "Add a request for the next step"),
      make("div", { class: "sch-sizes" },
        field("prompt", ["prompt tokens"], boxes[0]),
        field("answer", ["new tokens"], boxes[1])),
      make("div", { class: "sch-add" }, ...adders)),
    note, details);

  let trace = [];
  function show() {
    const requests = model.get("requests");
    const s = { requests, maxRows: model.get("max_rows"),
      maxAdapters: model.get("max_adapters"), policy: model.get("policy"),
      plans: model.get("plans") };
    trace = schedule(s);
    const step = Math.min(model.get("step"), trace.length);
    const now = trace[step - 1];
    for (const key in menus) menus[key].select.value = model.get(key);
    slider.max = trace.length;
    slider.value = step;
    slider.setAttribute("aria-valuetext", `${step} of ${trace.length}`);
    at.textContent = `${step} of ${trace.length}`;
    back.setAttribute("aria-disabled", step === 1);
    next.setAttribute("aria-disabled", step === trace.length);
    for (const adder of adders) {
      adder.setAttribute("aria-disabled", requests.length >= most.requests);
    }

    said.textContent = `Step ${step} of ${trace.length}. ${sentence(s, now)}`;
    waiting.replaceChildren(
      make("b", {}, now.queue.length ? `${now.queue.length} waiting: ` : "Nobody waits."),
      ...now.queue.map((n) => tag(n, requests[n][1])));
    const before = trace[step - 2]?.slots ?? [];
    places.replaceChildren(...now.slots.map((name, i) => make("li", {},
      make("span", { class: "sch-slot" }, `slot ${i}`),
      ...(name === null ? [] : [chip(name)]), slotText(now, before[i] ?? null, i))));
    chart.show({ s, now, trace });
    const [a, b] = ["continuous", "static"].map((policy) =>
      total(schedule({ ...s, policy }), s));
    whole.textContent = `All ${requests.length} answers take ${a.steps} steps if ` +
      `requests join whenever a row is free (${percent(a.full, 0)} of the rows ` +
      `full, ${a.wait.toFixed(1)} steps of waiting on average, ` +
      `${some(a.evictions, "eviction")}), and ${b.steps} if they join an empty ` +
      `batch only (${percent(b.full, 0)}, ${b.wait.toFixed(1)} steps, ` +
      `${some(b.evictions, "eviction")}).`;

    const joins = new Map(trace.flatMap((one) => one.joined.map(([n]) => [n, one.step])));
    const ends = new Map(trace.flatMap((one) => one.left.map((n) => [n, one.step])));
    const made = dataTable("", "Steps by number; tokens of the prompt and of " +
      "the answer.", ["request", "adapter", "arrives", "prompt", "answer",
      "joins", "steps waited", "leaves"],
    requests.map(([arrival, name, prompt, answer], n) => [String(n),
      name === null ? "base model" : `${letter(name)} ${name}`, arrival, prompt,
      answer, joins.get(n), joins.get(n) - arrival, ends.get(n)]));
    made.body.forEach((row, n) => row.classList.toggle("lfs-here",
      now.rows.some(([m]) => m === n)));
    box.replaceChildren(made.details.querySelector("table"));
  }

  function slotText(now, before, i) {
    const name = now.slots[i];
    if (name === null) return " free";
    const users = now.rows.filter((row) => row[1] === name).length;
    const change = before === name ? "" : before === null ? ", just loaded"
      : `, took the place of ${letter(before)}`;
    if (users) return ` ${some(users, "row")}${change}`;
    const idle = now.order.filter((j) => now.slots[j] !== null &&
      !now.rows.some((row) => row[1] === now.slots[j]));
    return ` idle, ${idle[0] === i && !now.slots.includes(null)
      ? "the next to go" : "kept"}`;
  }

  function sentence(s, now) {
    const parts = [];
    const called = ([n, name]) => `${n} (${spoken(name)})`;
    const known = (n) => called([n, s.requests[n][1]]);
    const plural = (all) => (all.length > 1 ? "Requests" : "Request");
    const decoded = now.rows.slice(0, now.rows.length - now.joined.length);
    if (now.evicted.length) {
      parts.push(`${list(now.evicted.map(letter))} ` +
        `${now.evicted.length > 1 ? "are" : "is"} evicted.`);
    }
    if (now.joined.length) {
      const [useful, all] = now.prefill_tokens;
      parts.push(`${plural(now.joined)} ${list(now.joined.map(called))} ` +
        `${now.joined.length > 1 ? "join" : "joins"}: prefill of ` +
        `${some(useful, "token")}` +
        (all > useful ? ` and ${all - useful} of padding.` : ", no padding."));
    }
    if (decoded.length) {
      parts.push(`${some(decoded.length, "row")} ` +
        `${decoded.length > 1 ? "decode" : "decodes"} a token, ` +
        (now.runs ? `in ${some(now.runs, "run")} of adapters (${now.plan}).`
          : "all of the base model."));
    }
    if (now.left.length) {
      parts.push(`${plural(now.left)} ${list(now.left.map(known))} ` +
        `${now.left.length > 1 ? "are" : "is"} complete.`);
    }
    if (now.held) {
      parts.push(`Request ${known(now.queue[0])} waits` +
        { rows: ": no row is free.", batch: " for the whole batch to end.",
          slots: ": rows use every slot, and nobody overtakes." }[now.held]);
    }
    if (!now.rows.length) parts.push("Nothing to do until a request arrives.");
    return parts.join(" ");
  }

  const changes = traits.map((key) => `change:${key}`);
  changes.forEach((change) => model.on(change, show));
  show();
  const unwatch = watchWidth(chart.svg, chart.fit);
  return () => {
    stop();
    unwatch();
    changes.forEach((change) => model.off(change, show));
  };
}

// The rows of this step, with what they hold and the padding; below, which row
// had whom in the steps around.
function drawBatch({ letter, color, choose }) {
  const svg = makeSvg("svg", { role: "img", height: 1, class: "sch-chart" });
  let shown;
  let width = 640;
  let columns = { first: 1, n: 1 };

  function draw() {
    const { s, now, trace } = shown;
    const parts = [];
    const text = (x, y, words, anchor = "start", name = "") => parts.push(
      makeSvg("text", { x, y, "text-anchor": anchor, class: name }, words));
    const rect = (x, y, w, h, name, fill) => parts.push(makeSvg("rect",
      { x, y, width: w, height: h, class: name, ...(fill && { fill }) }));
    function cell(x, y, name) {
      rect(x, y, CELL - 2, CELL - 4, "sch-cell", color(name));
      text(x + CELL / 2 - 1, y + CELL / 2 + 2, letter(name), "middle",
        name === null ? "sch-none" : "sch-letter");
    }

    const longest = Math.max(...s.requests.map(([, , a, b]) => a + b));
    const [x0, x1] = [70, width - 92];
    const long = (tokens) => (tokens * (x1 - x0)) / longest;
    let y = 0;
    function group(title, rows) {
      text(2, y + 13, title, "start", "sch-head");
      y += 20;
      const most = Math.max(...rows.map((row) => row[2]));
      rows.forEach(([n, name, tokens], i) => {
        const prompt = s.requests[n][2];
        const [a, b] = [long(prompt), long(tokens)];
        cell(10, y, name);
        text(x0 - 8, y + 14, String(n), "end");
        rect(x0 + b, y + 3, long(most) - b, CELL - 10, "sch-padding");
        rect(x0, y + 3, a, CELL - 10, "sch-cell", color(name));
        rect(x0 + a, y + 3, b - a, CELL - 10, "sch-cell sch-made", color(name));
        text(width - 2, y + 14, `${prompt} + ${tokens - prompt + 1}` +
          (now.left.includes(n) ? ", done" : ""), "end");
        const goes = name !== null && rows[i + 1]?.[1] === name;
        if (name !== null) rect(2, y, 4, CELL - (goes ? 0 : 4), "sch-run");
        y += CELL;
      });
    }
    const n = now.rows.length - now.joined.length;
    const useful = ([some, all]) => `${some} of ${all} tokens are useful`;
    group(n ? `decode, plan: ${now.plan}` : "decode: no row", now.rows.slice(0, n));
    group(now.joined.length ? `prefill: ${useful(now.prefill_tokens)}`
      : "prefill: no row", now.rows.slice(n));
    for (let i = now.rows.length; i < s.maxRows; i += 1) {
      rect(10, y, CELL - 2, CELL - 4, "sch-padding");
      text(x0 - 32, y + 14, "free");
      y += CELL;
    }
    text(2, y + 13, `KV cache: ${useful(now.kv_tokens)}`);
    y += 20;

    y += 8;
    const m = Math.min(trace.length, Math.floor((width - 4) / CELL));
    const first = Math.max(1, Math.min(now.step - Math.floor(m / 2),
      trace.length - m + 1));
    columns = { first, n: m };
    text(2, y + 13, `the batch in steps ${first} to ${first + m - 1}`, "start",
      "sch-head");
    y += 34;
    trace.slice(first - 1, first - 1 + m).forEach((one, i) => {
      const x = 2 + i * CELL;
      text(x + CELL / 2 - 1, y - 4, String(one.step), "middle", "sch-small");
      one.rows.forEach(([, name], j) => {
        cell(x, y + j * CELL, name);
        if (j >= one.rows.length - one.joined.length) rect(x, y + j * CELL, 3, CELL - 4, "sch-run");
      });
      if (one.step === now.step) {
        rect(x - 2, y - 16, CELL + 2, s.maxRows * CELL + 16, "sch-here");
      }
    });
    y += s.maxRows * CELL + 6;
    svg.setAttribute("height", y);
    svg.setAttribute("viewBox", `0 0 ${width} ${y}`);
    svg.setAttribute("aria-label", `The batch in step ${now.step}: ` +
      (now.rows.map(([n, name, tokens]) => `request ${n}, ` +
        `${name === null ? "base" : letter(name)}, ${tokens} tokens in the cache`)
        .join("; ") || "no row") + ". The table below has every request.");
    svg.replaceChildren(...parts);
  }

  svg.addEventListener("click", (event) => {
    const { left, bottom } = svg.getBoundingClientRect();
    const above = bottom - event.clientY;
    const i = Math.floor((event.clientX - left - 1) / CELL);
    if (above > shown.s.maxRows * CELL + 24 || i < 0 || i >= columns.n) return;
    choose(columns.first + i);
  });
  return {
    svg,
    show(now) { shown = now; draw(); },
    fit(now) { width = now; draw(); },
  };
}

export default { render };
