/* Remembers which lessons were read and which questions answered.

   All of it is one text under one key of this browser's local storage. Nothing
   is sent anywhere. Where storage is blocked the pages work the same and
   forget at the next page; they say so once.

   {"version": 1,
    "read": {"01_rank": "2026-11-22"},
    "answers": {"01_rank/title": {"edition": "1a2b3c4d", "answer": [2],
                                  "right": true}}}
   answer: places of the ticked choices, the order of the items, or what was
   typed. edition: names the wording; an answer to another wording is dropped.

   quiz.js asks courseProgress.answer and .keep; quizSizes (from
   book/_ext/quiz.py) says how many questions each lesson has. */
(() => {
  "use strict";
  const KEY = "lora-from-scratch";
  const VERSION = 1;
  const LESSON = /^\d\d_[a-z0-9_]+$/;
  const ANSWER = /^\d\d_[a-z0-9_]+\/[a-z0-9-]+$/;
  const DAY = /^\d{4}-\d\d-\d\d$/;
  const PAGE = /\/notebooks\/(\d\d_[a-z0-9_]+)\.html$/;
  const sizes = globalThis.quizSizes ?? {};

  let memory = null; // what we know, where storage is blocked

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  const isObject = (value) =>
    typeof value === "object" && value !== null && !Array.isArray(value);

  // The known part of some progress; throws with a reason if it is none.
  function checked(data) {
    const no = (reason) => { throw new Error(reason); };
    if (!isObject(data)) no("it holds no object at its top");
    if (data.version !== VERSION) {
      no(`its version is ${JSON.stringify(data.version) ?? "missing"}, ` +
        `and this book reads version ${VERSION}`);
    }
    for (const part of ["read", "answers"]) {
      if (!isObject(data[part])) no(`"${part}" is missing or no object`);
    }
    for (const [lesson, day] of Object.entries(data.read)) {
      if (!LESSON.test(lesson)) no(`"read" names "${lesson}", no lesson`);
      if (!DAY.test(day)) no(`"${lesson}" was read on "${day}", no date`);
    }
    const answers = {};
    for (const [key, kept] of Object.entries(data.answers)) {
      if (!ANSWER.test(key)) no(`"answers" names "${key}", no question`);
      const { edition, answer, right } = isObject(kept) ? kept : {};
      const places = Array.isArray(answer) && answer.length < 100 &&
        answer.every((i) => Number.isInteger(i) && i >= 0);
      const typed = typeof answer === "string" && answer.length < 100;
      if (typeof edition !== "string" || typeof right !== "boolean" ||
          !(places || typed)) {
        no(`the answer to "${key}" is not complete`);
      }
      answers[key] = { edition, answer, right };
    }
    return { version: VERSION, read: { ...data.read }, answers };
  }

  const nothing = () => ({ version: VERSION, read: {}, answers: {} });

  // Damaged, or a newer book's: the next answer would write over it.
  function putAside(text) {
    try {
      localStorage.setItem(`${KEY}-unreadable`, text);
    } catch {
      // no room for it
    }
  }

  function load() {
    if (memory) return memory;
    let text = null;
    try {
      text = localStorage.getItem(KEY);
      return text === null ? nothing() : checked(JSON.parse(text));
    } catch {
      if (text !== null) putAside(text);
      return nothing(); // blocked, or put aside
    }
  }

  function save(data) {
    try {
      localStorage.setItem(KEY, JSON.stringify(data));
    } catch {
      if (!memory) sayBlocked();
      memory = data;
    }
    draw();
  }

  function sayBlocked() {
    const note = make("p", { className: "progress-note" },
      "This browser keeps nothing for this page, so ticks and answers are " +
        "forgotten when you leave it. Everything else works.");
    note.setAttribute("role", "status");
    (document.querySelector("article") ?? document.body).append(note);
  }

  function change(edit) {
    const data = load(); // anew: another tab may have written
    edit(data);
    save(data);
  }

  globalThis.courseProgress = {
    answer(key, edition) {
      const kept = load().answers[key];
      return kept?.edition === edition ? kept : null;
    },
    keep(key, kept) {
      change((data) => { data.answers[key] = kept; });
    },
  };

  // What is known of one lesson: {day, right, of}.
  function state(data, lesson) {
    const own = Object.entries(data.answers)
      .filter(([key]) => key.startsWith(`${lesson}/`));
    return {
      day: data.read[lesson],
      right: own.filter(([, kept]) => kept.right).length,
      of: sizes[lesson] ?? 0,
    };
  }

  const lessonOf = (link) =>
    PAGE.exec(new URL(link.href, location.href).pathname)?.[1];

  function drawSidebar(data) {
    for (const link of document.querySelectorAll("nav.bd-links a")) {
      const lesson = lessonOf(link);
      if (!lesson) continue;
      link.querySelector(".progress-mark")?.remove();
      const { day, right, of } = state(data, lesson);
      const signs = [day && "✓", right && of && `${right}/${of}`];
      const words = [
        day && "read",
        right && of && `${right} of ${of} answers right`,
      ];
      if (!signs.some(Boolean)) continue;
      const shown = make("span", {}, signs.filter(Boolean).join(" "));
      shown.setAttribute("aria-hidden", "true");
      link.append(make("span", { className: "progress-mark" }, shown,
        make("span", { className: "quiz-heard" },
          `, ${words.filter(Boolean).join(", ")}`)));
    }
  }

  // The button at the end of a lesson.
  function drawEnd(data) {
    const place = document.querySelector(".lesson-end");
    if (!place) return;
    const lesson = place.dataset.lesson;
    if (!place.firstChild) {
      const button = make("button", { type: "button" });
      button.addEventListener("click", () => change((now) => {
        if (now.read[lesson]) delete now.read[lesson];
        else now.read[lesson] = today();
      }));
      place.append(button);
    }
    const day = data.read[lesson];
    const button = place.firstChild;
    button.setAttribute("aria-pressed", Boolean(day));
    button.textContent = day ? `✓ Read on ${day}` : "Mark this lesson as read";
  }

  function today() {
    const now = new Date();
    const two = (n) => String(n).padStart(2, "0");
    return `${now.getFullYear()}-${two(now.getMonth() + 1)}-` +
      two(now.getDate());
  }

  // The page on progress: fill its table, and work its three buttons.
  function drawPage(data) {
    const place = document.querySelector(".progress-tools");
    if (!place) return;
    let n = 0;
    let m = 0;
    for (const row of document.querySelectorAll("article table tr")) {
      const link = row.querySelector("a");
      const lesson = link && lessonOf(link);
      if (!lesson) continue;
      const { day, right, of } = state(data, lesson);
      row.cells[1].textContent = day ?? "–";
      row.cells[2].textContent = of ? `${right || "–"} of ${of}` : "–";
      n += Boolean(day);
      m += 1;
    }
    if (!place.firstChild) place.append(...tools());
    const all = Object.values(data.answers).filter((kept) => kept.right);
    place.querySelector(".progress-sum").textContent =
      `${n} of ${count(m, "lesson")} read, ` +
      `${count(all.length, "question")} answered right.`;
  }

  function tools() {
    const sum = make("p", { className: "progress-sum" });
    const said = make("p", { className: "progress-said" });
    said.setAttribute("role", "status");
    const say = (text) => { said.textContent = text; };

    const out = make("button", { type: "button" }, "Save as a file");
    out.addEventListener("click", () => {
      const text = `${JSON.stringify(load(), null, 1)}\n`;
      const address = URL.createObjectURL(
        new Blob([text], { type: "application/json" }));
      make("a", { href: address, download: "lora-progress.json" }).click();
      URL.revokeObjectURL(address);
      say("Saved as lora-progress.json, where your browser puts downloads.");
    });

    const file = make("input", {
      type: "file", id: "progress-file", accept: ".json,application/json",
    });
    const label = make("label", { htmlFor: file.id }, "Add from a file");
    file.addEventListener("change", async () => {
      const [chosen] = file.files;
      if (!chosen) return;
      try {
        const text = await chosen.text();
        let data;
        try {
          data = JSON.parse(text);
        } catch {
          throw new Error("it is not JSON");
        }
        const added = checked(data);
        change((now) => {
          Object.assign(now.read, added.read);
          Object.assign(now.answers, added.answers);
        });
        const ticks = count(Object.keys(added.read).length, "lesson");
        const n = count(Object.keys(added.answers).length, "answer");
        say(`Added ${ticks} and ${n} from ${chosen.name}.`);
      } catch (error) {
        say(`${chosen.name} was not taken: ${error.message}. Nothing has ` +
          "changed. Choose a file that was saved on this page.");
      }
      file.value = ""; // the same file may be chosen again
    });

    const reset = make("button", { type: "button" }, "Forget everything");
    reset.addEventListener("click", () => {
      const sure = confirm("Forget all ticks and answers of this book in " +
        "this browser? This cannot be undone.");
      if (!sure) return say("Nothing was forgotten.");
      save(nothing());
      return say("Everything is forgotten.");
    });
    return [
      sum,
      make("div", { className: "progress-buttons" }, out,
        make("span", { className: "progress-file" }, label, file), reset),
      said,
    ];
  }

  function draw() {
    const data = load();
    drawSidebar(data);
    drawEnd(data);
    drawPage(data);
  }

  addEventListener("storage", (event) => {
    if (event.key === KEY || event.key === null) draw();
  });
  // A page that comes back from the browser's cache may be behind.
  addEventListener("pageshow", (event) => { if (event.persisted) draw(); });
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", draw);
  } else {
    draw();
  }
})();
