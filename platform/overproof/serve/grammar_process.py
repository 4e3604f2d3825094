"""The process that reads grammars of requests, which the server starts and may lose: ``GrammarCompiler`` is its parent.

A line of JSON in, a line out. It is run by its path and imports nothing of the package, so that it starts quickly. The
kernel ends it where a grammar takes more CPU or memory than it may: native code hears no exception.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

LARK = "%llguidance"  # how a grammar in llguidance's language begins
BYTE_TOKENIZER = LLTokenizer("byte")


def read_grammar(text: str) -> dict[str, Any]:
    """A grammar as Lark, and the CPU-seconds that it took to compile it and to take a first token; or what is wrong.

    GBNF becomes Lark, for llama.cpp's own grammar engine takes seconds for some small GBNF.
    """
    try:
        lark = text if text.startswith(LARK) else str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises bare ones
        return {"error": f"{error}; expected GBNF whose first rule is root"}
    began_s = time.process_time()
    problem = LLMatcher.validate_grammar(lark)
    if not problem:
        matcher = LLMatcher(BYTE_TOKENIZER, lark, log_level=0)
        allowed = next((token for token, bias in enumerate(matcher.compute_logit_bias()) if bias), None)
        if allowed is not None:
            matcher.consume_token(allowed)
        problem = matcher.get_error()  # endless recursion or too many alternatives show at the first token
    if problem:
        first = problem.splitlines()[0]
        return {"error": first.partition(": ")[2] or first}
    return {"lark": lark, "cpu_s": time.process_time() - began_s}


def _main(cpu_s: float, memory_bytes: int) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF, which nobody handles, ends the process
        answer = read_grammar(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(float(sys.argv[1]), int(sys.argv[2]))
