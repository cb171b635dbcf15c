"use strict";
// The dump's search: a line stays if it holds every word and its role is ticked; folds with a hit open.
(() => {
  const box = document.getElementById("search");
  if (!box) return;
  const groups = [...document.querySelectorAll("details.group")].map((fold) => ({
    fold,
    open: fold.open,
    lines: [...fold.querySelectorAll("li")].map((item) => ({ item, text: item.textContent.toLowerCase(), role: item.className })),
  }));
  const roles = [...document.querySelectorAll("input[name=role]")];
  const found = document.getElementById("found");

  const search = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = new Set(roles.filter((role) => role.checked).map((role) => role.value));
    let total = 0;
    for (const group of groups) {
      let hits = 0;
      for (const { item, text, role } of group.lines) {
        const hit = shown.has(role) && words.every((word) => text.includes(word));
        item.hidden = !hit;
        hits += hit;
      }
      group.fold.hidden = hits === 0;
      group.fold.open = words.length > 0 ? hits > 0 : group.open;
      total += hits;
    }
    found.textContent = words.length || shown.size < roles.length ? `${total} nodes found` : "";
  };
  // A link to a node opens the fold that the node is in.
  const reveal = () => {
    const item = location.hash.startsWith("#n-") && document.getElementById(location.hash.slice(1));
    if (!item) return;
    item.closest("details").open = true;
    item.scrollIntoView({ block: "center" });
  };
  box.form.addEventListener("submit", (event) => event.preventDefault());
  box.addEventListener("input", search);
  roles.forEach((role) => role.addEventListener("change", search));
  addEventListener("hashchange", reveal);
  const asked = new URLSearchParams(location.search).get("search");
  if (asked) box.value = asked;
  search();
  reveal();
})();
