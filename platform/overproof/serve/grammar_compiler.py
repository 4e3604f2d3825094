"""Compiles the grammars of requests in processes that may be lost: 150 bytes can take for ever, or all memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from overproof.errors import InputError
from overproof.limited_process import LimitedProcess, NoAnswer, OverLimits
from overproof.serve import grammar_process
from overproof.serve.async_engine import Busy
from overproof.serve.fair_queue import FairSemaphore
from overproof.serve.grammar import GrammarChecker, GrammarSource

CPU_S = 0.5  # to compile a grammar; most take a thousandth of it
ALL_CHOICES_CPU_S = 1.0  # for the engine compiles it for each choice, and generates nothing meanwhile
MEMORY_BYTES = 256 << 20
PROCESSES = 2
MAX_WAITING = 32  # requests of a client whose grammars wait for a process before more are refused
REMEMBERED = 256  # verdicts on grammars, good and bad


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar that may go to an engine."""

    lark: str
    _first: GrammarChecker

    def checker(self) -> GrammarChecker:
        """A new one, at the begin of a text. Cheap: nothing is compiled again."""
        return self._first.copy()


@dataclass(frozen=True)
class _Verdict:
    """What is remembered of a grammar."""

    lark: str = ""
    cpu_s: float = 0.0
    error: str | None = None


class GrammarCompiler:
    """Compiles grammars, a few at a time, in processes that start when there is need."""

    def __init__(self) -> None:
        script = Path(grammar_process.__file__)
        self._idle = [LimitedProcess(script, CPU_S, MEMORY_BYTES) for _ in range(PROCESSES)]
        self._slots = FairSemaphore(PROCESSES)
        self._verdicts: OrderedDict[str, _Verdict] = OrderedDict()
        self._pool = ThreadPoolExecutor(PROCESSES, thread_name_prefix="grammar")  # no other work waits for a grammar

    async def compile(self, source: GrammarSource, choices: int) -> CompiledGrammar:
        """A grammar for so many choices.

        Raises:
            InputError: it is invalid, or takes more CPU or memory than a request may.
            Busy: too many others wait for theirs, or the machine has no CPU for it.
        """
        verdict = self._verdicts.get(source.text)
        if verdict is None:
            verdict = await self._judge(source.text)
            self._verdicts[source.text] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        if verdict.error is not None:
            raise InputError(f"{source.field}: {verdict.error}")
        if verdict.cpu_s * choices > ALL_CHOICES_CPU_S:
            raise InputError(
                f"{source.field}: takes {verdict.cpu_s:.2g} s to compile for each of {choices} choices; expected "
                f"{ALL_CHOICES_CPU_S:g} s in all: ask for fewer, or for something simpler"
            )
        loop = asyncio.get_running_loop()
        return CompiledGrammar(verdict.lark, await loop.run_in_executor(self._pool, GrammarChecker, verdict.lark))

    async def close(self) -> None:
        """End the processes."""
        for process in self._idle:
            process.stop()
        self._pool.shutdown(wait=False)

    async def _judge(self, text: str) -> _Verdict:
        if self._slots.own_waiting >= MAX_WAITING:
            raise Busy
        async with self._slots:
            process = self._idle.pop()
            try:
                return await self._ask(process, text)
            finally:
                self._idle.append(process)

    async def _ask(self, process: LimitedProcess, text: str) -> _Verdict:
        asking = asyncio.get_running_loop().run_in_executor(self._pool, process.ask, text)
        try:
            return _Verdict(**await asyncio.shield(asking))
        except asyncio.CancelledError:  # the client went away
            process.stop()
            await asyncio.wait([asking])
            asking.exception()
            raise
        except NoAnswer:
            raise Busy from None
        except OverLimits:
            limits = f"{CPU_S:g} s or {MEMORY_BYTES >> 20} MiB"
            return _Verdict(error=f"takes more than {limits} to compile; expected something simpler")
