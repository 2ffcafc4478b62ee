// Recorded runs of a policy: score and wish against KL, answers at each point.
// What a run is: reward_explorer.py.

function render({ model, el }) {
  const runs = model.get("runs");
  const points = () => runs[model.get("run")];
  const at = () => Math.min(model.get("point"), points().length - 1);

  const select = make("select", {}, ...Object.keys(runs).map((name) =>
    make("option", { value: name }, name)));
  select.addEventListener("change", () => {
    model.set("run", select.value);
    model.save_changes();
  });
  const slider = make("input", { type: "range", min: 0, step: 1 });
  slider.addEventListener("input", () => {
    model.set("point", Number(slider.value));
    model.save_changes();
  });
  const controls = make("div", { class: "rew-controls" },
    make("label", {}, make("span", {}, "run"), select),
    make("label", {}, make("span", {}, "round"), slider));

  const said = make("output", { "aria-live": "polite" });
  const texts = make("div");
  const svg = makeSvg("svg", { role: "img", class: "rew-drawing", height: 250 });
  const { details } = dataTable("The same as a table", "", [], []);
  const box = details.querySelector(".lfs-scroll");
  const note = make("p", { class: "lfs-note" }, "Recorded. Solid: score, in standard " +
    "deviations. Dashed: wish, the share of words in short sentences. Both over KL, " +
    "in nats per answer. The prompt of an answer is in italics.");
  startWidget(el, "lfs-reward", model.get("label"));
  el.append(controls, svg, said, texts, note, details);

  let width = 640;
  function draw(now) {
    width = now;
    const all = Object.values(runs).flat();
    const most = Math.max(...all.map((p) => p.kl), 1);
    const [low, high] = [Math.min(...all.map((p) => p.score), 0),
      Math.max(...all.map((p) => p.score), 1)];
    const x = (p) => 40 + (width - 84) * Math.max(p.kl, 0) / most;
    const ys = {
      score: (p) => 215 - 190 * (p.score - low) / (high - low),
      rule: (p) => 215 - 190 * p.rule };
    const text = (px, py, said, anchor) => makeSvg("text",
      { x: px, y: py, "text-anchor": anchor }, said);
    svg.setAttribute("viewBox", `0 0 ${width} 250`);
    svg.replaceChildren(
      makeSvg("path", { class: "rew-axis", d: `M40,25V215H${width - 44}V25` }),
      text(36, 29, high.toFixed(0), "end"), text(36, 219, low.toFixed(0), "end"),
      text(width - 40, 29, "1", "start"), text(width - 40, 219, "0", "start"),
      text(40, 14, "score", "middle"), text(width - 44, 14, "wish", "middle"),
      text(40, 235, "0", "middle"), text(width - 44, 235, most.toFixed(0), "middle"),
      text(width / 2, 247, "KL, nats per answer", "middle"));
    for (const key of ["score", "rule"]) {
      const mine = key === "rule" ? " rew-wish" : "";
      svg.append(makeSvg("path", { class: `rew-line${mine}`,
        d: points().map((p, i) => `${i ? "L" : "M"}${x(p)},${ys[key](p)}`).join("") }));
      points().forEach((p, i) => svg.append(makeSvg("circle", { cx: x(p), cy: ys[key](p),
        r: i === at() ? 6 : 3.5,
        class: `rew-dot${mine}${i === at() ? " rew-here" : ""}` })));
    }
  }

  function show() {
    const here = points()[at()];
    select.value = model.get("run");
    slider.max = points().length - 1;
    slider.value = at();
    slider.setAttribute("aria-valuetext", `round ${here.step}`);
    said.textContent = `Round ${here.step}: score ${here.score.toFixed(1)}, wish ` +
      `${percent(here.rule, 0)}, KL ${here.kl.toFixed(0)} nats.`;
    svg.setAttribute("aria-label", `Score and wish against KL for the run ` +
      `${model.get("run")}; the table below has the numbers.`);
    texts.replaceChildren(...here.samples.map(([prompt, answer]) =>
      make("blockquote", {}, make("i", {}, prompt), answer)));
    const made = dataTable("", `Run ${model.get("run")}`,
      ["round", "score", "wish", "KL"], points().map((p) => [String(p.step),
        p.score.toFixed(1), percent(p.rule, 0), p.kl.toFixed(1)]));
    made.body[at()].classList.add("lfs-here");
    box.replaceChildren(made.details.querySelector("table"));
    draw(width);
  }
  for (const name of ["run", "point"]) model.on(`change:${name}`, show);
  show();
  const unwatch = watchWidth(svg, draw);
  return () => {
    unwatch();
    for (const name of ["run", "point"]) model.off(`change:${name}`, show);
  };
}

export default { render };
