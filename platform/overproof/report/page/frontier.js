// Quality against a cost. Members of the frontier are joined; what another file beats is faint.
if (DATA.files) {
  const { rows, planes, quality, chosen } = DATA.files;
  const less = !quality.higher_is_better;
  const standingLabels = { certain: "on the frontier for certain", open: "more test units would tell", beaten: "beaten for certain" };

  const draw = (svg, box) => {
    const axis = byId("axis").value;
    const plane = planes[axis];
    const along = paddedDomain(rows.map((row) => row[axis]));
    const ends = rows.flatMap((row) => [row.low ?? row.quality, row.high ?? row.quality]);
    const x = scale(along.domain, [box.left, box.right], along.log);
    const y = scale(paddedDomain(ends, false).domain, [box.bottom, box.top + 8]);
    const better = less ? "less is better" : "more is better";
    drawAxes(svg, x, y, box, { x: plane.label + (along.log ? " (log scale)" : ""), y: `${quality.title}, ${better}` });
    staircase(svg, box, x, y, axis);
    const labels = [];
    for (const row of [...rows].sort((a, b) => plane.frontier.includes(a.name) - plane.frontier.includes(b.name))) {
      const member = plane.frontier.includes(row.name);
      const [px, py] = [x(row[axis]), y(row.quality)];
      const group = add(svg, "g", { class: `role-${row.role}${member ? "" : " beaten"}`, tabindex: 0, "data-file": row.name });
      if (row.low !== null) {
        const [top, bottom] = [y(row.high), y(row.low)];
        add(group, "path", { class: "whisker", d: `M${px},${top}V${bottom}M${px - 4},${top}h8M${px - 4},${bottom}h8` });
      }
      add(group, "circle", { class: `point${row.candidate ? " filled" : ""}`, cx: px, cy: py, r: 6 });
      if (row.name === chosen) add(group, "circle", { class: "ring", cx: px, cy: py, r: 10 });
      const gate = row.passed === null ? "" : row.passed ? "passed the gate" : "the gate refused it";
      const interval = row.low === null ? "" : ` (${formatValue(row.low)} to ${formatValue(row.high)})`;
      addTooltip(group, [row.name, `${formatValue(row.quality)}${interval}`, `${formatValue(row[axis])}: ${plane.label}`, standingLabels[plane.standing[row.name]], gate, row.name === chosen ? "packaged" : ""]);
      if (rows.length <= 16 || member) labels.push({ group, text: row.name, px, py });
    }
    placeLabels(labels.reverse(), rows.map((row) => [x(row[axis]), y(row.quality)]), box); // the frontier's own first
    svg.dataset.axis = axis;
    volume(plane);
  };

  const staircase = (svg, box, x, y, axis) => {
    const members = rows.filter((row) => planes[axis].frontier.includes(row.name)).sort((a, b) => a[axis] - b[axis] || a.quality - b.quality);
    const steps = members.map((row, i) => (i ? `H${x(row[axis])}V${y(row.quality)}` : `M${x(row[axis])},${y(row.quality)}`));
    add(svg, "path", { class: "staircase", d: `${steps.join("")}H${box.right}` });
  };

  // Each name as near to its point as there is room, the nearest place first: over no other name and no marker.
  const placeLabels = (labels, markers, box) => {
    const taken = markers.map(([px, py]) => [px - 8, py - 8, px + 8, py + 8]);
    const free = ([left, top, right, bottom]) =>
      left >= box.left && right <= box.right && top >= box.top - 12 && bottom <= box.bottom &&
      !taken.some((other) => left < other[2] && other[0] < right && top < other[3] && other[1] < bottom);
    for (const { group, text, px, py } of labels) {
      const node = add(group, "text", { class: "label" }, text);
      const { width, height } = node.getBBox();
      const places = [10, 16, 26, 40, 58, 80, 110, 150, 200, 260].flatMap((far) =>
        [[1, 0], [-1, 0], [1, -1], [1, 1], [-1, -1], [-1, 1], [0, -1], [0, 1]].map(([across, down]) => {
          const left = px + across * far - (width * (1 - across)) / 2;
          const top = py + down * far - (height * (1 - down)) / 2;
          return [left, top, left + width, top + height];
        }),
      );
      const place = places.find(free) ?? places[0];
      taken.push(place);
      node.setAttribute("x", place[0]);
      node.setAttribute("y", place[3] - height * 0.22);
      const [ex, ey] = [Math.min(Math.max(px, place[0]), place[2]), Math.min(Math.max(py, place[1]), place[3])];
      if (Math.hypot(ex - px, ey - py) > 16) add(group, "line", { class: "leader", x1: px, y1: py, x2: ex, y2: ey });
    }
  };

  const volume = ({ volume: found, label }) => {
    const share = (value) => (value === null ? "nothing to compare" : `${(100 * value).toFixed(1)} %`);
    byId("volume").textContent =
      `Hypervolume, the area between a frontier and a point 5 % beyond the worst file in quality and in ${label.replace(/,.*/, "")} ` +
      `(more is better): of what all students' files reach together, the best student's alone reach ${share(found.winner)}, ` +
      `the control ${share(found.control)}.`;
  };

  byId("axis").addEventListener("change", chart("plane", 400, draw));
}
