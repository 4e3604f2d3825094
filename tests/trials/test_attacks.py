"""Attacks on what `overproof serve` starts, one after the other, while an honest client asks: ends with a table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attacks import ATTACKS, Answers, Target
from live_server import HOST, Processes, live_server, memory_mib, serving_processes

from overproof.engines.gguf_tokens import read_gguf_header
from overproof.serve import api_keys
from packing import make_package

pytestmark = pytest.mark.trial

WARM_ANSWERS = 3  # of the honest client, before an attack begins
MOST_GROWTH_MIB = 512  # of the resident memory of all that serves, from the first attack to the last
CLIENT = Path(__file__).with_name("honest_client.py")
# Passes what is tried when a file is exported, and takes a message at its word.
TEMPLATE = """
{%- macro deeper(x) %}{{ deeper(x) }}{% endmacro %}
{%- if 'RECURSE' in messages[0].content %}{{ deeper(1) }}{% endif %}
{%- if 'LOOP' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- endif %}
{%- if 'OUTPUT' in messages[0].content %}
{%- for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxx{% endfor %}{% endfor %}
{%- endif %}
{%- if 'MEMORY' in messages[0].content %}{{ 'x' * 10000000000 }}{% endif %}
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}# {{ m.role }}
{{ m.content }}
{%- for c in m.tool_calls or [] -%}
<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>
{%- endfor %}
{% endfor %}{{ '# assistant\\n' }}"""


@dataclass(frozen=True)
class Server:
    target: Target
    honest_key: str
    processes: Processes


@pytest.fixture(scope="module")
def attacked(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attacked")
    package = make_package("text", folder / "store", f"compress.chat_template={json.dumps(TEMPLATE)}")
    file = str(folder / "keys.json")
    honest, attacker = (api_keys.add_key(file, name, None, None) for name in ("honest", "attacker"))
    operator = api_keys.add_key(file, "operator", None, None, operator=True)
    lead_byte = read_gguf_header(package / "model.gguf").pieces.index(b"\xe4")
    with live_server(package, ray_cluster, folder / "log", OVERPROOF_KEYS=file) as port:
        yield Server(Target(HOST, port, attacker, operator, lead_byte), honest, serving_processes())


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table, which is printed as it grows."""
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")

    def add(*cells: object) -> None:
        with capture.global_and_fixture_disabled():
            print("\n| " + " | ".join(map(str, cells)) + " |", end="", flush=True)

    head = ("attack", "answered", "seconds", "others asked", "again", "longest wait, s", "MiB more")
    add(*head)
    add(*("---" for _ in head))
    return add


@pytest.fixture(scope="module")
def memory_before_mib(attacked: Server) -> float:
    """Of a server at work."""
    with honest_client(attacked) as seen:
        pass
    assert seen["answered"] >= WARM_ANSWERS
    return memory_mib(attacked.processes)


@contextmanager
def honest_client(attacked: Server) -> Iterator[dict[str, Any]]:
    """One that asks before, meanwhile and afterwards; the dictionary has what it tells in the end."""
    words = [sys.executable, str(CLIENT), HOST, str(attacked.target.port), attacked.honest_key]
    client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdin is not None
    told: dict[str, Any] = {}
    for _ in range(WARM_ANSWERS):
        client.stdout.readline()
    try:
        yield told
    finally:
        time.sleep(0.5)
        lines, _ = client.communicate()
        told |= json.loads(lines.splitlines()[-1])


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, attacked: Server, memory_before_mib: float, row: Callable[..., None]) -> None:
    before_mib, began_s = memory_mib(attacked.processes), time.monotonic()
    with honest_client(attacked) as seen:
        answers: Answers = ATTACKS[name](attacked.target)
        seconds = time.monotonic() - began_s
    assert serving_processes() == attacked.processes, "a process ended, or began"
    told = ", ".join(f"{count} of {status}" for status, count in sorted(answers.items()))
    more_mib = memory_mib(attacked.processes) - before_mib
    row(name, told, f"{seconds:.0f}", seen["answered"], seen["again"], f"{seen['slowest_s']:.2f}", f"{more_mib:.0f}")
    assert seen["failed"] == []
    assert seen["answered"] > WARM_ANSWERS
    assert not [status for status in answers if status.startswith("5") and status != "503"], answers
    assert memory_mib(attacked.processes) - memory_before_mib < MOST_GROWTH_MIB
