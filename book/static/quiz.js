/* Turns the questions of a lesson into ones that answer back.

   The page holds each question whole: text, choices, and every explanation in
   a <details> (book/_ext/quiz.py writes it). This file moves those nodes into
   a form; a verdict is a copy of the explanations that belong to the answer.
   Nothing is fetched or sent. Answers are kept by progress.js, if it is there.

   <div class="quiz-question" data-key="01_rank/title" data-kind="single"
        data-edition="1a2b3c4d" data-right="[2]">
   data-right: places of the right choices on the page, from 0; in an ordering
   the right place of each item. A numeric question has data-numbers, a pair
   [value, tolerance] for each explanation ([null, null]: any other number). */
(() => {
  "use strict";

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  // The number in what a reader typed, or a sentence that says what to do.
  function read(typed, unit) {
    let text = typed.trim().replace(/[\u2212\u2013]/g, "-");
    if (unit && text.toLowerCase().endsWith(unit.toLowerCase())) {
      text = text.slice(0, -unit.length);
    }
    text = text.replace(/[\s_\u00a0\u2009\u202f]/g, "").replace(/%$/, "");
    if (!text) return "Type a number first.";
    const plain = text.replace(/,(?=\d{3}(\D|$))/g, (comma, next, at) =>
      /^[-+]?\d{1,3}(,\d{3})*$/.test(text.slice(0, at)) ? "" : comma);
    if (/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(plain)) {
      return Number(plain);
    }
    return /^[-+]?\d+,\d+$/.test(text)
      ? `Is the comma in ${text} a decimal point? Then write ` +
          `${text.replace(",", ".")}.`
      : `“${typed.trim()}” is not a number that can be read here; write it ` +
          "like 0.5, 1,234.5 or 1e3.";
  }

  // Each kind builds its controls and returns how to get, set and judge an
  // answer. judge: {right, say, why}, with the explanations to show.
  const KINDS = {
    single: choices("radio"),
    multiple: choices("checkbox"),
    numeric,
    order,
  };

  function choices(type) {
    return ({ id, items, right, reasons, add }) => {
      const labels = [];
      const boxes = items.map((item, i) => {
        const box = make("input", {
          type, name: id, id: `${id}-${i}`, value: i,
        });
        const label = make("label", { htmlFor: box.id });
        label.append(...textOf(item));
        add(make("div", { className: "quiz-option" }, box, label));
        labels.push(label);
        return box;
      });
      const ticked = () => boxes.flatMap((box, i) => (box.checked ? [i] : []));
      return {
        get: () => (ticked().length ? ticked() : null),
        nothing: type === "radio"
          ? "Choose one first."
          : "Tick at least one first.",
        set: (answer) => boxes.forEach((box, i) => {
          box.checked = answer.includes(i);
        }),
        judge(answer) {
          if (type === "radio") {
            return { right: right.includes(answer[0]), why: [answer[0]] };
          }
          const off = items.flatMap((_, i) =>
            answer.includes(i) === right.includes(i) ? [] : [i]);
          const n = items.length - off.length;
          return off.length
            ? {
                right: false,
                say: `${n} of ${items.length} judged rightly. Look again at:`,
                why: off,
              }
            : { right: true, say: "All right.", why: answer };
        },
        name: (i) => (type === "radio" ? null : copies(labels[i])),
        fits: (answer) => Array.isArray(answer) && answer.length > 0 &&
          answer.every((i) => i in boxes),
        reasons,
      };
    };
  }

  function numeric({ id, numbers, unit, add, reasons, right }) {
    const field = make("input", {
      type: "text", id: `${id}-number`, autocomplete: "off", size: 14,
    });
    field.inputMode = "text"; // a phone's number pad has no e and no minus
    const label = make("label", { htmlFor: field.id },
      unit ? `Your number, in ${unit}` : "Your number");
    add(make("div", { className: "quiz-number" }, label, field));
    const near = (value) => numbers.findIndex(([number, tolerance]) =>
      number === null ||
        Math.abs(value - number) <= tolerance * (1 + 1e-9));
    return {
      get: () => (field.value.trim() ? field.value : null),
      nothing: "Type a number first.",
      set: (answer) => { field.value = answer; },
      judge(answer) {
        const value = read(answer, unit);
        if (typeof value === "string") return { say: value, why: [] };
        const first = right[0];
        const [number, tolerance] = numbers[first];
        const hit = Math.abs(value - number) <= tolerance * (1 + 1e-9);
        const at = hit ? first : near(value);
        return { right: hit, why: [at] };
      },
      fits: (answer) => typeof answer === "string",
      reasons,
    };
  }

  function order({ items, right, reasons, add, say }) {
    const list = make("ol", { className: "quiz-order" });
    const rows = items.map((item, i) => {
      const text = make("span", { className: "quiz-item" }, ...textOf(item));
      const plain = text.textContent.trim();
      const row = make("li", {}, text);
      row.dataset.item = i;
      const buttons = make("span", { className: "quiz-moves" });
      for (const [word, sign, step] of [["up", "↑", -1], ["down", "↓", 1]]) {
        const button = make("button", { type: "button" }, sign);
        button.setAttribute("aria-label", `Move ${word}: ${plain}`);
        button.dataset.step = step;
        button.addEventListener("click", () => {
          const all = [...list.children];
          const at = all.indexOf(row);
          const to = at + step;
          if (to < 0 || to >= all.length) return;
          if (step < 0) all[to].before(row);
          else all[to].after(row);
          button.focus(); // moving a node takes the focus away
          ends();
          say(`${plain}: now ${to + 1} of ${all.length}.`);
        });
        buttons.append(button);
      }
      row.append(buttons);
      return row;
    });
    const ends = () => {
      // Kept focusable, so that a row that arrives does not lose the focus.
      [...list.children].forEach((row, at, all) => {
        const [up, down] = row.querySelectorAll("button");
        up.setAttribute("aria-disabled", at === 0);
        down.setAttribute("aria-disabled", at === all.length - 1);
      });
    };
    list.append(...rows);
    ends();
    add(list);
    const now = () => [...list.children].map((row) => Number(row.dataset.item));
    return {
      get: now,
      set(answer) {
        list.append(...answer.map((i) => rows[i]));
        ends();
      },
      judge(answer) {
        const wrong = answer.filter((item, place) => right[item] !== place);
        if (!wrong.length) {
          const why = right.map((_, i) => i);
          return { right: true, say: "All in order.", why };
        }
        return {
          right: false,
          say: `${answer.length - wrong.length} of ${answer.length} stand in ` +
            "their place. About the first that does not:",
          why: [right[wrong[0]]],
        };
      },
      fits: (answer) => Array.isArray(answer) &&
        answer.length === rows.length &&
        rows.every((_, i) => answer.includes(i)),
      reasons,
    };
  }

  // The inline content of a list item, to be moved.
  function textOf(item) {
    return [...(item.querySelector(":scope > p") ?? item).childNodes];
  }

  function copies(element) {
    const copy = element.cloneNode(true);
    for (const one of copy.querySelectorAll("[id]")) one.removeAttribute("id");
    return [...copy.childNodes];
  }

  function start(question) {
    const data = question.dataset;
    const store = globalThis.courseProgress;
    const parse = (name) => JSON.parse(data[name] ?? "[]");
    const id = `quiz-${data.key.replace("/", "-")}`;
    const body = question.querySelector(".quiz-text");
    const list = question.querySelector(".quiz-choices");
    const details = question.querySelector("details");
    const title = question.querySelector(".quiz-title");
    body.id = `${id}-text`;

    const field = make("fieldset", { className: "quiz-form" });
    field.setAttribute("aria-describedby", body.id);
    const legend = make("legend", {}, ...title.childNodes);
    field.append(legend, body);
    const verdict = make("div", { className: "quiz-verdict" });
    const moved = make("p", { className: "quiz-heard" });
    moved.setAttribute("aria-live", "polite");

    const items = [...(list?.querySelectorAll(":scope > ol > li") ?? [])];
    const control = KINDS[data.kind]({
      id,
      items,
      right: parse("right"),
      numbers: parse("numbers"),
      unit: data.unit ?? "",
      reasons: [...details.querySelectorAll(":scope > ol > li")],
      add: (node) => field.append(node),
      say(text) {
        moved.textContent = text;
        clear();
      },
    });

    function clear() { // a verdict is about the answer that was checked
      verdict.replaceChildren();
      verdict.dataset.right = question.dataset.state = "";
    }

    function show(answer) {
      const { right, say, why } = control.judge(answer);
      const parts = why.map((i) => {
        const part = make("div", { className: "quiz-why" });
        const name = control.name?.(i);
        if (name) part.append(make("p", { className: "quiz-name" }, ...name));
        part.append(...copies(control.reasons[i]));
        return part;
      });
      if (say) parts.unshift(make("p", {}, say));
      verdict.replaceChildren(...parts);
      verdict.dataset.right = right ?? "";
      question.dataset.state = right ? "right" : right === false ? "wrong" : "";
      // A verdict that was copied before MathJax came by.
      globalThis.MathJax?.typesetPromise?.([verdict]);
      return right;
    }

    const check = make("button", { type: "button", className: "quiz-check" },
      "Check");
    check.addEventListener("click", () => {
      const answer = control.get();
      if (answer === null) {
        clear();
        verdict.append(make("p", {}, control.nothing));
        return;
      }
      const right = show(answer);
      if (right !== undefined) {
        store?.keep(data.key, { edition: data.edition, answer, right });
      }
    });
    field.addEventListener("input", clear);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.matches("input")) {
        event.preventDefault();
        check.click();
      }
    });
    field.append(moved, check, verdict);
    title.remove();
    list?.remove();
    details.before(field);

    const kept = store?.answer(data.key, data.edition);
    if (kept && control.fits(kept.answer)) {
      control.set(kept.answer);
      show(kept.answer);
    }
    verdict.setAttribute("role", "status"); // from now on it is read out
  }

  const all = () => document.querySelectorAll(".quiz-question").forEach(start);
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", all);
  } else {
    all();
  }
})();
