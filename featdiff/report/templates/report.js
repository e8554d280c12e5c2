"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data || !data.rows.name.length) return;

  const PER_PAGE = 50;
  const STEPS = 1000;
  const rows = data.rows;
  const levels = data.levels;
  const count = rows.name.length;
  const byId = (id) => document.getElementById(id);
  const thousands = (number) => Math.round(number).toLocaleString("en-US");
  const percent = (share) => `${Number((100 * share).toPrecision(3))}\u00a0%`;
  const texts = rows.name.map((name, i) => pathOf(i).toLowerCase());

  let rate = data.rate;
  let page = 0;
  let found = [];

  function pathOf(i) {
    const folder = rows.folders[rows.folder[i]];
    return folder ? `${folder}/${rows.name[i]}` : rows.name[i];
  }

  // ---- verdicts: as featdiff counts them, on the same numbers ----

  const isFlagged = (p) => p <= rate + data.rounding;

  function verdictOf(i) {
    if (!rows.status[i]) return "error";
    return isFlagged(levels.p[rows.p[i]]) ? "ood" : "ordinary";
  }

  function flaggedCount() {
    let flagged = 0;
    for (let k = 0; k < levels.count.length && isFlagged(levels.p[k]); k++) flagged += levels.count[k];
    return flagged;
  }

  /** The largest score that is not flagged. */
  function threshold() {
    if (!data.calibration) {
      const first = levels.count.findIndex((_, k) => !isFlagged(levels.p[k]));
      return first < 0 ? -Infinity : levels.top[first];
    }
    const scores = data.calibration.scores;
    const groups = data.calibration.groups;
    const weight = groups / scores.length;
    let reached = 0;
    while (reached + 1 < scores.length && isFlagged((1 + weight * (reached + 1)) / (groups + 1))) reached++;
    return scores[reached];
  }

  // ---- the rate ----

  const slider = byId("slider");
  const field = byId("rate");
  const answer = document.querySelector(".answer");
  const span = Math.log(data.largest / data.smallest);

  function rateOf(step) {
    if (step >= STEPS) return data.largest;
    const exact = data.smallest * Math.exp((span * step) / STEPS);
    const rounded = Number(exact.toPrecision(2));
    return Math.min(data.largest, rounded < data.smallest ? Number(exact.toPrecision(6)) : rounded);
  }

  function show(name, text) {
    for (const element of document.querySelectorAll(`[data-show="${name}"]`)) element.textContent = text;
  }

  function recount() {
    const flagged = flaggedCount();
    show("flagged", thousands(flagged));
    show("share", `${((100 * flagged) / Math.max(1, data.valid)).toFixed(1)}\u00a0%`);
    show("expected", rate * data.valid < 1 ? "one or none" : thousands(rate * data.valid));
    show("percent", percent(rate));

    const [low, high, width] = data.axis;
    const place = Math.min(1, Math.max(0, (threshold() - low) / (high - low)));
    byId("mark").setAttribute("transform", `translate(${(width * place).toFixed(1)} 0)`);

    answer.replaceChildren(`${thousands(flagged)} of ${thousands(data.valid)} images, as with `, code(`--fpr ${rate}`), ".");
  }

  function code(text) {
    const element = document.createElement("code");
    element.textContent = text;
    return element;
  }

  function setRate(value, source) {
    if (!(value > 0 && value < 1)) return;
    if (value + 1e-9 < data.smallest) {
      answer.textContent = `So few images support no rate below ${Number(data.smallest.toPrecision(2))}.`;
      return;
    }
    if (value > data.largest) {
      answer.textContent = `This page counts up to a rate of ${data.largest}.`;
      return;
    }
    rate = value;
    if (source !== field) field.value = String(rate);
    if (source !== slider) slider.value = String(Math.round((STEPS * Math.log(rate / data.smallest)) / span));
    recount();
    search(page);
  }

  // ---- the list ----

  const gallery = byId("gallery");
  const list = byId("list");
  const pages = byId("pages");
  const cards = new Map();
  for (const card of gallery.querySelectorAll(".card")) cards.set(Number(card.dataset.row), card);

  function search(toPage = 0) {
    const word = byId("search").value.trim().toLowerCase();
    const verdict = byId("verdict").value;
    const folder = byId("folder").value;
    found = [];
    for (let i = 0; i < count; i++) {
      if (word && !texts[i].includes(word)) continue;
      if (folder && rows.folder[i] !== Number(folder)) continue;
      if (verdict && verdictOf(i) !== verdict) continue;
      found.push(i);
    }
    page = Math.min(toPage, lastPage());
    draw();
  }

  const lastPage = () => Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);

  function draw() {
    const shown = found.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    const pictured = shown.filter((i) => cards.has(i));
    const others = shown.filter((i) => !cards.has(i));

    gallery.replaceChildren(...pictured.map(cardOf));
    list.hidden = !others.length;
    list.replaceChildren(...(others.length ? [tableOf(others)] : []));
    drawPages();

    const what = found.length === 1 ? "image" : "images";
    const where = found.length > PER_PAGE ? `, ${thousands(page * PER_PAGE + 1)} to ${thousands(page * PER_PAGE + shown.length)} shown` : "";
    byId("found").textContent = found.length ? `${thousands(found.length)} ${what}${where}` : "No image fits.";
  }

  const WORDS = { ood: "OOD", ordinary: "ordinary", error: "error" };

  function mark(element, i) {
    const verdict = verdictOf(i);
    element.className = `verdict ${verdict}`;
    element.textContent = WORDS[verdict];
    return element;
  }

  function cardOf(i) {
    const card = cards.get(i);
    mark(card.querySelector(".verdict"), i);
    return card;
  }

  const COLUMNS = [{ label: "p-value", text: false }, { label: "score", text: false }, ...rows.more.map(({ label, text }) => ({ label, text }))];

  function tableOf(indices) {
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const { label, text } of [{ label: "verdict", text: true }, { label: "image", text: true }, ...COLUMNS]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = label;
      if (!text) cell.className = "n";
      head.append(cell);
    }
    const body = table.createTBody();
    for (const i of indices) fill(body.insertRow(), i);
    return table;
  }

  function fill(row, i) {
    row.insertCell().append(mark(document.createElement("span"), i));
    const path = row.insertCell();
    path.className = "path";
    path.append(isolated(pathOf(i) + (rows.reason[i] ? ` (${rows.reason[i]})` : "")));

    const p = levels.p[rows.p[i]];
    numeric(row, p, 4);
    numeric(row, rows.score[i], 2);
    for (const column of rows.more) {
      if (column.text) row.insertCell().append(isolated(column.values[i]));
      else numeric(row, column.values[i], column.label.startsWith("p ") ? 4 : 2);
    }
  }

  function isolated(text) {
    const element = document.createElement("bdi");
    element.textContent = text;
    return element;
  }

  function numeric(row, value, digits) {
    const cell = row.insertCell();
    cell.className = "n";
    if (value !== null && value !== undefined) cell.textContent = value.toFixed(digits).replace(/^-(0\.0+)$/, "$1");
  }

  function drawPages() {
    pages.hidden = lastPage() === 0;
    const where = document.createElement("span");
    where.textContent = `page ${page + 1} of ${lastPage() + 1}`;
    pages.replaceChildren(
      turner("First", 0, page > 0),
      turner("Previous", page - 1, page > 0),
      where,
      turner("Next", page + 1, page < lastPage()),
      turner("Last", lastPage(), page < lastPage()),
    );
  }

  function turner(label, target, enabled) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.disabled = !enabled;
    button.addEventListener("click", () => {
      page = target;
      draw();
      byId("main").focus({ preventScroll: true });
      byId("main").scrollIntoView();
    });
    return button;
  }

  // ---- the start ----

  function fillFolders() {
    const select = byId("folder");
    const counts = new Array(rows.folders.length).fill(0);
    for (const folder of rows.folder) counts[folder]++;
    rows.folders.forEach((folder, k) => {
      const option = document.createElement("option");
      option.value = String(k);
      option.textContent = `${folder || "(the folder itself)"} (${thousands(counts[k])})`;
      select.append(option);
    });
    select.parentElement.hidden = rows.folders.length < 2;
  }

  for (const form of document.querySelectorAll("form")) {
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  fillFolders();
  if (slider) {
    slider.addEventListener("input", () => setRate(rateOf(Number(slider.value)), slider));
    field.addEventListener("input", () => setRate(Number(field.value), field));
    byId("reset").addEventListener("click", () => setRate(data.rate, null));
  }
  byId("search").addEventListener("input", () => search());
  byId("verdict").addEventListener("change", () => search());
  byId("folder").addEventListener("change", () => search());
  if (slider) setRate(rate, null);
  else search();
})();
