"""`overproof dashboard`: TensorBoard over a store's trials, and where Ray's own dashboard is."""

from __future__ import annotations

import logging
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from pyarrow import fs

from overproof.artifacts import WORK
from overproof.cli.termination import wait_for_signal
from overproof.cluster import ray_cluster
from overproof.console import out, waiting
from overproof.distill.tensorboard import EVENTS
from overproof.errors import InputError
from overproof.files import filesystem, join_uri

LOOK_EVERY_S = 2.0


def dashboard(uri: str, recipe: str | None, port: int) -> int:
    """Show the newest training and sweep of a recipe, or everything in a store, at a port (0 takes a free one) until
    Ctrl-C, which ends what was started.

    Raises:
        InputError: the store is not on this machine's disks or has nothing of it, or the port is taken.
    """
    folder = uri if recipe is None else join_uri(uri, recipe)
    store, root = filesystem(folder)
    if not isinstance(store, fs.LocalFileSystem):
        raise InputError(f"{folder}: TensorBoard reads files on a disk; expected a local store, or a copy of it")
    if store.get_file_info(root).type != fs.FileType.Directory:
        raise InputError(f"{root}: no such folder; expected one in which a sweep ran: `overproof sweep RECIPE`")
    with tempfile.TemporaryDirectory(prefix="overproof-") as links:
        if recipe is not None:
            link_newest(Path(root), Path(links))
            threading.Thread(target=_follow, args=(Path(root), Path(links)), daemon=True).start()
        with waiting("starting TensorBoard"):
            url = _tensorboard(root if recipe is None else links, port)
        told = "HParams compares trials; a sweep that runs appears while it does"
        out.print(f"TensorBoard  {url}  ({told})", markup=False)
        ray_url = ray_cluster.dashboard_url() or "no cluster to look at: RAY_ADDRESS names none"
        out.print(f"Ray          {ray_url}", markup=False)
        out.print("until Ctrl-C")
        wait_for_signal()
    return 0


def link_newest(root: Path, links: Path) -> None:
    """Link the events of the newest training and the newest sweep below a recipe's folder, running ones included, and
    unlink what they take the place of: TensorBoard's HParams tab makes one table of all that it finds.
    """
    wanted = {}
    for stage in ("train", "sweep"):
        found = [*root.glob(f"{stage}-*/{EVENTS}"), *root.glob(f"{stage}{WORK}/{EVENTS}")]
        ages = {}
        for events in found:
            with suppress(FileNotFoundError):  # a workspace goes when its stage is done
                ages[events] = events.stat().st_mtime_ns
        if ages:
            newest = max(ages, key=ages.__getitem__)
            # HParams shows some 16 characters of a name, of which trials need their own.
            wanted[newest.parent.name.removeprefix("sweep-").replace(f"sweep{WORK}", "running")] = newest
    for link in links.iterdir():
        if link.name not in wanted:
            link.unlink()
    for name, events in wanted.items():
        if not (links / name).is_symlink():
            (links / name).symlink_to(events, target_is_directory=True)


def _follow(root: Path, links: Path) -> None:
    """Keep the links as they should be, until the folder is gone."""
    wake = threading.Event()
    while not wake.wait(LOOK_EVERY_S) and links.is_dir():
        with suppress(FileNotFoundError):
            link_newest(root, links)


def _tensorboard(root: str, port: int) -> str:
    """Serve in a thread of this process, on loopback; it ends with the process."""
    from tensorboard import program

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    server = program.TensorBoard()
    server.configure(
        argv=["tensorboard", "--logdir", root, "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    )  # its fast reader would be a second process
    try:
        return str(server.launch())
    except program.TensorBoardServerException as error:
        raise InputError(f"--port {port}: {error.msg}; give another, or 0 for a free one") from None
