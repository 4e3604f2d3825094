"""What pruning, distillation and fewer bits come to in a finished run, beside the same size trained from scratch.

    .venv/bin/overproof run jobs/recipes/smollm2.yaml       # or sweep; --set sweep.steps=48 in both takes half as long
    .venv/bin/overproof sweep jobs/recipes/smollm2.yaml --set 'sweep.students=[{name: scratch, teacher_weight: 0.8,
        model: {kind: llama, hidden_size: 576, intermediate_size: 1024, layers: 20, heads: 9, kv_heads: 3}}]'
    .venv/bin/python benchmarks/pruned.py store [--run smollm2]

Prints a Markdown table of every student of every sweep of the run, by what it learnt from so many tokens, and one of
every file of its newest evaluation, if there is one (`overproof sweep` stops before). Each student has a control, which
learns as long from the data alone.
"""

from __future__ import annotations

import argparse
import json

from measuring import table

from overproof.artifacts import Artifact, Store
from overproof.data.manifest import Manifest
from overproof.evaluate.metrics import REPORT, Report
from overproof.evaluate.variant_table import markdown_lines, variant_table
from overproof.files import read_json


def trials(sweep: Artifact) -> list[dict[str, object]]:
    """Of a sweep, its control among them."""
    found = json.loads((sweep.local("trials.json") / "trials.json").read_text(encoding="utf-8"))
    control = found["control"] | {"name": f"{found['winner']}, from the data alone"}
    return [*found["trials"], control]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--run", default="smollm2")
    given = parser.parse_args()
    store = Store(given.store)
    positions = Manifest.read(store.get(f"{given.run}/prepare")).positions
    sweeps = [each for each in store.artifacts() if (each.record.recipe, each.record.stage) == (given.run, "sweep")]
    table(
        ("student", "parameters", "steps", "tokens", "validation loss, nats", "CPU s"),
        [
            (
                str(trial["name"]), f"{trial['parameters']:,}", f"{trial['steps']:,}",
                f"{int(trial['steps']) * sweep.record.config['sweep']['batch_size'] * positions:,}",  # type: ignore[call-overload, operator]
                f"{trial['validation_loss']:.4f}", f"{trial['cpu_seconds']:,.0f}",
            )
            for sweep in sweeps
            for trial in trials(sweep)
        ],
    )  # fmt: skip
    evaluated = [
        each for each in store.artifacts() if (each.record.recipe, each.record.stage) == (given.run, "evaluate")
    ]
    for line in markdown_lines(variant_table(read_json(Report, evaluated[-1].local() / REPORT))) if evaluated else ():
        print(line)


if __name__ == "__main__":
    main()
