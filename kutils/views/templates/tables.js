(() => {
  if (window.sortableTables) return;
  window.sortableTables = true;
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const sort = (header) => {
    const body = header.closest("table").tBodies[0], column = header.cellIndex;
    const number = header.classList.contains("number");
    const was = header.getAttribute("aria-sort");
    const now = was === "ascending" || (was === "none" && number) ? "descending" : "ascending";  // high scores first
    const sign = now === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isFinite(x) && isFinite(y) ? x - y : x.localeCompare(y));
    };
    for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", now);
    body.append(...[...body.rows].sort(compare));
  };
  const found = (event) => event.target.closest?.("table.sortable thead th[aria-sort]");
  document.addEventListener("click", (event) => found(event) && sort(found(event)));
  document.addEventListener("keydown", (event) => {
    if (!found(event) || !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    sort(found(event));
  });
})();
