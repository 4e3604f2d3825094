"""Work on what strangers send, in a process that may be lost: native code that runs for ever hears no exception.

``LimitedProcess`` runs this file, which reads the functions of another by its path and imports nothing of the package,
so that it starts quickly. The kernel ends the process where a question takes more CPU or memory than it may.
"""

from __future__ import annotations

import json
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any


class OverLimits(Exception):
    """The process ended over a question: it took too much CPU or memory, or broke down."""


class NoAnswer(Exception):
    """The process was given too little CPU to come to an answer, or was stopped."""


class LimitedProcess:
    """Asks the function ``answer`` of a Python file, in a process that starts with the first question, and again after
    one that it did not survive. Of several threads one asks at a time.
    """

    def __init__(self, script: Path, cpu_s: float, memory_bytes: int, wall_s: float = 30.0) -> None:
        """``memory_bytes`` is what it may take beyond what it has when it has started."""
        self._command = [sys.executable, "-P", __file__, str(script), str(cpu_s), str(memory_bytes)]
        self._wall_s, self._lock = wall_s, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Any) -> Any:
        """The answer, both as JSON has them.

        Raises:
            OverLimits: the process ended over it.
            NoAnswer: it was stopped, or did not come to an answer although its CPU-seconds were not used up.
        """
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                weakref.finalize(self, process.kill)  # where nobody closes it
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                answered = select.poll()  # which takes any file, `select` those below 1,024: a server has more
                answered.register(process.stdout, select.POLLIN)
                if not answered.poll(self._wall_s * 1000):
                    self.stop()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if line.endswith(b"\n"):
                return json.loads(line)
            _end(process)
            raise NoAnswer if process.returncode == -signal.SIGKILL else OverLimits

    def stop(self) -> None:
        """End the process at once, whatever it is at. May be called from any thread."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process when it has answered."""
        with self._lock:
            if self._process is not None:
                _end(self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(script: str, cpu_s: float, memory_bytes: int) -> None:
    answer = runpy.run_path(script)["answer"]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF, which nobody handles, ends the process
        began_s = time.process_time()
        found = answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        found["cpu_s"] = time.process_time() - began_s
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
