"""Random kills of a training, and whether it could always go on.

    .venv/bin/python benchmarks/kills.py --alone 200      # the loop's processes, without Ray
    .venv/bin/python benchmarks/kills.py --ray 20         # workers, nodes and drivers on a cluster of three nodes

Prints a Markdown table: kills, runs that could not go on, steps lost, seconds from a kill to the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPOSITORY = Path(__file__).parents[1]
EVERY_STEPS = 20
RECIPE = REPOSITORY / "jobs/recipes/digits.yaml"
SETTINGS = {
    "train.steps": 1_000_000,
    "train.batch_size": 12,
    "train.validate_every": 1000,
    "train.schedule": "constant",
    "train.checkpoint.every_steps": EVERY_STEPS,
    "train.max_failures": 50,
}
WAIT_S = 240.0
STALE_S = 0.7  # rows of the dead may still arrive
RUN_S = (1.0, 6.0)  # of undisturbed training before each kill


@dataclass(frozen=True)
class Kill:
    """One kill, and how it went on."""

    victim: str
    lost: int | None  # steps made again; None if it did not go on
    seconds: float


def last_step(curve: Path) -> int:
    """The newest step in a curve that is being written."""
    try:
        with curve.open("rb") as file:
            file.seek(max(0, curve.stat().st_size - 2000))
            lines = file.read().splitlines()
        return int(next(json.loads(line)["step"] for line in reversed(lines) if line.endswith(b"}")))
    except (OSError, StopIteration, ValueError):
        return 0


def alone(kills: int, dice: random.Random) -> list[Kill]:
    """Two ranks forked from this process; one is killed at a random moment, which ends the other too."""
    import deepspeed  # noqa: F401  # once for all that are forked

    from overproof.artifacts import Store
    from overproof.config import load_recipe
    from overproof.data.manifest import MANIFEST
    from overproof.registry import TASKS
    from overproof.stage_context import StageContext, no_progress
    from overproof.train.checkpoint import Checkpoints
    from overproof.train.local_launcher import LocalWorkers
    from overproof.train.train_job import SupervisedSpec, TrainJob

    done: list[Kill] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, (f"store={folder}", *(f"{k}={v}" for k, v in SETTINGS.items())))
        store = Store(folder)
        prepared_draft = store.new_writer("digits", "prepare", "a" * 64, {}, {})
        manifest = TASKS[recipe.data.kind].prepare(StageContext(recipe, {}, prepared_draft, no_progress))
        prepared_draft.hand_in(manifest.shard_entries)
        prepared_draft.write(MANIFEST, manifest.model_dump_json().encode())
        prepared = prepared_draft.commit({}, 0.0)
        draft = store.new_writer("digits", "train", "b" * 64, {}, {})
        checkpoints = Checkpoints(draft.workspace, "b" * 64, {}, {}, recipe.train.checkpoint)
        job = TrainJob(
            recipe.train, recipe.seed, prepared, draft, checkpoints, no_progress, SupervisedSpec(recipe.train.model)
        )
        curve, reached, killed_s = Path(draft.uri) / "curve.jsonl", 0, 0.0
        for index in range(kills + 1):
            group = LocalWorkers.start(job, 2)
            began_s = time.monotonic()
            while last_step(curve) <= group.resume.step and time.monotonic() - began_s < WAIT_S:
                time.sleep(0.02)
            if index:
                went_on = last_step(curve) > group.resume.step
                done.append(Kill("rank", reached - group.resume.step if went_on else None, time.monotonic() - killed_s))
                print(f"kill {index}: {done[-1]}", file=sys.stderr)
            time.sleep(dice.uniform(0.05, 1.5))
            group.processes[dice.randrange(2)].kill()
            killed_s = time.monotonic()
            group.kill()
            reached = last_step(curve)
            curve.unlink(missing_ok=True)
    return done


@contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 150 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": True, "dashboard_port": 0})
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, namespace="kills")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def under_ray(kills: int, dice: random.Random) -> list[Kill]:
    """The product's own command on a cluster of three nodes, one worker a node."""
    from ray._private.state import actors

    with tempfile.TemporaryDirectory() as folder, cluster_of(3) as cluster:
        chosen = {**SETTINGS, "store": folder, "train.workers": "[1, 3]", "train.cpus_per_worker": 2.4}
        command = [sys.executable, "-m", "overproof.cli.main", "train", str(RECIPE)]
        command += [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
        environment = os.environ | {"RAY_ADDRESS": cluster.address}

        def drive() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log, cwd=REPOSITORY)

        def found_curve() -> Path:
            return max(Path(folder).glob("digits/train-*/curve.jsonl"), key=lambda p: p.stat().st_mtime, default=Path())

        def committed() -> int:
            try:
                return int(json.loads((Path(folder) / "digits/train.work/ledger.json").read_text())["committed"])
            except (OSError, ValueError):
                return 0

        def wait_for(wanted: Callable[[], bool], limit_s: float) -> bool:
            until_s = time.monotonic() + limit_s
            while time.monotonic() < until_s:
                if wanted():
                    return True
                time.sleep(0.05)
            return False

        done: list[Kill] = []
        with (Path(folder) / "stderr").open("wb") as log:
            driver = drive()
            if not wait_for(lambda: committed() > 0, WAIT_S):
                sys.exit((Path(folder) / "stderr").read_text()[-3000:])
            for index in range(kills):
                time.sleep(dice.uniform(*RUN_S))
                kind = ("worker", "node", "driver")[index % 3]
                reached = last_step(found_curve())
                killed_s, wall = time.monotonic(), time.time()
                if kind == "worker":
                    living = [a for a in actors().values() if a["State"] == "ALIVE"]
                    pids = [a["Pid"] for a in living if a["ActorClassName"] == "RayTrainWorker"]
                    os.kill(dice.choice(pids), signal.SIGKILL)
                elif kind == "node":
                    cluster.remove_node(dice.choice(cluster.list_all_nodes()[1:]), allow_graceful=False)
                else:
                    driver.kill()
                    driver.wait()
                    driver = drive()
                time.sleep(STALE_S)
                base = committed()

                def moved(base: int = base, wall: float = wall) -> bool:
                    curve = found_curve()
                    fresh = curve.is_file() and curve.stat().st_ctime > wall + STALE_S
                    return fresh and last_step(curve) > base

                went_on = wait_for(moved, WAIT_S)
                done.append(Kill(kind, max(0, reached - base) if went_on else None, time.monotonic() - killed_s))
                print(f"kill {index + 1}: {done[-1]}", file=sys.stderr)
                if kind == "node":
                    cluster.add_node(num_cpus=4, object_store_memory=150 << 20)
            driver.kill()
            driver.wait()
    return done


def row(name: str, kills: list[Kill]) -> str:
    lost = [kill.lost for kill in kills if kill.lost is not None]
    seconds = [kill.seconds for kill in kills if kill.lost is not None]
    if not lost:
        return f"| {name} | {len(kills)} | {len(kills)} | | | | |"
    stuck = len(kills) - len(lost)
    return (f"| {name} | {len(kills)} | {stuck} | {statistics.median(lost):g} | {max(lost)} | "
            f"{statistics.median(seconds):.1f} | {max(seconds):.1f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", type=int, default=0, metavar="KILLS")
    parser.add_argument("--ray", type=int, default=0, metavar="KILLS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    rows = []
    if options.alone:
        rows.append(row("a rank, without Ray", alone(options.alone, dice)))
    if options.ray:
        found = under_ray(options.ray, dice)
        rows += [
            row(f"a {kind}, under Ray", [k for k in found if k.victim == kind]) for kind in ("worker", "node", "driver")
        ]
        rows.append(row("all, under Ray", found))
    print(f"A checkpoint every {EVERY_STEPS} steps.\n")
    print("| killed | kills | could not go on | steps lost, median | most | s to the next step, median | most |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
