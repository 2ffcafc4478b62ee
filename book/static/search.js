/* The search page: ranks the sections that book/_ext/search_index.py wrote.

   A word counts more the rarer it is in the book, and where it stands: in a
   heading most, in the page's title, in prose, in the names of code least
   (BM25 with a weight for each place). A section that holds more of the words
   asked for goes before one that holds one of them often. Names with
   underscores are one word, and findable by their parts; "GPT-2" is also
   "gpt2". Stemmer and stopwords are Sphinx's (language_data.js).

   searchBook("what is rank") returns the pages found, the best first. */
(() => {
  "use strict";
  const WEIGHTS = { heading: 6, title: 2, text: 1, names: 0.3 };
  const K1 = 1.2; // how soon repeating a word stops to count
  const B = 0.4; // how much a long section pays for its length
  const ASIDE = 0.5; // exercises, lists of links: explanations go first
  const ASIDES = /^(Exercise |Further reading|Check yourself)/;
  const ASIDE_PAGES = ["book/bibliography.html", "book/evidence.html"];
  const QUIZ = "check-yourself"; // its texts are kept like the names of code
  const NEXT = 0.3; // what a page's next best section adds to its score
  const LESSON = 1.25; // where things are explained, not repeated in brief
  const PAIR = 0.25; // two words of the question side by side in a heading
  const UNKNOWN = 4; // how rare a word is that the book does not know
  const OTHER_WORD = 0.5; // how much a word counts that is only meant
  const SECTIONS_SHOWN = 3; // of one page
  const NOISE = 0.1; // pages below this share of the best are left out
  const EXCERPT = 220; // characters
  const BEFORE = 60; // of them before the first word found
  const WORD = /[\p{L}\p{N}_]+(?:-[\p{L}\p{N}_]+)*/gu;
  const ASKING = new Set(("what why how when where which who do does did can " +
    "could should would i my me you your we our it its am has have than vs " +
    "versus so from about").split(" "));
  // What a reader may call it: what the book calls it.
  const MEANT = { rank: "r", use: "choose", pick: "choose", select: "choose",
    slower: "slow latency overhead", slow: "latency", speed: "time fast",
    inference: "serving request", decrease: "fall", converge: "fall",
    stuck: "fall", vram: "memory", oom: "memory", checkpoint: "saved file",
    tenant: "customer", swap: "switching", install: "setup",
    format: "file", many: "sixteen" };
  const GREEK = { α: "alpha", β: "beta", γ: "gamma", δ: "delta", η: "eta",
    λ: "lambda", σ: "sigma", τ: "tau" };

  const stemmer = new Stemmer();
  const stem = (word) => stemmer.stemWord(word
    .replace(/[α-ω]/g, (sign) => GREEK[sign] ?? sign)
    .replace(/is(ation|e|ed|er|es|ing)$/, "iz$1") // as Americans spell
    .replace(/our(s|ed|ing)?$/, "or$1"));

  // ["target_modules", "target", "modul"]; ["gpt2", "gpt", "2"]
  const formsOf = new Map();
  function forms(word) {
    if (!formsOf.has(word)) {
      const parts = word.split(/[-_]+/).filter(Boolean);
      const whole = stem(word.replaceAll("-", ""));
      formsOf.set(word, parts.length < 2 ? [whole] :
        [...new Set([whole, ...parts.map(stem)])]);
    }
    return formsOf.get(word);
  }

  const words = (text) => text.toLowerCase().match(WORD) ?? [];

  let pages = [], sections = [], holders = new Map(), meanLength = 1;

  globalThis.searchIn = (book) => {
    pages = book.pages.map(([address, title]) => ({ address, title }));
    sections = book.sections.map(([page, id, title, text, names]) =>
      ({ page: pages[page], id, title, text, names, length: 0,
        heading: words(title).filter((word) =>
          !/^\d+$/.test(word) && !stopwords.includes(word)),
        aside: ASIDES.test(title) ||
          ASIDE_PAGES.includes(pages[page].address) }));
    for (const section of sections) {
      const at = { heading: section.title, text: section.text,
        names: section.names, title: section.page.title };
      const counts = new Map();
      for (const [place, text] of Object.entries(at)) {
        for (const word of words(text)) {
          for (const form of forms(word)) {
            counts.set(form, (counts.get(form) ?? 0) + WEIGHTS[place]);
          }
          if (place === "text") section.length += 1;
        }
      }
      for (const [form, count] of counts) {
        if (!holders.has(form)) holders.set(form, new Map());
        holders.get(form).set(section, count);
      }
    }
    meanLength = sections.reduce((sum, s) => sum + s.length, 0) /
      sections.length;
  };

  // Whether one letter was added, lost or changed between two words.
  function near(a, b) {
    let i = 0, j = 0;
    while (i < a.length && a[i] === b[i]) i += 1;
    while (j < Math.min(a.length, b.length) - i && a.at(-1 - j) === b.at(-1 - j)) {
      j += 1;
    }
    return Math.max(a.length, b.length) - i - j <= 1;
  }

  // The words of the book meant by one that it does not hold.
  function instead(term) {
    if (term.length < 3) return [];
    const known = [...holders.keys()];
    const longer = known.filter((word) => word.startsWith(term));
    if (longer.length) return longer;
    return known.filter((word) => word.length > 3 &&
      (near(word, term) || (term.startsWith(word) && /^[a-z]+$/.test(word))));
  }

  // terms: [Map of words that count as one asked for: how much, ...]
  // pairs: words that stand side by side in the question
  function parse(query) {
    const asked = words(query);
    const telling = asked.filter((word) =>
      !ASKING.has(word) && !stopwords.includes(word));
    const terms = new Map();
    for (const word of telling.length ? telling : asked) {
      const [whole, ...parts] = forms(word);
      const known = holders.has(whole) || !parts.length;
      for (const term of known ? [whole] : parts) {
        const same = holders.has(term) ? [term] : instead(term);
        const meant = words(MEANT[word] ?? "").map(stem);
        terms.set(term, new Map([
          ...meant.filter((other) => holders.has(other))
            .map((other) => [other, OTHER_WORD]),
          ...same.map((form) => [form, 1]),
        ]));
      }
    }
    const pairs = asked.slice(1).map((word, i) => `${asked[i]} ${word}`);
    return { terms: [...terms.values()], pairs };
  }

  // How rare a word is in the book.
  function rarity(word) {
    const n = holders.get(word).size;
    return Math.log(1 + (sections.length - n + 0.5) / (n + 0.5));
  }

  function score(section, { terms, pairs }) {
    const norm = K1 * (1 - B + B * section.length / meanLength);
    let sum = 0, held = 0, all = 0;
    for (const alternatives of terms) {
      let most = 0, gained = 0, worth = alternatives.size ? 0 : UNKNOWN;
      for (const [word, weight] of alternatives) {
        const value = weight * rarity(word);
        const count = holders.get(word).get(section) ?? 0;
        worth = Math.max(worth, value);
        most = Math.max(most, count && value);
        gained = Math.max(gained, value * count * (K1 + 1) / (count + norm));
      }
      sum += gained;
      held += most;
      all += worth;
    }
    if (!held) return 0;
    const asked = new Set(terms.flatMap((term) => [...term.keys()]));
    const heading = section.heading.filter((word) =>
      forms(word).some((form) => asked.has(form)));
    const about = heading.length / (section.heading.length || 1);
    const phrase = ` ${words(section.title).join(" ")} `;
    const said = pairs.filter((pair) => phrase.includes(` ${pair} `)).length;
    return sum * (held / all) ** 2 * (1 + about) * (1 + PAIR * said) *
      (section.aside ? ASIDE : 1) *
      (section.page.address.startsWith("notebooks/") ? LESSON : 1);
  }

  globalThis.searchBook = (query) => {
    const asked = parse(query);
    const found = new Map();
    for (const section of sections) {
      const hit = { section, score: score(section, asked) };
      if (!hit.score) continue;
      const page = section.page;
      if (!found.has(page)) found.set(page, { ...page, hits: [] });
      found.get(page).hits.push(hit);
    }
    const ranked = [...found.values()];
    for (const page of ranked) {
      page.hits.sort((a, b) => b.score - a.score);
      page.hits.length = Math.min(page.hits.length, SECTIONS_SHOWN);
      page.score = page.hits.reduceRight((sum, hit) =>
        hit.score + NEXT * sum, 0);
    }
    ranked.sort((a, b) => b.score - a.score);
    return ranked.filter((page) => page.score > ranked[0].score * NOISE);
  };

  // ---- the page ----------------------------------------------------------

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  // A piece of the section's text with the words asked for marked.
  function excerpt(section, { terms }) {
    const asked = new Map();
    for (const [number, term] of terms.entries()) {
      for (const [form, weight] of term) {
        if (weight === 1) asked.set(form, number);
      }
    }
    const termOf = (word) => {
      const form = forms(word.toLowerCase()).find((one) => asked.has(one));
      return asked.get(form);
    };
    const hits = [...section.text.matchAll(WORD)]
      .map((match) => ({ at: match.index, word: match[0],
        term: termOf(match[0]) }))
      .filter((hit) => hit.term !== undefined);
    if (!hits.length) {
      const names = section.names.split(" ")
        .filter((name) => termOf(name) !== undefined).slice(0, 5);
      if (names.length) {
        const where = section.id === QUIZ ? "Asked: " : "In the code: ";
        return make("p", { className: "search-excerpt" }, where,
          ...names.flatMap((name, i) =>
            [i ? ", " : "", make("code", { textContent: name })]));
      }
    }
    let start = 0, most = 0;
    for (const { at } of hits) {
      const seen = new Set(hits
        .filter((hit) => hit.at >= at && hit.at < at + EXCERPT - BEFORE)
        .map((hit) => hit.term));
      if (seen.size > most) [start, most] = [at, seen.size];
    }
    start = Math.max(0, start - BEFORE);
    if (start) start = section.text.indexOf(" ", start) + 1;
    let end = Math.min(section.text.length, start + EXCERPT);
    if (end < section.text.length) end = section.text.lastIndexOf(" ", end);
    const parts = [start ? "… " : ""];
    let at = start;
    for (const hit of hits) {
      if (hit.at < start || hit.at + hit.word.length > end) continue;
      parts.push(section.text.slice(at, hit.at),
        make("mark", { textContent: hit.word }));
      at = hit.at + hit.word.length;
    }
    parts.push(section.text.slice(at, end),
      end < section.text.length ? " …" : "");
    return make("p", { className: "search-excerpt" }, ...parts);
  }

  function item(page, asked) {
    const hits = page.hits.filter((hit, i) =>
      !i || hit.score > page.hits[0].score / 2);
    const parts = hits.map(({ section }) => make("li", {},
      section.id ? make("a", { href: `${page.address}#${section.id}`,
        textContent: section.title }) : "",
      excerpt(section, asked)));
    const link = make("a", { href: page.address, textContent: page.title });
    return make("li", {}, make("h2", {}, link), make("ul", {}, ...parts));
  }

  function show(query) {
    for (const field of document.querySelectorAll('input[name="q"]')) {
      field.value = query;
    }
    if (!query.trim()) return;
    document.title = `${query} – ${document.title}`;
    const asked = parse(query);
    const found = searchBook(query);
    const pagesFound = `${found.length} page${found.length === 1 ? "" : "s"}`;
    const count = make("p", { className: "search-count", role: "status" },
      found.length ? `${pagesFound} for “${query}”, the best first` :
        `Nothing found for “${query}”. The words of this book are in the `);
    if (!found.length) {
      count.append(make("a", { href: "book/glossary.html",
        textContent: "glossary" }), ".");
    }
    document.getElementById("search-results").append(count,
      make("ol", { className: "search-pages" },
        ...found.map((page) => item(page, asked))));
  }

  addEventListener("DOMContentLoaded", () =>
    show(new URLSearchParams(location.search).get("q") ?? ""));
})();
