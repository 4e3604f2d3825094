"""Makes the teacher's cache as a job of a cluster would, or only holds its place. Run by test_together.py.

python captor.py ADDRESS make PICKLED    prints what was made, as JSON
python captor.py ADDRESS hold            says when it holds "a thing", and is then killed
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import ray

from overproof.cluster import ray_cluster
from overproof.pipeline import STAGES, PlannedStage, run_stage


def main(address: str, what: str, *pickled: str) -> None:
    ray.init(address=address, log_to_driver=False)
    if what == "hold":
        with ray_cluster.cluster_lock("here", "a thing", print):
            print("held", flush=True)
            time.sleep(float(sys.stdin.readline()))  # what it does when another has begun to wait
            os.kill(os.getpid(), signal.SIGKILL)
    config, fingerprint, parents, recipe, store, done = pickle.loads(Path(pickled[0]).read_bytes())
    stage = next(stage for stage in STAGES if stage.name == "cache")
    artifact = run_stage(PlannedStage(stage, config, fingerprint, parents, None), recipe, store, done)
    print(json.dumps({"id": artifact.id, "record": artifact.record.model_dump()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
