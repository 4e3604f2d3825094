"""Rolling updates under load that never rests: versions that come, and versions that fail and are taken back.

    .venv/bin/python benchmarks/updates.py PACKAGE OTHER [--updates 20]

PACKAGE and OTHER are two packages of one language model, or the same one twice. First so many updates from one to the
other and back. Then so many that must fail: a model that is cut off and does not load, and a canary that breaks its
limits and is rolled back automatically. Prints one Markdown table, and exits with 1 where a reply is no 2xx.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import ray
from asking import load, until
from measuring import machine, say, table

from overproof.config import Canary, Serve
from overproof.errors import InputError
from overproof.files import file_sha256
from overproof.package.contents import PACKAGE, REPORT
from overproof.package.package import open_package
from overproof.serve import server

CLIENTS = 4
SETTINGS = Serve(port=0, max_replicas=1, cpus_per_replica=0.5, slots=4)
# No version agrees with another in every comparison of sampled text, and none is as fast as this asks.
STRICT = Canary(share=0.5, compare=1.0, min_requests=10, max_slowdown=0.01)


def variant(package: Path, to: Path, id_: str, cut: bool = False) -> Path:
    """A copy under another id, whose hashes hold; ``cut`` leaves half of the model, which then does not load."""
    shutil.copytree(package, to)
    listing = to / PACKAGE
    content = json.loads(listing.read_text())
    content["id"] = id_
    model = to / content["model"]
    if cut:
        before = file_sha256(model)
        model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
        now = {"sha256": file_sha256(model), "size_bytes": model.stat().st_size}
        report = json.loads((to / REPORT).read_text())
        for each in report["measured"]:
            each.update(now if each["sha256"] == before else {})
        (to / REPORT).write_text(json.dumps(report))
        content["files"][model.name] = now
        content["files"][REPORT] = {
            "sha256": file_sha256(to / REPORT), "size_bytes": (to / REPORT).stat().st_size
        }  # fmt: skip
    listing.write_text(json.dumps(content))
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--updates", type=int, default=20)
    given = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    name = open_package(given.package).content.name
    one = variant(given.package, folder / "one", f"{name}/package-one")
    two = variant(given.other, folder / "two", f"{name}/package-two")
    cut = variant(given.package, folder / "cut", f"{name}/package-cut", cut=True)
    base = server.start_serving(one, SETTINGS)
    rows = []
    with load(f"{base}/v1/completions", CLIENTS) as seen:

        def counted(what: str, begun: int, seconds: list[float]) -> None:
            codes = Counter(each.status for each in seen[begun:])
            other = sum(count for code, count in codes.items() if not 200 <= code < 300)
            middle = sorted(seconds)[len(seconds) // 2]
            rows.append((what, len(seconds), f"{middle:.1f}", sum(codes.values()), other))

        begun, seconds = len(seen), []
        for number in range(given.updates):
            say(f"update {number + 1} of {given.updates}")
            new = (two, one)[number % 2]
            package = open_package(new).content.id
            took = until(
                lambda new=new: bool(server.call_controller("deploy", str(new), SETTINGS, "stable", "trial")),
                "an update",
            )
            until(lambda package=package: seen[-1].package == package, "the new version")
            seconds.append(took)
        counted("update", begun, seconds)

        begun, seconds = len(seen), []
        stable = seen[-1].package
        for number in range(given.updates // 2):
            say(f"update that does not start, {number + 1} of {given.updates // 2}")
            began_s = time.perf_counter()
            try:
                server.call_controller("deploy", str(cut), SETTINGS, "stable", "trial")
            except InputError:
                seconds.append(time.perf_counter() - began_s)
            else:
                raise SystemExit("half a model was served")
        counted("update that does not start", begun, seconds)

        begun, seconds = len(seen), []
        tried = two if stable.endswith("one") else one
        strict = SETTINGS.model_copy(update={"canary": STRICT})
        for number in range(given.updates - given.updates // 2):
            say(f"canary that fails, {number + 1} of {given.updates - given.updates // 2}")
            server.call_controller("deploy", str(tried), strict, "canary", "trial")
            seconds.append(
                until(lambda: server.call_controller("deployments").models[name].canary is None, "a rollback")
            )
        counted("canary that fails its limits", begun, seconds)
        if seen[-1].package != stable:
            say("the version before does not answer")
    events = Counter(event.change for event in server.call_controller("deployments").events)
    server.stop_serving()
    say(str(dict(events)))
    print(f"{machine(SETTINGS.threads)}; {CLIENTS} clients over connections that they keep\n")
    table(("what", "times", "median s", "replies", "other than 2xx"), rows)
    sys.exit(any(row[4] for row in rows))


if __name__ == "__main__":
    main()
