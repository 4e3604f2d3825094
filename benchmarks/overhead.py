"""What a trial costs beside its training: our sweep against stock Ray Tune with Ray Train, and against Optuna alone.

    .venv/bin/python benchmarks/overhead.py [--repeats 5] [--trials 24] [--stock-trials 6] [--work-s 1]

Prints one Markdown table. Each trial trains a small vision transformer on handwritten digits for about a second, two at
a time. Ideal is the sum of the trials' own training seconds over two. With start-up everything counts from when the
driver's process was up (imports, Ray); without it, from when the first two trials were over. About 8 minutes, and 1
more where the store has no teacher yet.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measuring import HERE, child, interleaved, machine, say, spread, table
from students import SOURCES, digits, made, options

PROCESSES = 2
FIRST_STEPS = 100  # to learn how many take a second
NAMES = {
    "ours": "ours",
    "optuna": "Optuna, two processes, journal file",
    "stock": "stock Ray Tune, a TorchTrainer for each trial",
}


def measured(found: dict[str, Any]) -> dict[str, float]:
    """Trials in a minute and wall time against the ideal, with start-up and without."""
    ends, seconds = found["ends"], found["seconds"]
    ideal_s = statistics.mean(seconds) / PROCESSES  # for each trial
    whole_s, later_s = found["over"] - found["up"], ends[-1] - ends[PROCESSES - 1]
    later = len(ends) - PROCESSES
    return {
        "trial_s": statistics.median(seconds),
        "whole_s": whole_s,
        "whole": whole_s / (len(ends) * ideal_s),
        "later": later_s / (later * ideal_s),
        "whole_per_min": 60 * len(ends) / whole_s,
        "later_per_min": 60 * later / later_s,
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--stock-trials", type=int, default=6)
    parser.add_argument("--work-s", type=float, default=1.0, help="of training in a trial, about")
    given = parser.parse_args()
    if min(given.trials, given.stock_trials) <= PROCESSES:
        parser.error(f"--trials and --stock-trials: expected more than the {PROCESSES} that start first")
    given.steps = FIRST_STEPS
    recipe = digits(given)
    made(recipe, "cache")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:

        def run(who: str, trials: int) -> dict[str, Any]:
            command = [sys.executable, HERE / "sweeps" / "trials.py", who, file.name, trials]
            return child(command, given.threads, PYTHONPATH=SOURCES)

        def write(steps: int) -> None:
            changes = {"steps": steps, "validate_every": steps}
            settings = recipe.sweep.model_copy(update=changes)
            Path(file.name).write_text(recipe.model_copy(update={"sweep": settings}).model_dump_json())

        write(FIRST_STEPS)
        steps = max(1, round(FIRST_STEPS * given.work_s / run("alone", 3)["seconds"][-1]))
        say(f"{steps} steps in a trial")
        write(steps)
        trials = {"ours": given.trials, "optuna": given.trials, "stock": given.stock_trials}
        found = interleaved(given.repeats, {who: partial(run, who, count) for who, count in trials.items()})
    rows = {who: [measured(each) for each in runs] for who, runs in found.items()}
    print(f"{machine(given.threads)}, {PROCESSES} trials at a time of {steps} steps; medians of {given.repeats} (least "
          "to most); our control, which the others lack, is not counted\n")  # fmt: skip
    head = ("who", "trials", "training of one, s", "wall ÷ ideal, with start-up", "without",
            "trials a minute, with start-up", "without", "ours ÷ it, with start-up", "without")  # fmt: skip
    table(head, [line(who, trials[who], rows) for who in rows])


def line(who: str, trials: int, rows: dict[str, list[dict[str, float]]]) -> list[str]:
    own = rows[who]
    ratios = [
        statistics.median(a[key] / b[key] for a, b in zip(rows["ours"], own, strict=True))
        for key in ("whole_per_min", "later_per_min")
    ]
    cells = [spread(own, key, digits) for key, digits in
             (("trial_s", 2), ("whole", 2), ("later", 2), ("whole_per_min", 1), ("later_per_min", 1))]  # fmt: skip
    return [NAMES[who], str(trials), *cells, *(f"{ratio:.2f}" for ratio in ratios)]


if __name__ == "__main__":
    main()
