"""vLLM's server, run by the Python of an environment of its own, and asked over a socket that nobody else can open."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from overproof.errors import InputError
from overproof.files import file_sha256, local_cache
from overproof.subprocesses import run_module

PYTHON, ARGUMENTS = "OVERPROOF_VLLM", "OVERPROOF_VLLM_ARGS"
STARTS_S, ASKED_S, STOPS_S, POLL_S = 900, 10, 30, 0.2
MODEL = "model"  # what the server calls it
# The server ends with this process, however that ends: then nothing holds the other end of its standard input.
TETHERED = """
import os, runpy, signal, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
SILENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas of a node would all bind to its first cores
    "HF_HUB_OFFLINE": "1",
}


def vllm_python() -> Path:
    """The Python of the environment that has vLLM.

    Raises:
        InputError: none is named, or there is none.
    """
    named = os.environ.get(PYTHON)
    if not named or not os.access(named, os.X_OK):
        raise InputError(
            f"{PYTHON}: found {named!r}; expected the Python of an environment that has vLLM, on every node that "
            "measures or serves with it: `python -m venv E`, `E/bin/pip install vllm`, and name E/bin/python"
        )
    return Path(named)


def unpacked_directory(path: Path) -> Path:
    """A GGUF file's weights as the Hugging Face directory that vLLM reads, made once on this machine, in half
    precision. Its tokenizer lies beside the file.

    Raises:
        InputError: the tokenizer is missing, or the file cannot be read.
    """

    def make(folder: Path) -> None:
        done = run_module("overproof.export.unpack", path, folder)
        if done.returncode != 0:
            raise InputError(f"{path}: cannot be unpacked for vLLM: {done.stderr.strip().splitlines()[-1]}")

    return local_cache(f"vllm-{file_sha256(path)}", make)


class VllmServer:
    """A running server. Any thread may ask it."""

    def __init__(self, path: Path, threads: int, slots: int, context_length: int, reuse_prefix: bool) -> None:
        """Start a server and wait until it answers.

        Raises:
            InputError: there is no vLLM, or it cannot load the file.
        """
        python, model = vllm_python(), unpacked_directory(path)
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-"))  # which this user alone may enter
        socket, self._log = self._folder / "socket", self._folder / "log"
        arguments = {
            "model": model,
            "served-model-name": MODEL,
            "uds": socket,
            "max-num-seqs": slots,
            "max-model-len": context_length,
            "max-logprobs": 20,
            "generation-config": "vllm",  # what the request asks, and nothing from a file
            "structured-outputs-config": json.dumps({"backend": "guidance"}),
        }
        command = [str(python), "-c", TETHERED, *(f"--{name}={value}" for name, value in arguments.items())]
        command += ["--enable-prefix-caching" if reuse_prefix else "--no-enable-prefix-caching"]
        command += ["--disable-uvicorn-access-log", *shlex.split(os.environ.get(ARGUMENTS, ""))]
        environment = SILENT | os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)  # of this environment
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None)),
            base_url="http://vllm",
            timeout=httpx.Timeout(ASKED_S, read=None),
        )
        try:
            self._wait(path, socket)
        except BaseException:
            self.close()
            raise

    def _wait(self, path: Path, socket: Path) -> None:
        until = time.monotonic() + STARTS_S
        while not (socket.exists() and self.answers()):
            if self._process.poll() is not None:
                raise InputError(f"{path}: vLLM cannot load it: {self._last_words()}")
            if time.monotonic() > until:
                raise RuntimeError(f"{path}: vLLM did not start in {STARTS_S} s: {self._last_words()}")
            time.sleep(POLL_S)

    def answers(self) -> bool:
        """Whether it is well, by its own word."""
        try:
            return self._http.get("/health", timeout=ASKED_S).is_success
        except httpx.HTTPError:
            return False

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Continue a prompt; what it says, as it comes. Generation ends with this generator.

        Raises:
            InputError: it does not take the request.
        """
        body = {"model": MODEL, "stream": True, "return_token_ids": True, "return_tokens_as_token_ids": True, **request}
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as reply:
                if not reply.is_success:
                    reply.read()
                    raise _refusal(reply.json(), reply.status_code)
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        said = json.loads(line.removeprefix("data: "))
                        if "error" in said:
                            raise _refusal(said, said["error"]["code"])
                        yield said
        except httpx.TransportError as error:
            raise RuntimeError(f"vLLM does not answer ({error!r}): {self._last_words()}") from None

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPS_S)
        with contextlib.suppress(ProcessLookupError):  # the engine's own processes, where any are left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._http.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-3:]) or "no word of it"


def _refusal(said: dict[str, Any], code: int) -> Exception:
    message = f"vLLM: {said['error']['message'].splitlines()[0]}"
    return InputError(message) if 400 <= code < 500 else RuntimeError(message)
