// Show what a linked word or a formula means: on hover, on focus, on a tap.
// The texts stand in the page (book/_ext/terms.py); Escape closes them.
(() => {
  const main = document.querySelector("main");
  if (!main || !main.showPopover) return;
  const list = document.querySelector(".symbols dl");
  const card = document.createElement("div");
  card.className = "term";
  card.role = "tooltip";
  card.popover = "manual";
  (document.querySelector(".bd-article") ?? main).append(card);

  let owner = null; // the word or formula that is explained
  let shown = null; // its text
  let closed = null; // closed by Escape: stays so until the pointer leaves
  let timer = 0;
  let tapped = false;

  // The linked word or formula that an element belongs to.
  const ownerOf = (element) =>
    element.closest?.("a[aria-describedby^='term-']") ??
    element.closest?.("[data-symbols] mjx-math, [data-symbols] mjx-assistive-mml")
      ?.closest("mjx-container") ?? null;

  const textOf = (element) => {
    const id = element.getAttribute("aria-describedby");
    if (id) return document.getElementById(id);
    const entries = document.createElement("dl");
    const numbers = element.closest("[data-symbols]").dataset.symbols;
    for (const number of numbers.split(" ")) {
      const entry = list.querySelector(`[data-symbol="${number}"]`);
      entries.append(entry.cloneNode(true));
    }
    card.replaceChildren(entries);
    return card;
  };

  // Below the word, or above it where there is no room. On a narrow screen the
  // style sheet puts the text along the edge that is farther from the word.
  const place = () => {
    if (!shown) return;
    const at = (owner.querySelector("mjx-math") ?? owner).getClientRects()[0];
    if (!at) return hide();
    shown.classList.toggle("on-top", at.top > innerHeight / 2);
    const { width, height } = shown.getBoundingClientRect();
    const right = document.documentElement.clientWidth - width - 8;
    const above = at.top - height - 4;
    const below = at.bottom + 4;
    const fits = below + height <= innerHeight || above < 0;
    shown.style.left = `${Math.max(8, Math.min(at.left, right))}px`;
    shown.style.top = `${fits ? below : above}px`;
  };

  const hide = () => {
    clearTimeout(timer);
    shown?.hidePopover();
    owner = shown = null;
  };

  const show = (element, again = false) => {
    clearTimeout(timer);
    if (owner === element) return;
    hide();
    owner = element;
    shown = textOf(element);
    shown.classList.toggle("tap-again", again);
    shown.showPopover();
    place();
  };

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const element = ownerOf(event.target);
    clearTimeout(timer);
    if (element !== closed) closed = null;
    if (element && element !== closed) {
      timer = setTimeout(show, 250, element);
    } else if (shown && !shown.contains(event.target)) {
      timer = setTimeout(hide, 250);
    }
  });
  document.documentElement.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") hide(); // a finger leaves after each tap
  });
  main.addEventListener("focusin", (event) => {
    const element = ownerOf(event.target);
    if (element?.matches("a:focus-visible")) show(element);
  });
  main.addEventListener("focusout", hide);
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !shown) return;
    closed = owner;
    hide();
  });
  // A screen reader's tap has no width, and gets the link it asked for.
  addEventListener("pointerdown", (event) => {
    tapped = event.pointerType === "touch" && event.width > 0;
  }, true);
  main.addEventListener("click", (event) => {
    const element = ownerOf(event.target);
    const link = element?.matches("a");
    if (tapped && element && element !== owner) {
      if (link) event.preventDefault(); // the second tap follows the link
      show(element, link);
    } else if (!link && !shown?.contains(event.target)) {
      hide();
    }
  });
  addEventListener("scroll", place, { capture: true, passive: true });
  addEventListener("resize", place);
})();
