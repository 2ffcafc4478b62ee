// Shared by every widget of the book: base.py puts it before the widget's code.
// No imports. The code runs from a blob: address, with no server or network.

// make("p", { class: "x" }, "text", child): an element with its children.
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

// The same for a part of a drawing.
function makeSvg(tag, attributes = {}, ...children) {
  const space = "http://www.w3.org/2000/svg";
  return fill(document.createElementNS(space, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  node.append(...children);
  return node;
}

// Two widgets on a page, or two views of one, must not share an id.
function uniqueId(name) {
  return `${name}-${Math.random().toString(36).slice(2, 10)}`;
}

// A Bytes trait arrives as a DataView that may start inside a larger buffer.
function typedArray(view, Type) {
  const { buffer, byteOffset, byteLength } = view;
  return new Type(buffer.slice(byteOffset, byteOffset + byteLength));
}

function count(number) {
  return number.toLocaleString("en-US");
}

// Never rounds up to "100.0 %" nor down to "0.0 %".
function percent(share, digits = 1) {
  const step = 10 ** -digits;
  const p = 100 * share;
  if (p > 0 && p < step / 2) return `under ${step} %`;
  if (p < 100 && p > 100 - step / 2) return `over ${100 - step} %`;
  return `${p.toFixed(digits)} %`;
}

// Frame, title and keys. JupyterLab would take the arrow keys to fold headings.
function startWidget(el, name, title) {
  el.classList.add("lfs", name);
  fill(el, { role: "group", "aria-label": title }, [
    make("div", { class: "lfs-title", "aria-hidden": "true" }, title)]);
  el.addEventListener("keydown", (event) => event.stopPropagation());
}

// Draws again at the width that a drawing has on the page: text keeps its size
// because one unit of the drawing is one pixel. Returns what ends it.
function watchWidth(svg, draw) {
  let width = 0;
  const watch = new ResizeObserver(() => {
    const now = Math.round(svg.getBoundingClientRect().width);
    if (now < 160 || now === width) return; // 160: hidden, or not laid out
    width = now;
    draw(now);
  });
  watch.observe(svg);
  return () => watch.disconnect();
}

// The text alternative: a table that anyone can open. The first cell of a row
// is its name. Returned with its rows, so that a widget can mark one.
function dataTable(summary, caption, head, rows) {
  const line = (cells, first, rest, scope) =>
    make("tr", {}, ...cells.map((cell, i) =>
      make(i ? rest : first, i && rest === "td" ? {} : { scope }, cell)));
  const body = rows.map((cells) => line(cells, "th", "td", "row"));
  const table = make("table", {},
    make("caption", {}, caption),
    make("thead", {}, line(head, "th", "th", "col")),
    make("tbody", {}, ...body));
  const box = make("div", { class: "lfs-scroll", tabindex: 0 }, table);
  const details = make("details", {}, make("summary", {}, summary), box);
  return { details, body };
}
