"""Clients that ask a server for one thing again and again, as `steady_client.py URL BODY CLIENTS`, until they are
ended: prints for each request, as it is answered, its status (0: no answer) and the seconds that it took.
"""

from __future__ import annotations

import sys
import threading
import time
import urllib.error
import urllib.request

GIVE_UP_S, PAUSE_S = 60.0, 0.05


def ask(url: str, body: bytes) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=GIVE_UP_S) as reply:
            reply.read()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask_steadily(url: str, body: bytes) -> None:
    while True:
        began_s = time.perf_counter()
        status = ask(url, body)
        print(f"answer {status} {time.perf_counter() - began_s:.3f}\n", end="", flush=True)
        time.sleep(PAUSE_S)


def main() -> None:
    url, body, clients = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
    for _ in range(clients):
        threading.Thread(target=ask_steadily, args=(url, body)).start()


if __name__ == "__main__":
    main()
