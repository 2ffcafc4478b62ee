/* What tests ask of a page of the book; tests/site_pages.py puts this into it.

   Each of checks.*() returns plain data: a list of faults, or what was seen. */
"use strict";
globalThis.checks = (() => {
  const shifts = [];
  const observer = new PerformanceObserver((list) => {
    shifts.push(...list.getEntries());
  });
  observer.observe({ type: "layout-shift", buffered: true });

  const visible = (el) => el.checkVisibility(
    { checkOpacity: true, checkVisibilityCSS: true });
  const nameOf = (el) => [el.tagName.toLowerCase(), el.id && `#${el.id}`,
    ...[...el.classList].map((name) => `.${name}`)].join("");
  const textsIn = (root) => {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walk.nextNode()) {
      if (walk.currentNode.data.trim()) found.push(walk.currentNode);
    }
    return found;
  };
  const linesOf = (text) => {
    const range = document.createRange();
    range.selectNodeContents(text);
    return [...range.getClientRects()];
  };
  const article = () => document.querySelector("article") ??
    document.querySelector("main");

  // What the ancestors of something leave to see of it: clipper()(parent).
  const meet = (a, b) => ({
    left: Math.max(a.left, b.left), right: Math.min(a.right, b.right),
    top: Math.max(a.top, b.top), bottom: Math.min(a.bottom, b.bottom),
  });
  const ALL = { left: -1e6, right: 1e6, top: -1e6, bottom: 1e6 };
  const NONE = { left: 0, right: 0, top: 0, bottom: 0 };
  function clipper() {
    const clips = new Map([[null, ALL]]);
    return function clipOf(el) {
      if (!clips.has(el)) {
        const style = getComputedStyle(el);
        let clip = style.position === "fixed" ? ALL : clipOf(el.parentElement);
        const page = el === document.body || el === document.documentElement;
        const cuts = style.overflowX !== "visible" && !page;
        if (cuts || style.clipPath !== "none") {
          clip = meet(el.getBoundingClientRect(), clip);
        }
        clips.set(el, style.clip === "auto" ? clip : NONE);
      }
      return clips.get(el);
    };
  }

  // Bytes as they came over the line, and how far the layout has moved.
  function loaded() {
    const entries = [...performance.getEntriesByType("navigation"),
      ...performance.getEntriesByType("resource")];
    const sizes = entries.map((entry) => [entry.name, entry.encodedBodySize]);
    shifts.push(...observer.takeRecords());
    return {
      bytes: sizes.reduce((sum, [, size]) => sum + size, 0),
      largest: sizes.sort((a, b) => b[1] - a[1]).slice(0, 5),
      shift: shifts.reduce((sum, one) => sum + one.value, 0),
      moved: shifts.flatMap((one) => one.sources.map(({ node }) =>
        `${one.value.toFixed(3)} ${nameOf(node?.parentElement ?? node)}`)),
    };
  }

  // What is wider than the window and not inside a box that scrolls or clips.
  function stickingOut() {
    const clipped = (el) => {
      for (let at = el.parentElement; at; at = at.parentElement) {
        if (getComputedStyle(at).overflowX !== "visible") return true;
      }
      return getComputedStyle(el).position === "fixed";
    };
    const wide = [...document.querySelectorAll("main *")].filter((el) =>
      el.getBoundingClientRect().right > innerWidth + 1 && !clipped(el));
    const scrolls = document.documentElement.scrollWidth > innerWidth;
    return (scrolls ? ["the page scrolls"] : []).concat(wide.map(nameOf));
  }

  // Solutions and tables that wait for a click can be too wide as well.
  function openAll() {
    for (const details of document.querySelectorAll("main details")) {
      details.open = true;
    }
  }

  // Mark code that shows axe no new pair of colors: every kind of word in it
  // stood in an earlier piece of the same kind. Contrast is half of axe's time.
  function markRepeatedCode() {
    const known = new Set();
    for (const code of document.querySelectorAll("main pre")) {
      const box = code.closest(".cell_output, .cell_input, details") ?? code;
      const kinds = [code, ...code.querySelectorAll("*")].map((el) =>
        `${box.className} ${code.parentElement.className} ${el.className}`);
      if (kinds.every((kind) => known.has(kind))) code.dataset.repeated = "";
      for (const kind of kinds) known.add(kind);
    }
  }

  // Pairs of things that lie on each other: lines of text, pictures, formulas,
  // controls. What an ancestor clips away is not seen; of two things one may
  // hold the other. Lines of text may touch by a quarter of their height, for
  // their boxes are taller than their letters.
  function overlapping() {
    const ATOMS = "img, svg, canvas, input, select, button, textarea, " +
      "mjx-container";
    const clipOf = clipper();
    const boxes = [];
    const add = (el, rect, clip, name) => {
      const seen = meet(rect, clip);
      if (seen.right - seen.left > 2 && seen.bottom - seen.top > 2) {
        boxes.push({ el, name, ...seen });
      }
    };
    for (const el of document.querySelectorAll(ATOMS)) {
      if (!el.parentElement.closest(ATOMS) && visible(el)) {
        const clip = clipOf(el.parentElement);
        add(el, el.getBoundingClientRect(), clip, nameOf(el));
      }
    }
    for (const text of textsIn(document.body)) {
      const el = text.parentElement;
      const inside = el.closest("mjx-container, button, select, script, style");
      if (inside || !visible(el)) continue;
      for (const rect of linesOf(text)) {
        add(el, rect, clipOf(el), `“${text.data.trim().slice(0, 40)}”`);
      }
    }
    boxes.sort((a, b) => a.top - b.top);
    const found = new Set();
    let open = [];
    for (const b of boxes) {
      open = open.filter((a) => a.bottom > b.top);
      for (const a of open) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - b.top;
        const low = Math.min(a.bottom - a.top, b.bottom - b.top);
        if (wide > 2 && high > 3 && high > low / 4 &&
            !a.el.contains(b.el) && !b.el.contains(a.el)) {
          found.add(`${a.name} and ${b.name}`);
        }
      }
      open.push(b);
    }
    return [...found].slice(0, 20);
  }

  // Remember the texts of the article, those behind a click too; tools are
  // none. Then get ready to print.
  const TOOLS = "button, select, summary, label[for=progress-file], .headerlink, " +
    "mjx-assistive-mml, script, style, .d-print-none";
  const seen = (text) => visible(text.parentElement) &&
    linesOf(text).some((line) => line.width > 1 && line.height > 1);
  let texts = [], pictures = [];
  function beforePrint() {
    const closed = [...document.querySelectorAll("main details:not([open])")];
    for (const details of closed) details.open = true;
    texts = textsIn(article()).filter((text) =>
      !text.parentElement.closest(`${TOOLS}, svg`) && seen(text));
    pictures = [...article().querySelectorAll("img, svg, canvas")]
      .filter((el) => !el.parentElement.closest(`${TOOLS}, svg`) &&
        visible(el) && el.clientWidth);
    for (const details of closed) details.open = false;
    dispatchEvent(new Event("beforeprint"));
    return texts.length;
  }

  // What paper loses: such texts and pictures that are gone, and what a box or
  // the edge of the paper cuts off.
  // A text that was replaced, as a widget does, may stand in another node.
  function lostInPrint() {
    const root = article();
    const now = new Set(textsIn(root).filter(seen).map((text) => text.data));
    const gone = texts.filter((text) => !now.has(text.data));
    const drawn = pictures.filter((el) => el.isConnected &&
      !(visible(el) && el.clientWidth));
    const clipOf = clipper();
    const outside = new Set();
    const look = (el, rect, name) => {
      const clip = meet(clipOf(el), { ...ALL, right: innerWidth });
      if (clip.right > 0 && rect.right > clip.right + 1) outside.add(name);
    };
    for (const text of textsIn(root)) {
      const el = text.parentElement;
      if (el.closest(`${TOOLS}, svg, mjx-container`) || !seen(text)) continue;
      const name = `${nameOf(el)} “${text.data.trim().slice(0, 40)}”`;
      for (const line of linesOf(text)) look(el, line, name);
    }
    for (const el of root.querySelectorAll("img, svg, canvas, mjx-c, table")) {
      if (visible(el) && !el.parentElement.closest(`${TOOLS}, svg`)) {
        look(el.parentElement, el.getBoundingClientRect(), nameOf(el));
      }
    }
    return [
      ...gone.map((text) => `gone: ${text.data.trim().slice(0, 60)}`),
      ...drawn.map((el) => `gone: ${nameOf(el)}`),
      ...[...outside].map((name) => `cut off: ${name}`),
    ].slice(0, 20);
  }

  // [[class names, sign drawn], ...]
  const icons = () => [...document.querySelectorAll("i[class*=fa-]")].map(
    (el) => [el.className, getComputedStyle(el, "::before").content]);

  // What a widget says to those who do not see its picture.
  const said = (host) => [...host.querySelectorAll("output, table, " +
    "figcaption, [role=status], [role=img]")].map((el) =>
    `${el.textContent} ${el.getAttribute("aria-label")}`).join("|");

  return { loaded, markRepeatedCode, stickingOut, openAll, overlapping, beforePrint, lostInPrint,
    icons, said };
})();
