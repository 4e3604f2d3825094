"""`overproof up` and `overproof down`. What they print to standard output is for a shell to evaluate."""

from __future__ import annotations

import os
import shlex
import sys

from overproof.cluster import local_cluster, ray_cluster
from overproof.cluster.local_cluster import LocalCluster
from overproof.console import errors, waiting
from overproof.errors import InputError


def up(cpus: int | None) -> int:
    """Start this user's cluster on this machine, unless it runs.

    Raises:
        InputError: it does not come up.
    """
    if cpus is not None and cpus < 1:
        raise InputError(f"--cpus {cpus}: expected 1 or more")
    with waiting("starting Ray on this machine", errors):
        cluster, started = local_cluster.start(local_cluster.state_folder(), cpus or ray_cluster.local_cpus())
    if "RAY_AUTH_TOKEN" in os.environ:
        print("unset RAY_AUTH_TOKEN")  # it would count for more than the file
    for name, value in cluster.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    what = "is up" if started else f"was up already, with {cluster.cpus} CPUs"
    told = f"a cluster {what} at {cluster.address}; dashboard http://{cluster.dashboard}, which asks for the token in "
    errors.print(told + cluster.environment["RAY_AUTH_TOKEN_PATH"], markup=False)
    if sys.stdout.isatty():
        errors.print('a shell uses it after: eval "$(overproof up)"; it ends with: overproof down', markup=False)
    return 0


def down() -> int:
    """End the cluster of ``up``, and what runs on it."""
    folder = local_cluster.state_folder()
    with waiting("ending the cluster", errors):
        if found := local_cluster.running(folder):
            _stop_serving(found)
        ended = local_cluster.stop(folder)
    if ended is None:
        errors.print(f"no cluster of `overproof up` runs here (by {folder})", markup=False)
        return 0
    print(f"unset {' '.join(ended.environment)}")
    errors.print(f"the cluster at {ended.address} has ended", markup=False)
    return 0


def _stop_serving(cluster: LocalCluster) -> None:
    """Let the streams of what is served end, and its recorded traffic be written."""
    os.environ.update(cluster.environment)  # before Ray is imported, which reads it then
    os.environ.pop("RAY_AUTH_TOKEN", None)
    from overproof.serve import server

    try:
        ray_cluster.connect()
        server.stop_serving()
        ray_cluster.disconnect()  # from a head that goes, it would take seconds
    except Exception as error:  # whatever it is: what does not end in order is ended
        errors.print(f"! what is served did not end in order: {error}", markup=False)
