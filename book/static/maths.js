// A formula wider than its column scrolls; make it reachable by keyboard too.
(() => {
  const mark = () => {
    for (const el of document.querySelectorAll('mjx-container[display="true"]')) {
      if (el.scrollWidth > el.clientWidth) el.tabIndex = 0;
      else el.removeAttribute("tabindex");
    }
  };
  addEventListener("load", () => {
    globalThis.MathJax?.startup?.promise?.then(() => {
      mark();
      addEventListener("resize", mark);
    });
  });
})();
