"use strict";
// Search: a model stays if it holds every word and its result is ticked. Sort: by the column whose title is clicked.
(() => {
  const table = document.querySelector("table.models");
  const box = document.getElementById("search");
  const found = document.getElementById("found");
  const ticks = [...document.querySelectorAll("input[name=verdict]")];
  const models = [...table.tBodies].map((body) => ({ body, text: body.textContent.toLowerCase() }));

  const search = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(ticks.filter((tick) => tick.checked).map((tick) => tick.value));
    let total = 0;
    for (const { body, text } of models) {
      const hit = wanted.has(body.dataset.verdict) && words.every((word) => text.includes(word));
      body.hidden = !hit;
      total += hit;
    }
    found.textContent = total < models.length ? `${total} of ${models.length} shown` : "";
  };

  const heads = [...table.tHead.rows[0].cells];
  const sort = (index) => {
    const head = heads[index];
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.firstElementChild.dataset.kind !== "text";
    const value = (model) => {
      const cell = model.body.rows[0].cells[index];
      return numeric ? parseFloat(cell.dataset.value) : cell.textContent;
    };
    models.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (!numeric) return (down ? -1 : 1) * a.localeCompare(b);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // no number: last
      return (down ? -1 : 1) * (a - b);
    });
    table.append(...models.map((model) => model.body));
  };

  box.form.addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("input", search);
  ticks.forEach((tick) => tick.addEventListener("change", search));
  heads.forEach((head, index) => head.firstElementChild.addEventListener("click", () => sort(index)));
  const asked = new URLSearchParams(location.search).get("search");
  if (asked) box.value = asked;
  search();
})();
