// The losses of every run by step.
{
  const order = { trial: 0, kept: 1, teacher: 2, control: 3, student: 4 };
  const curves = [...DATA.curves].sort((a, b) => order[a.role] - order[b.role]);

  const draw = (svg, box) => {
    const split = byId("split").value;
    const shown = curves.filter((curve) => curve[split].length);
    if (!shown.length) return;
    const steps = shown.flatMap((curve) => curve[split].map(([step]) => step));
    const losses = shown.flatMap((curve) => curve[split].map(([, loss]) => loss)).filter((loss) => loss > 0);
    const down = losses.length ? paddedDomain(losses, true) : { domain: [0.1, 1], log: true };
    const x = Object.assign(scale([0, Math.max(...steps)], [box.left, box.right]), { whole: true });
    const y = scale(down.domain, [box.bottom, box.top + 8], down.log);
    drawAxes(svg, x, y, box, { x: "step", y: split === "train" ? "training loss" : "validation loss" });
    for (const curve of shown) {
      const points = curve[split].filter(([, loss]) => loss > 0).map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`);
      const known = DATA.trials.some((trial) => trial.name === curve.name);
      const off = known && !selection.has(curve.name) ? " off" : "";
      const line = add(svg, "polyline", { class: `curve role-${curve.role}${off}`, points: points.join(" ") });
      const [last] = curve[split].slice(-1);
      if (points.length === 1) add(svg, "circle", { class: `point filled role-${curve.role}${off}`, cx: x(last[0]), cy: y(last[1]), r: 3 });
      line.addEventListener("pointerenter", () => line.classList.add("hot"));
      line.addEventListener("pointerleave", () => line.classList.remove("hot"));
      addTooltip(line, [curve.name, `${formatValue(last[1])} at step ${formatValue(last[0])}`]);
    }
    svg.dataset.split = split;
  };

  const redraw = chart("curves", 360, draw);
  byId("split").addEventListener("change", redraw);
  document.addEventListener("selection", redraw);
}
