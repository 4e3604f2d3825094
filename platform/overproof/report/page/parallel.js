// One line for each trial through its settings and its results; brushes on the axes select.
{
  const keys = [...new Set(DATA.trials.flatMap((trial) => Object.keys(trial.values)))];
  const columns = [
    ...keys.map((key) => ({ name: key, of: (trial) => trial.values[key] ?? null })),
    ...["parameters", "steps", "validation_loss"].map((key) => ({ name: key, of: (trial) => trial[key] })),
  ].filter(({ of }) => new Set(DATA.trials.map(of)).size > 1);
  const brushes = new Map(); // column name -> [top, bottom] as shares of the axis
  const GAP = 116; // pixels between axes at least

  // An axis maps a value to a share of its length, 0 at the top; words and truth values stand in their order.
  for (const column of columns) {
    const values = DATA.trials.map(column.of).filter((value) => value !== null);
    if (values.length && values.every((value) => typeof value === "number")) {
      const around = paddedDomain(values);
      column.at = scale([Math.min(...values), Math.max(...values)], [1, 0], around.log);
      column.at.whole = values.every(Number.isInteger);
      const distinct = [...new Set(values)];
      column.ticks = distinct.length <= 6 ? distinct : ticks(column.at, 5);
    } else {
      const words = [...new Set(values.map(String))].sort();
      column.at = (value) => (words.length > 1 ? words.indexOf(String(value)) / (words.length - 1) : 0.5);
      column.ticks = words;
    }
  }

  const test = (trial) => columns.every((column) => {
    const brush = brushes.get(column.name);
    if (!brush) return true;
    const value = column.of(trial);
    return value !== null && column.at(value) >= brush[0] - 1e-9 && column.at(value) <= brush[1] + 1e-9;
  });
  const publish = () => {
    const names = new Set(DATA.trials.filter(test).map((trial) => trial.name));
    select((name) => names.has(name));
  };

  const redraw = chart("parallel", 320, (svg, box) => {
    if (!columns.length) { add(svg, "text", { x: 8, y: 30 }, "Every trial had the same settings."); return; }
    const width = Math.max(box.width, columns.length * GAP);
    svg.setAttribute("width", width);
    svg.setAttribute("viewBox", `0 0 ${width} ${box.height}`);
    const [top, bottom] = [50, box.height - 16];
    const gap = (width - 120) / Math.max(1, columns.length - 1);
    const y = (share) => top + share * (bottom - top);
    const at = (i) => 60 + i * gap;
    const ranked = [...DATA.trials].sort((a, b) => (b.validation_loss ?? Infinity) - (a.validation_loss ?? Infinity));
    for (const trial of ranked) {
      const path = columns.map((column, i) => ({ i, value: column.of(trial), column })).filter(({ value }) => value !== null)
        .map(({ i, value, column }, n) => `${n ? "L" : "M"}${at(i)},${y(column.at(value))}`).join("");
      const off = selection.has(trial.name) ? "" : " off";
      const line = add(svg, "path", { class: `curve role-${trial.role}${off}`, d: path, "data-trial": trial.name });
      addTooltip(line, [trial.name, ...columns.map((column) => `${column.name} ${formatValue(column.of(trial))}`)]);
    }
    columns.forEach((column, i) => axis(svg, column, i, at(i), y, { top, bottom }));
  });

  const axis = (svg, column, i, x, y, { top, bottom }) => {
    add(svg, "line", { class: "axis", x1: x, x2: x, y1: top, y2: bottom });
    add(svg, "text", { class: "label", x, y: i % 2 ? 14 : 32, "text-anchor": "middle" }, column.name.replaceAll("_", " "));
    for (const tick of column.ticks) {
      const group = add(svg, "g");
      const { x: left, y: upper, width, height } = add(group, "text", { x: x + 8, y: y(column.at(tick)) + 4 }, formatValue(tick)).getBBox();
      const back = add(group, "rect", { class: "back", x: left - 2, y: upper, width: width + 4, height }); // no line strikes it out
      group.prepend(back);
    }
    const drawn = add(svg, "rect", { class: "brush", x: x - 9, width: 18, visibility: "hidden" });
    const show = () => {
      const brush = brushes.get(column.name);
      drawn.setAttribute("visibility", brush ? "visible" : "hidden");
      if (brush) { drawn.setAttribute("y", y(brush[0])); drawn.setAttribute("height", Math.max(2, y(brush[1]) - y(brush[0]))); }
    };
    show();
    const handle = add(svg, "rect", { class: "handle", x: x - 14, width: 28, y: top - 6, height: bottom - top + 12, "data-axis": column.name });
    const share = (event) => Math.min(1, Math.max(0, (event.clientY - svg.getBoundingClientRect().top - top) / (bottom - top)));
    let from = null;
    handle.addEventListener("pointerdown", (event) => { from = share(event); handle.setPointerCapture(event.pointerId); event.preventDefault(); });
    handle.addEventListener("pointermove", (event) => {
      if (from === null) return;
      brushes.set(column.name, [from, share(event)].sort((a, b) => a - b));
      show();
    });
    handle.addEventListener("pointerup", (event) => {
      if (from === null) return;
      if (Math.abs(share(event) - from) < 0.015) brushes.delete(column.name); // a click
      from = null;
      publish();
    });
  };

  document.addEventListener("selection", redraw);
  byId("clear").addEventListener("click", () => { brushes.clear(); publish(); });
}
