// Every trial in a table that sorts, filters, and follows the brushes.
{
  const keys = [...new Set(DATA.trials.flatMap((trial) => Object.keys(trial.values)))]
    .filter((key) => new Set(DATA.trials.map((trial) => trial.values[key])).size > 1); // what all share tells nothing
  const columns = [
    ["trial", (trial) => trial.name],
    ...keys.map((key) => [key.replaceAll("_", " "), (trial) => trial.values[key] ?? null]),
    ["parameters", (trial) => trial.parameters],
    ["steps", (trial) => trial.steps],
    ["validation loss", (trial) => trial.validation_loss],
    ["seconds", (trial) => trial.seconds],
    ["CPU s", (trial) => trial.cpu_seconds],
    ["ended", (trial) => (trial.reason ? `${trial.status}: ${trial.reason}` : trial.status)],
  ].map(([name, of]) => ({ name, of }));
  const words = { winner: " (best)", kept: " (kept)" };
  const sorting = { column: columns.findIndex(({ name }) => name === "validation loss"), sign: 1 };

  const make = (parent, name, text) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  // What was not measured comes last, whichever way the others are sorted.
  const compare = (a, b) => {
    const [x, y] = [columns[sorting.column].of(a), columns[sorting.column].of(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const bothNumbers = typeof x === "number" && typeof y === "number";
    return sorting.sign * (bothNumbers ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
  };

  const fill = () => {
    const wanted = byId("find").value.trim().toLowerCase();
    const status = byId("status").value;
    const matches = (trial) => columns.some(({ of }) => formatValue(of(trial)).toLowerCase().includes(wanted));
    const rows = DATA.trials.filter((trial) => (!status || trial.status === status) && selection.has(trial.name) && matches(trial)).sort(compare);
    const body = document.createElement("tbody");
    for (const trial of [...rows, DATA.control]) {
      const row = make(body, "tr");
      row.dataset.trial = trial.name;
      columns.forEach(({ of }, i) => {
        const cell = make(row, "td");
        if (!i) make(cell, "i").className = `dot role-${trial.name === "control" ? "control" : trial.role}`;
        if (i === columns.length - 1) cell.className = "words";
        cell.append(formatValue(of(trial)) + (i ? "" : words[trial.role] ?? ""));
      });
    }
    byId("trials").tBodies[0].replaceWith(body);
    byId("count").textContent = `${rows.length} of ${DATA.trials.length} trials, and the control`;
    [...byId("trials").tHead.rows[0].cells].forEach((cell, i) => {
      if (i === sorting.column) cell.setAttribute("aria-sort", sorting.sign > 0 ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
  };

  columns.forEach(({ name }, i) => {
    const button = make(make(byId("trials").tHead.rows[0], "th"), "button", name);
    button.type = "button";
    button.addEventListener("click", () => {
      sorting.sign = sorting.column === i ? -sorting.sign : 1;
      sorting.column = i;
      fill();
    });
  });
  byId("find").addEventListener("input", fill);
  byId("status").addEventListener("change", fill);
  document.addEventListener("selection", fill);
  fill();
}
