// On paper nothing can be unfolded, and dark costs ink: before printing this
// opens every <details> and turns the theme to light; afterwards all is back.
(() => {
  "use strict";
  const root = document.documentElement;
  let closed = [];
  let theme;

  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("main details:not([open])")];
    for (const details of closed) details.open = true;
    theme = root.dataset.theme;
    root.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
    root.dataset.theme = theme;
  });
})();
