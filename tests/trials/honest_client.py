"""Asks a server for one completion after another, as `honest_client.py HOST PORT KEY`, until its input ends; then tells
how many were answered and the most seconds that one took, with its retries. Alone in its process, so that it waits for
the server and for no attacker. It leaves from an address of its own.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException

GIVE_UP_S, PAUSE_S, RETRY_S = 120.0, 0.02, 0.2
ADDRESS = "127.0.0.1"
ASKED = {"prompt": "import os\n", "max_tokens": 4, "temperature": 0.0, "stream": False}
TOLD = 3  # of the first answers, each as it comes
AGAIN = (429, 503)  # as OpenAI's client does


def status_of(host: str, port: int, key: str, path: str, body: dict[str, object] | None) -> int:
    connection = HTTPConnection(host, port, timeout=GIVE_UP_S, source_address=(ADDRESS, 0))
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        encoded = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, encoded, headers)
        reply = connection.getresponse()
        reply.read()
        return reply.status
    except (OSError, HTTPException):
        return 0
    finally:
        connection.close()


def main() -> None:
    host, port, key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    slowest_s, answered, again, failed = 0.0, 0, 0, list[int]()
    turn = 0
    while not over.is_set():
        path, body = (("/v1/completions", ASKED), ("/v1/models", None))[turn % 2]
        turn += 1
        began_s = time.perf_counter()
        while (status := status_of(host, port, key, path, body)) in AGAIN:
            again += 1
            if time.perf_counter() - began_s > GIVE_UP_S:
                break
            time.sleep(RETRY_S)
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
        if status == 200:
            answered += 1
            if answered <= TOLD:
                print(answered, flush=True)
        else:
            failed.append(status)
        time.sleep(PAUSE_S)
    print(json.dumps({"answered": answered, "again": again, "failed": failed, "slowest_s": slowest_s}), flush=True)


if __name__ == "__main__":
    main()
