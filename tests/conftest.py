"""One real Ray cluster of several nodes for the whole session; stores and ports are each test's own."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

from finished import RECIPES, Run
from overproof.config import load_recipe

if "PYTEST_XDIST_WORKER" in os.environ:  # what one process starts and leaves in the temporary folder is its own
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="t")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing to report of tests, and no process that would
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as started in the background; commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("no clock", deadline=None)  # a busy machine is no fault
settings.load_profile("no clock")


SHARED = ("digits", "_deployments_file")  # dear fixtures: whoever asks for one runs in one process


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where the suite runs in several processes, each takes a file at a time, or all that shares a dear fixture."""
    for item in items:
        asked = getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(next((name for name in SHARED if name in asked), item.path.stem)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A head and a worker node with four logical CPUs each; yields the address."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 300 << 20}
    node["include_log_monitor"] = False  # no driver here asks for logs
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": True, "dashboard_port": 0})
    cluster.add_node(**node, labels={"group": "serve"})
    ray.init(address=cluster.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def s3_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket behind a real S3 endpoint on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    bucket = f"bucket-{secrets.token_hex(8)}"  # all servers of one process share their buckets
    client.create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/store?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    server.stop()


@pytest.fixture(scope="session")
def digits(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The digits recipe, run once from data to package.

    One teacher and one trial at a time: on two cores a second process takes longer to start than it saves.
    """
    from overproof import pipeline

    one = ("cache.actors=1", "sweep.concurrent_trials=1")
    recipe = load_recipe(RECIPES / "digits.yaml", (f"store={tmp_path_factory.mktemp('store')}", *one))
    return Run(recipe, pipeline.run(recipe))


OUTCOMES = {"passed": "held", "failed": "FAILED", "skipped": "skipped"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A run of trials ends with a table of them."""
    rows = [
        (report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " "), report.duration, word)
        for outcome, word in OUTCOMES.items()
        for report in terminalreporter.getreports(outcome)
        if "trial" in report.keywords and (report.when == "call" or outcome != "passed")
    ]
    if not rows:
        return
    width = max(len(what) for what, *_ in rows)
    terminalreporter.section("trials")
    terminalreporter.line(f"{'what':<{width}}  seconds  outcome")
    for what, seconds, word in rows:
        terminalreporter.line(f"{what:<{width}}  {seconds:7.1f}  {word}")
