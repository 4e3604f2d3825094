"""Hosts on one machine that share neither a disk nor an address: a Ray node each, in namespaces of its own.

Each has its network (a bridge joins them, and a bucket that all reach), its processes, its name, an empty temporary
folder and shared memory. What all see is what an administrator would install: the repository and its environment. Ray
asks for a token, and encrypts what goes from host to host. Needs root.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import httpx
import psutil
import pytest

from certificates import certificate

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HOSTS = 16  # that there are addresses for
BUCKET_PORT, GCS_PORT, DASHBOARD_PORT = 9000, 6379, 8265
START_S = 120
LOST_AFTER = {  # a host that does not answer is given up after some 15 s; Ray by itself takes half a minute or more
    "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "8000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


@dataclass
class Host:
    """A machine, as far as its processes can tell."""

    name: str  # of its network namespace
    address: str
    holder: subprocess.Popen[bytes]
    pid: int  # of its first process: its namespaces are this one's

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid",
                f"--wdns={REPOSITORY}", *words]  # fmt: skip


@dataclass
class Hosts:
    """What is up; ``host_hosts`` makes it."""

    tag: str
    subnet: str
    folder: Path  # that all hosts see, of certificates
    token: str
    hosts: list[Host] = field(default_factory=list)

    @property
    def store(self) -> str:
        return f"s3://bucket/store?scheme=http&endpoint_override={self.subnet}.254:{BUCKET_PORT}&region=us-east-1"

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process on a host: nothing of this one's, but where its programs are."""
        tls = {"CERT": "certificate.pem", "KEY": "key.pem"}
        return {
            "PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8",
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token,
            "RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": str(self.folder / "certificate.pem"),
            **{f"RAY_TLS_SERVER_{name}": str(self.folder / file) for name, file in tls.items()},
            "RAY_usage_stats_enabled": "0", "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1", **LOST_AFTER,
        }  # fmt: skip

    def add(self) -> Host:
        """A host without Ray."""
        number = len(self.hosts) + 1
        name, address = f"o{self.tag}{number}", f"{self.subnet}.{number}"
        ip("netns", "add", name)
        ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", f"v{name}", "master", f"o{self.tag}", "up")
        for words in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                      ("link", "set", "lo", "up")):  # fmt: skip
            ip("-n", name, *words)
        script = (
            "mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && mount -t tmpfs -o size=2g tmpfs /dev/shm && "
            f"hostname host{number} && echo up && exec sleep infinity"
        )
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen(["ip", "netns", "exec", name, *unshare, "sh", "-c", script], stdout=subprocess.PIPE)
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        (child,) = psutil.Process(holder.pid).children()
        self.hosts.append(Host(name, address, holder, child.pid))
        return self.hosts[-1]

    def add_node(self, cpus: int) -> Host:
        """A host that joins the cluster."""
        host = self.add()
        self.run(host, "ray", "start", "--address", f"{self.head.address}:{GCS_PORT}", "--node-ip-address",
                 host.address, "--num-cpus", str(cpus), "--object-store-memory", "200000000")  # fmt: skip
        return host

    def start_head(self, *options: str, **environment: str) -> None:
        """A host with the head of a cluster, and its dashboard; ``options`` are of ``ray start``."""
        host = self.add()
        self.run(host, "ray", "start", "--head", "--node-ip-address", host.address, "--port", str(GCS_PORT),
                 "--dashboard-host", host.address, "--dashboard-port", str(DASHBOARD_PORT), "--num-cpus", "0",
                 "--object-store-memory", "200000000", "--disable-usage-stats", *options, **environment)  # fmt: skip
        deadline, bearer = time.monotonic() + START_S, {"Authorization": f"Bearer {self.token}"}
        while True:
            try:
                if httpx.get(f"{self.dashboard}/api/jobs/", headers=bearer, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "no dashboard came up"
            time.sleep(0.3)

    def run(self, host: Host, *words: str, **environment: str) -> str:
        """What a command prints, of a host; it must succeed."""
        process = self.start(host, *words, **environment)
        try:
            said, _ = process.communicate(timeout=START_S)
        finally:
            self.end(process)
        assert process.returncode == 0, said
        return said

    def start(self, host: Host, *words: str, **environment: str) -> subprocess.Popen[str]:
        """A process on a host, whose output can be read; it ends with its host."""
        return subprocess.Popen(
            host.command(*words), env=self.environment | environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> None:
        """End a process on a host, should it still run, and never nsenter itself: what that started would be nobody's,
        and the host could not end.
        """
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()

    def cut_off(self, host: Host) -> None:
        """Take a host from the network: for the others it is gone, though its processes go on."""
        ip("link", "set", f"v{host.name}", "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def why_none() -> str:
    """What this machine lacks for hosts of their own; nothing where it lacks nothing."""
    if os.getuid() != 0:
        return "namespaces need root"
    name = f"o{secrets.token_hex(3)}"
    for words in (["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"],
                  ["ip", "link", "add", name, "type", "bridge"], ["ip", "link", "del", name]):  # fmt: skip
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no namespaces here: {error}"
    return ""


@contextmanager
def hosts_up() -> Iterator[Hosts]:
    """A bucket, and nothing else yet; all that is started ends with the block. Where there can be none, the test is
    skipped.
    """
    if reason := why_none():
        pytest.skip(reason)
    tag = secrets.token_hex(3)
    subnet = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(256)}"
    folder = Path(tempfile.mkdtemp(prefix="overproof-hosts-", dir="/var/tmp"))
    found = Hosts(tag, subnet, folder, secrets.token_hex(32))
    certificate(folder, *(f"{subnet}.{number}" for number in range(1, HOSTS + 1)))
    ip("link", "add", f"o{tag}", "type", "bridge")
    bucket = None
    try:
        ip("addr", "add", f"{subnet}.254/24", "dev", f"o{tag}")
        ip("link", "set", f"o{tag}", "up")
        server = [str(BIN / "moto_server"), "--host", f"{subnet}.254", "--port", str(BUCKET_PORT)]
        bucket = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _make_bucket(f"http://{subnet}.254:{BUCKET_PORT}")
        yield found
    finally:
        for host in found.hosts:
            os.kill(host.pid, signal.SIGKILL)  # the first process of a host, and so all
            host.holder.wait()
            ip("netns", "del", host.name)
        if bucket is not None:
            bucket.kill()
            bucket.wait()
        ip("link", "del", f"o{tag}")
        shutil.rmtree(folder)


def _make_bucket(url: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(url, trust_env=False).status_code < 500:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "no bucket came up"
        time.sleep(0.2)
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket="bucket")
