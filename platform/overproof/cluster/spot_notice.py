"""On a spot node of EC2: has Ray drain the node once AWS says that it will be taken away, two minutes before.

Ray has no eyes for that notice by itself. Once a node is drained, nothing new is placed there, and a training makes a
checkpoint and goes on elsewhere. `cluster.yaml` starts this on every node but the head:

    python -m overproof.cluster.spot_notice

The notice is `spot/instance-action` of the instance's metadata, asked for with a session's token (IMDSv2; AWS, "Spot
Instance interruption notices").
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # as AWS's own tools have it
ENDPOINT = "http://169.254.169.254"
TOKEN_S = 21600  # how long a session's token holds; at most
ASK_EVERY_S = 5.0  # as AWS recommends
ANSWER_S = 2.0
DEFAULT_NOTICE_S = 120.0


class InstanceMetadata:
    """What an instance is told about itself."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self._token = endpoint.rstrip("/"), ""

    def get(self, path: str) -> str | None:
        """An entry; None where there is none.

        Raises:
            OSError: there is no such service here, or it does not answer.
        """
        for attempt in range(2):
            if not self._token:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
                self._token = self._ask(Request(f"{self.endpoint}/latest/api/token", headers=headers, method="PUT"))
            headers = {"X-aws-ec2-metadata-token": self._token}
            try:
                return self._ask(Request(f"{self.endpoint}/latest/meta-data/{path}", headers=headers))
            except HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or attempt:  # the token has expired
                    raise
                self._token = ""
        raise AssertionError

    def _ask(self, request: Request) -> str:
        with build_opener(ProxyHandler({})).open(request, timeout=ANSWER_S) as reply:  # a proxy is another machine
            text: str = reply.read().decode()
            return text


def seconds_left(notice: str) -> float:
    """Until the node goes, of a notice such as ``{"action": "terminate", "time": "2017-09-18T08:22:00Z"}``."""
    try:
        at = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (ValueError, KeyError, TypeError):
        return DEFAULT_NOTICE_S
    return max(1.0, (at - datetime.now(UTC)).total_seconds())


def watch(metadata: InstanceMetadata, drain: Callable[[float, str], None], ask_every_s: float = ASK_EVERY_S) -> None:
    """Wait for the notice, and drain the node; a service that does not answer is asked again."""
    while True:
        try:
            notice = metadata.get("spot/instance-action")
        except OSError as error:
            print(f"{metadata.endpoint}: {error}", file=sys.stderr, flush=True)
            notice = None
        if notice is not None:
            drain(seconds_left(notice), notice)
            return
        time.sleep(ask_every_s)


def drain_this_node(left_s: float, notice: str) -> None:
    """Have Ray drain the node that this process runs on.

    Raises:
        CalledProcessError: Ray has not taken it in.
    """
    print(f"this node goes in {left_s:.0f} s: {notice}", flush=True)
    subprocess.run(
        [
            "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice,
            "--deadline-remaining-seconds", str(int(left_s)),
        ],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    watch(InstanceMetadata(os.environ.get(ENDPOINT_VARIABLE, ENDPOINT)), drain_this_node)
