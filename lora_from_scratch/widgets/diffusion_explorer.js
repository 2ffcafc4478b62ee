// Stored pictures between noise and digit, under two sliders.
// The data and their meaning: diffusion_explorer.py.

function render({ model, el }) {
  const [nWeights, nStops, n, h, w] = model.get("shape");
  const weights = model.get("weights");
  const stops = model.get("stops");
  const hits = model.get("hits");
  const concept = model.get("concept");
  const label = model.get("label");
  const pixels = typedArray(model.get("pixels"), Uint8Array);
  const size = h * w;

  // A canvas per picture: rows break where the page is narrow.
  const canvases = Array.from({ length: n }, () =>
    make("canvas", { width: w, height: h }));
  const strip = make("div", { class: "dif-strip", role: "img" }, ...canvases);

  function slider(name, trait, last) {
    const id = uniqueId("dif");
    const input = make("input", { id, type: "range", min: 0, max: last, step: 1 });
    const value = make("b", { "aria-hidden": "true" });
    input.addEventListener("input", () => {
      model.set(trait, Number(input.value));
      model.save_changes();
    });
    const row = make("div", { class: "dif-control" },
      make("label", { for: id }, name), value, input);
    return { id, input, value, row };
  }
  const weight = slider("weight of the adapter", "at_weight", nWeights - 1);
  const stop = slider("steps to go", "at_stop", nStops - 1);
  const said = make("output",
    { for: `${weight.id} ${stop.id}`, "aria-live": "polite" });

  const { details, body } = dataTable(
    "Show the numbers as a table",
    `Finished pictures of ${n} that show ${concept}, by an independent judge.`,
    ["weight", `pictures of ${concept}`],
    weights.map((x, i) => [String(x), `${hits[i]} of ${n}`]));
  const note = make("p", { class: "lfs-note" },
    "All weights start from the same noise and get the same noise on the way. " +
    "Pictures were computed when the lesson ran; moving a slider shows others.");

  startWidget(el, "lfs-diffusion", label);
  el.append(strip, weight.row, stop.row, said, note, details);

  function show() {
    const i = model.get("at_weight");
    const j = model.get("at_stop");
    canvases.forEach((canvas, k) => {
      const context = canvas.getContext("2d");
      const image = context.createImageData(w, h);
      const start = ((i * nStops + j) * n + k) * size;
      for (let p = 0; p < size; p++) {
        const light = 255 - pixels[start + p];
        image.data.set([light, light, light, 255], 4 * p);
      }
      context.putImageData(image, 0, 0);
    });
    const left = stops[j] === 1 ? "1 step" : `${stops[j]} steps`;
    const x = String(weights[i]);
    weight.input.value = i;
    weight.value.textContent = x;
    weight.input.setAttribute("aria-valuetext", `weight ${x}`);
    stop.input.value = j;
    stop.value.textContent = stops[j];
    stop.input.setAttribute("aria-valuetext", `${left} to go`);
    const state = stops[j] ? `${left} to go` : "finished";
    strip.setAttribute("aria-label",
      `${n} pictures at weight ${x}, ${state}`);
    said.textContent = `Weight ${x}, ${state}. When finished, ` +
      `${hits[i]} of these ${n} show ${concept}.`;
    body.forEach((row, k) => row.classList.toggle("lfs-here", k === i));
  }
  model.on("change:at_weight change:at_stop", show);
  show();
  return () => model.off("change:at_weight change:at_stop", show);
}

export default { render };
