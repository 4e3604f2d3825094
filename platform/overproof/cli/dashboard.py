"""`overproof dashboard`: TensorBoard over a store's trials, and where Ray's own dashboard is."""

from __future__ import annotations

import logging

from pyarrow import fs

from overproof.cli.termination import wait_for_signal
from overproof.cluster import ray_cluster
from overproof.console import out, waiting
from overproof.errors import InputError
from overproof.files import filesystem


def dashboard(folder: str, port: int) -> int:
    """Show the sweeps below a folder at a port (0 takes a free one) until Ctrl-C, which ends what was started.

    Raises:
        InputError: the folder is not on this machine's disks or missing, or the port is taken.
    """
    store, root = filesystem(folder)
    if not isinstance(store, fs.LocalFileSystem):
        raise InputError(f"{folder}: TensorBoard reads files on a disk; expected a local store, or a copy of it")
    if store.get_file_info(root).type != fs.FileType.Directory:
        raise InputError(f"{root}: no such folder; expected one in which a sweep ran: `overproof sweep RECIPE`")
    with waiting("starting TensorBoard"):
        url = _tensorboard(root, port)
    out.print(f"TensorBoard  {url}  (HParams compares trials; a sweep that runs appears while it does)", markup=False)
    ray_url = ray_cluster.dashboard_url() or "no cluster to look at: RAY_ADDRESS names none"
    out.print(f"Ray          {ray_url}", markup=False)
    out.print("until Ctrl-C")
    wait_for_signal()
    return 0


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
