"use strict";
(() => {
  const PAGE = 20;
  const runs = JSON.parse(document.getElementById("samples").textContent);
  const list = document.getElementById("list");
  const search = document.getElementById("search");
  const choice = document.getElementById("run");
  const range = document.getElementById("range");
  const previous = document.getElementById("previous");
  const next = document.getElementById("next");
  const orders = Array.from(document.querySelectorAll("button[data-order]"));
  const byPrompt = runs.map((run) => new Map(run.rows.filter((row) => row[7] !== null).map((row) => [row[7], row])));
  const state = { run: 0, order: "file", page: 0, found: [] };

  // A row is [prompt, reference, reward, best of n, reward, policy, reward, key of the prompt in all runs].
  const gain = (row) => (row[6] === null || row[2] === null ? null : row[6] - row[2]);
  const haystack = (row) => [row[0], row[1], row[3], row[5]].join("\n").toLowerCase();

  function element(kind, name, text) {
    const made = document.createElement(kind);
    made.className = name;
    made.textContent = text;
    return made;
  }

  function answer(label, text, reward, name) {
    const box = element("div", "answer " + name, "");
    const head = element("div", "label", "");
    head.append(element("span", "", label), element("span", "", reward === null ? "no reward" : "reward " + reward.toPrecision(3)));
    const body = element("div", "text", text);
    body.dir = "auto";
    box.append(head, body);
    return box;
  }

  function card(row) {
    const made = element("article", "sample", "");
    const prompt = element("div", "prompt text", row[0]);
    prompt.dir = "auto";
    const won = gain(row);
    const sign = won === null ? "" : won > 0 ? " up" : won < 0 ? " down" : "";
    const words = won === null ? "no gain: a reward is missing" : "gain " + (won > 0 ? "+" : "") + won.toPrecision(3);
    const answers = element("div", "answers", "");
    answers.append(answer("reference", row[1], row[2], "reference"));
    if (runs[state.run].best) answers.append(answer("reference, " + runs[state.run].best, row[3], row[4], "best"));
    answers.append(answer(runs.length > 1 ? runs[state.run].name : "policy", row[5], row[6], "policy"));
    runs.forEach((other, index) => {
      const same = index === state.run ? undefined : byPrompt[index].get(row[7]);
      if (same) answers.append(answer(other.name, same[5], same[6], "other"));
    });
    made.append(prompt, element("div", "gain" + sign, words), answers);
    return made;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const start = state.page * PAGE;
    const shown = state.found.slice(start, start + PAGE);
    list.replaceChildren(...shown.map(card));
    range.textContent = shown.length
      ? `${start + 1}–${start + shown.length} of ${state.found.length}`
      : "no sample holds these words";
    previous.disabled = state.page === 0;
    next.disabled = state.page >= pages - 1;
  }

  function find() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = runs[state.run].rows;
    state.found = words.length ? rows.filter((row) => { const text = haystack(row); return words.every((word) => text.includes(word)); }) : rows.slice();
    const sign = { gain: -1, loss: 1 }[state.order];
    if (sign) {
      const key = (row) => { const won = gain(row); return won === null ? Infinity : sign * won; };
      state.found.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
    }
    state.page = 0;
    show();
  }

  function turn(by) {
    state.page += by;
    show();
    document.getElementById("side-by-side").scrollIntoView();
  }

  for (const button of orders) {
    button.addEventListener("click", () => {
      state.order = button.dataset.order;
      for (const other of orders) other.setAttribute("aria-pressed", String(other === button));
      find();
    });
  }
  runs.forEach((run, index) => {
    const option = element("option", "", run.name);
    option.value = String(index);
    choice.append(option);
  });
  choice.hidden = runs.length < 2;
  choice.addEventListener("change", () => { state.run = Number(choice.value); find(); });
  search.addEventListener("input", find);
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  find();
})();
