"""Runs a sweep that was pickled on three nodes of its own, and kills a node that trains. Run by test_kills.py.

python node_driver.py CONTEXT
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from overproof.distill.sweep import sweep
from overproof.stage_context import ProgressEvent, TaskProgress

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@dataclasses.dataclass
class Harm:
    """A progress that kills a node once half a trial is done."""

    cluster: Any
    nodes: list[Any]
    steps: int
    killed: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, event: ProgressEvent) -> None:
        late = isinstance(event, TaskProgress) and event.task == "sweep" and event.done > self.steps // 2
        if late and not self.killed:
            alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
            training = {a["Address"]["NodeID"] for a in alive if "Trainable" in a["ActorClassName"]}
            node = next(node for node in self.nodes if node.node_id in training)
            self.killed.append(node.node_id)
            self.cluster.remove_node(node, allow_graceful=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, ()  # Tune writes its callbacks down, and never reads them


def main(pickled: Path) -> None:
    context = pickle.loads(pickled.read_bytes())
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    harm = Harm(cluster, [cluster.add_node(**NODE) for _ in range(2)], context.recipe.sweep.steps)
    ray.init(address=cluster.address, log_to_driver=False)
    metrics = sweep(dataclasses.replace(context, progress=harm))
    print(json.dumps({"killed": harm.killed, **metrics}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
