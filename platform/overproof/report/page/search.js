// How the best loss fell while the search went on.
{
  let steps = 0;
  const seen = DATA.trials.map((trial, i) => {
    steps += trial.steps;
    return { trial, number: i + 1, steps };
  }).filter(({ trial }) => trial.validation_loss !== null);

  const plot = (id, key, name, by) => chart(id, 260, (svg, box) => {
    if (!seen.length) return;
    const losses = seen.map(({ trial }) => trial.validation_loss);
    const down = paddedDomain(losses);
    const x = Object.assign(scale([0, Math.max(...seen.map((each) => each[key]))], [box.left, box.right]), { whole: true });
    const y = scale(down.domain, [box.bottom, box.top + 8], down.log);
    drawAxes(svg, x, y, box, { x: name, y: `best validation loss so far, by ${by}` });
    let best = Infinity;
    let path = "";
    for (const each of seen) {
      const { trial } = each;
      const finished = trial.status === "finished";
      const spot = { cx: x(each[key]), cy: y(trial.validation_loss), r: seen.length > 60 ? 2.5 : 4 };
      const point = add(svg, "circle", { class: `point filled role-${trial.role}${finished ? "" : " stopped"}`, ...spot });
      addTooltip(point, [trial.name, `${formatValue(trial.validation_loss)} after ${formatValue(trial.steps)} steps, ${trial.status}`]);
      if (finished && trial.validation_loss < best) {
        path += path ? `H${spot.cx}V${spot.cy}` : `M${spot.cx},${spot.cy}`;
        best = trial.validation_loss;
      }
    }
    if (path) add(svg, "path", { class: "best", d: `${path}H${box.right}` });
  });

  plot("by-trial", "number", "trial", "trial");
  plot("by-steps", "steps", "training steps of all trials so far", "training spent");
}
