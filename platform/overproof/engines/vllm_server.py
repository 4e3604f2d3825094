"""vLLM's server, run by the Python of another environment, behind a Unix socket that only this user can open."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from overproof.data.manifest import TOKENIZER
from overproof.errors import InputError
from overproof.files import file_sha256, local_cache, socket_folder
from overproof.subprocesses import run_module

PYTHON_VARIABLE, ARGUMENTS_VARIABLE = "OVERPROOF_VLLM", "OVERPROOF_VLLM_ARGS"
START_TIMEOUT_S, REQUEST_TIMEOUT_S, STOP_TIMEOUT_S, POLL_S = 900, 10, 30, 0.2
MODEL = "model"  # its name in requests
VOCABULARY = "vocabulary.gguf"  # beside unpacked weights, where the file itself has none
UNPACKED_FORMAT = 2  # of such directories, which are made anew where it is another
UNPACKED_BY = {  # by a file's suffix, the module that makes a directory of it
    ".gguf": "overproof.export.gguf_to_directory",
    ".safetensors": "overproof.export.compressed_tensors_to_directory",
}
# Ends the server when this process ends, however it ends: then nothing holds the other end of its standard input.
SERVER_PROGRAM = """
import os, runpy, signal, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
QUIET_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all replicas of a node bind to its first cores
    "HF_HUB_OFFLINE": "1",
}


def vllm_python() -> Path:
    """The Python of the environment that has vLLM.

    Raises:
        InputError: the variable names none, or it is not there.
    """
    python = os.environ.get(PYTHON_VARIABLE)
    if not python or not os.access(python, os.X_OK):
        raise InputError(
            f"{PYTHON_VARIABLE}: found {python!r}; expected the Python of an environment that has vLLM, on every node "
            "that measures or serves with it: `python -m venv E`, `E/bin/pip install vllm`, and name E/bin/python"
        )
    return Path(python)


def unpacked_directory(path: Path) -> Path:
    """The Hugging Face directory of a file, which vLLM reads, cached on this machine. Its tokenizer lies beside it.

    Raises:
        InputError: the tokenizer is missing, or the file cannot be read.
    """
    if path.suffix not in UNPACKED_BY:
        raise InputError(f"{path}: found {path.suffix or 'no suffix'}; expected {' or '.join(UNPACKED_BY)}")

    def make(folder: Path) -> None:
        finished = run_module(UNPACKED_BY[path.suffix], path, folder)
        if finished.returncode != 0:
            said = finished.stderr.strip().splitlines() or [f"its process ended with {finished.returncode}"]
            raise InputError(f"{path}: cannot be unpacked for vLLM: {said[-1]}")

    tokenizer = path.with_name(TOKENIZER)
    if not tokenizer.is_file():
        raise InputError(f"{tokenizer}: missing; expected the tokenizer beside its model")
    return local_cache(f"vllm-{UNPACKED_FORMAT}-{file_sha256(path)}-{file_sha256(tokenizer)}", make)


class VllmServer:
    """A running server. Every method may be called from any thread."""

    def __init__(
        self, model: Path, threads: int, slots: int, context_length: int, reuse_prefix: bool, of: Path
    ) -> None:
        """Start a server of a directory, unpacked from the file ``of``, and wait until it answers.

        Raises:
            InputError: there is no vLLM, or it cannot load the file.
        """
        python = vllm_python()
        self._folder = socket_folder("socket", prefix="vllm-")  # which only this user may enter
        socket, self._log = self._folder / "socket", self._folder / "log"
        arguments = {
            "model": model,
            "served-model-name": MODEL,
            "uds": socket,
            "max-num-seqs": slots,
            "max-model-len": context_length,
            "max-logprobs": 20,
            "generation-config": "vllm",  # defaults of vLLM, and none from the model's directory
            "structured-outputs-config": json.dumps({"backend": "guidance"}),
        }
        command = [str(python), "-c", SERVER_PROGRAM, *(f"--{name}={value}" for name, value in arguments.items())]
        command += ["--enable-prefix-caching" if reuse_prefix else "--no-enable-prefix-caching"]
        command += ["--disable-uvicorn-access-log", *shlex.split(os.environ.get(ARGUMENTS_VARIABLE, ""))]
        environment = QUIET_ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)  # which is of this environment
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None)),
            base_url="http://vllm",
            timeout=httpx.Timeout(REQUEST_TIMEOUT_S, read=None),
        )
        try:
            self._wait_until_healthy(of, socket)
        except BaseException:
            self.close()
            raise

    def _wait_until_healthy(self, path: Path, socket: Path) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not (socket.exists() and self.is_healthy()):
            if self._process.poll() is not None:
                raise InputError(f"{path}: vLLM cannot load it: {self._log_tail()}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{path}: vLLM did not start in {START_TIMEOUT_S} s: {self._log_tail()}")
            time.sleep(POLL_S)

    def is_healthy(self) -> bool:
        """Whether its health check succeeds."""
        try:
            return self._http.get("/health", timeout=REQUEST_TIMEOUT_S).is_success
        except httpx.HTTPError:
            return False

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion; closing the generator ends generation.

        Raises:
            InputError: it refuses the request.
        """
        body = {"model": MODEL, "stream": True, "return_token_ids": True, "return_tokens_as_token_ids": True, **request}
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as reply:
                if not reply.is_success:
                    reply.read()
                    raise _as_error(reply.json(), reply.status_code)
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise _as_error(event, event["error"]["code"])
                        yield event
        except httpx.TransportError as error:
            raise RuntimeError(f"vLLM does not answer ({error!r}): {self._log_tail()}") from None

    def close(self) -> None:
        """Stop the server and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # the engine's own processes, where any are left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._http.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _log_tail(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-3:]) or "its log is empty"


def _as_error(event: dict[str, Any], code: int) -> Exception:
    message = f"vLLM: {event['error']['message'].splitlines()[0]}"
    return InputError(message) if 400 <= code < 500 else RuntimeError(message)
