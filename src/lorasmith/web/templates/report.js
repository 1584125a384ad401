// Tables: a click on a heading sorts (up, down, back to the first order), a search field and
// choices filter, and a long table shows a page of its rows at a time. The rows of a long table
// come as data beside it, since thousands of rows as elements would make the page slow.
const collator = new Intl.Collator(undefined, { numeric: true });

// As Python formats the numbers of the rows that are in the page from the start.
const format = (value, column) => {
  const thousands = (text) => {
    const [whole, rest] = text.split(".");
    const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
    return rest === undefined ? grouped : `${grouped}.${rest}`;
  };
  const size = Math.abs(value);
  let text;
  if (column.integer) text = thousands(String(size));
  else if (column.digits !== null) text = thousands(size.toFixed(column.digits));
  else if (size >= 1e4) text = thousands(size.toFixed(0));
  else if (size === 0 || size >= 1e-4) text = String(Number(size.toPrecision(4)));
  else {
    const [digits, power] = size.toExponential(3).split("e-");
    text = `${Number(digits)}e\u2212${power.padStart(2, "0")}`;
  }
  return value < 0 ? `\u2212${text}` : text;
};

// One row: what it sorts by, what it reads as, and its element once it is needed.
const fromElement = (element) => ({
  keys: Array.from(element.cells, (cell) =>
    cell.dataset.sort === undefined ? cell.textContent.trim() : Number(cell.dataset.sort)),
  texts: Array.from(element.cells, (cell) => cell.textContent.trim()),
  element: () => element,
});

const fromData = (columns) => (cells) => {
  const parts = cells.map((cell, index) => {
    if (cell === null) return { text: "–", key: "–", tone: "neutral" };
    if (typeof cell === "string") return { text: cell, key: cell, tone: "neutral" };
    if (typeof cell === "number") return { text: format(cell, columns[index]), key: cell, tone: "neutral" };
    return { text: cell.s, key: cell.n === undefined ? cell.s : Number(cell.n), tone: cell.t };
  });
  let made = null;
  const element = () => {
    if (made) return made;
    made = document.createElement("tr");
    parts.forEach((part, index) => {
      const cell = made.insertCell();
      cell.className = `${columns[index].kind} ${part.tone}`;
      cell.dataset.label = columns[index].label;
      cell.append(Object.assign(document.createElement("span"), { textContent: part.text }));
    });
    return made;
  };
  return { keys: parts.map((part) => part.key), texts: parts.map((part) => part.text), element };
};

const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return collator.compare(a, b);
};

document.querySelectorAll("table[data-sortable], table[data-search], table[data-page]").forEach((table) => {
  const block = table.closest(".block");
  const body = table.tBodies[0];
  const headings = Array.from(table.tHead.rows[0].cells);
  const data = block.querySelector("script.rows");
  const given = data ? JSON.parse(data.textContent) : null;
  const original = given
    ? given.rows.map(fromData(given.columns))
    : Array.from(body.rows).filter((row) => !row.querySelector(".empty")).map(fromElement);
  const pageSize = Number(table.dataset.page) || Infinity;
  let sorted = original;
  let page = 0;

  const controls = block.querySelector(".controls");
  const search = controls && controls.querySelector("input");
  const status = block.querySelector("output");
  const pager = block.querySelector(".pager");
  const choices = [];

  const show = () => {
    const words = search ? search.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
    const rows = sorted.filter((row) =>
      choices.every(([index, select]) => !select.value || row.texts[index] === select.value) &&
      (!words.length || ((all) => words.every((word) => all.includes(word)))(row.texts.join("\n").toLowerCase())));
    const pages = Math.max(1, Math.ceil(rows.length / pageSize));
    page = Math.min(page, pages - 1);
    const first = pageSize === Infinity ? 0 : page * pageSize;
    const shown = rows.slice(first, first + pageSize);
    if (original.length) body.replaceChildren(...shown.map((row) => row.element()));
    const of = rows.length === original.length ? "" : ` (of ${original.length.toLocaleString("en-US")})`;
    const range = pages > 1 ? `rows ${first + 1}\u2013${first + shown.length} of ` : "";
    if (status) status.textContent = `${range}${rows.length.toLocaleString("en-US")}${range ? "" : " rows"}${of}`;
    if (pager) {
      pager.hidden = pages === 1;
      const [back, forth] = pager.querySelectorAll("button");
      back.disabled = page === 0;
      forth.disabled = page === pages - 1;
    }
  };

  if (controls) {
    controls.hidden = false;
    search.addEventListener("input", () => { page = 0; show(); });
    headings.forEach((heading, index) => {
      if (!heading.classList.contains("text")) return;
      const values = [...new Set(original.map((row) => row.texts[index]))].sort(collator.compare);
      if (values.length < 2 || values.length > 16) return;
      const label = heading.textContent.trim();
      const select = document.createElement("select");
      select.setAttribute("aria-label", label);
      select.append(new Option(`${label}: all`, ""), ...values.map((value) => new Option(value, value)));
      select.addEventListener("change", () => { page = 0; show(); });
      controls.insertBefore(select, status);
      choices.push([index, select]);
    });
  }
  if (pager) {
    const [back, forth] = pager.querySelectorAll("button");
    back.addEventListener("click", () => { page -= 1; show(); });
    forth.addEventListener("click", () => { page += 1; show(); });
  }
  headings.forEach((heading, index) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const now = heading.getAttribute("aria-sort");
      const next = now === "ascending" ? "descending" : now === "descending" ? null : "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      sorted = original;
      if (next) {
        heading.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        sorted = original.slice().sort((a, b) => sign * compare(a.keys[index], b.keys[index]));
      }
      page = 0;
      show();
    });
  });
  if (controls || given) show();
});
