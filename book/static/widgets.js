/* Starts the widgets of a page that has no kernel.

   myst-nb writes the state of a notebook's widgets into the page, and a marker
   at each place where one was shown. This file reads both and runs the widget's
   own script (anywidget's _esm, from a blob: address), the one that also runs
   in JupyterLab. It asks for nothing over the network and works from file://.
   _config.yml: nb_ipywidgets_js: {widgets.js: {defer: ""}} */
(() => {
  "use strict";
  const MIME = "application/vnd.jupyter.widget-";

  const decode = {
    base64: (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)),
    hex: (text) => Uint8Array.from(text.match(/../g) ?? [], (x) => parseInt(x, 16)),
  };

  // What a widget's script may ask of its model; save_changes has no one to
  // tell, and two views of one model hear each other.
  class Model {
    #state;
    #listeners = new Map();

    constructor({ state, buffers = [] }) {
      this.#state = structuredClone(state);
      for (const { path, encoding, data } of buffers) {
        const parent = path.slice(0, -1).reduce((at, key) => at[key], this.#state);
        parent[path.at(-1)] = new DataView(decode[encoding](data).buffer);
      }
    }

    get(key) {
      return this.#state[key];
    }

    set(key, value) {
      if (typeof key === "object") {
        for (const one in key) this.set(one, key[one]);
      } else if (this.#state[key] !== value) {
        this.#state[key] = value;
        this.#tell(`change:${key}`, value);
        this.#tell("change");
      }
    }

    on(events, listener) {
      for (const event of events.split(" ")) {
        if (!this.#listeners.has(event)) this.#listeners.set(event, new Set());
        this.#listeners.get(event).add(listener);
      }
    }

    off(events, listener) {
      if (!events) this.#listeners.clear();
      else for (const event of events.split(" ")) {
        if (listener) this.#listeners.get(event)?.delete(listener);
        else this.#listeners.delete(event);
      }
    }

    save_changes() {}

    send() {
      console.info("A message to the kernel was dropped: there is none.");
    }

    #tell(event, value) {
      for (const listener of [...(this.#listeners.get(event) ?? [])]) {
        listener({ name: event }, value);
      }
    }
  }

  // make(key) once per key; later calls get the same result.
  function once(make) {
    const made = new Map();
    return (key, ...rest) => {
      if (!made.has(key)) made.set(key, make(key, ...rest));
      return made.get(key);
    };
  }

  const modelOf = once((id, raw) => new Model(raw));
  const addStyle = once((text) => {
    const style = document.createElement("style");
    style.textContent = text;
    document.head.append(style);
  });
  const script = once(async (text) => {
    const blob = new Blob([text], { type: "text/javascript" });
    const address = URL.createObjectURL(blob);
    const module = await import(address);
    URL.revokeObjectURL(address);
    const widget = module.default;
    return typeof widget === "function" ? widget() : widget;
  });
  const initialize = once((model, widget) => widget.initialize?.({ model }));

  async function mount(marker, models) {
    const host = document.createElement("div");
    marker.after(host);
    try {
      const id = JSON.parse(marker.textContent).model_id;
      const raw = models[id];
      if (raw?.model_module !== "anywidget") {
        host.textContent = "This output needs a running notebook.";
        return;
      }
      const model = modelOf(id, raw);
      if (model.get("_css")) addStyle(model.get("_css"));
      const widget = await script(model.get("_esm"));
      await initialize(model, widget);
      await widget.render?.({ model, el: host });
    } catch (error) {
      console.error(error);
      host.setAttribute("role", "alert");
      host.textContent = `The widget could not start: ${error.message}`;
    }
  }

  function start() {
    const all = (kind) =>
      document.querySelectorAll(`script[type="${MIME}${kind}+json"]`);
    const models = {};
    for (const stored of all("state")) {
      Object.assign(models, JSON.parse(stored.textContent).state);
    }
    // All at once, not when scrolled to: printing must find every widget drawn.
    for (const marker of all("view")) mount(marker, models);
  }

  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", start);
  } else {
    start();
  }
})();
