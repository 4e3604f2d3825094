"""llama.cpp's own HTTP server, with the settings of overproof's engine, until the standard input ends.

    python llama_cpp.py GGUF THREADS SLOTS

Prints ``{"url": ...}`` when it answers. It asks for no key.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import xllamacpp

from overproof.engines.gguf_tokens import read_gguf_header
from overproof.engines.llamacpp_server import server_params


def main() -> None:
    file, (threads, slots) = Path(sys.argv[1]), map(int, sys.argv[2:])
    settings = server_params(file, threads, slots, read_gguf_header(file).context_length, "none")
    settings.api_keys = []
    server = xllamacpp.Server(settings)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
