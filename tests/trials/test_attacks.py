"""Attacks on what `overproof serve` starts, one after the other, while an honest client asks: ends with a table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attacks import ATTACKS, Answers, Target
from live_server import HOST, Processes, live_server, memory_mib, serving_processes
from ray import serve

from overproof.config import Serve
from overproof.engines.gguf_tokens import read_gguf_header
from overproof.errors import InputError
from overproof.serve import api_keys, server
from overproof.serve.controller import describe_version
from packing import break_model, make_package
from shared_server import WAIT_S, wait_until

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


Row = Callable[..., None]


@dataclass(frozen=True)
class Server:
    package: Path
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
        yield Server(package, Target(HOST, port, attacker, operator, lead_byte), honest, serving_processes())


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> Row:
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


def fails_to_deploy(package: Path, settings: Serve) -> str:
    try:
        server.call_controller("deploy", str(package), settings, "stable", "ada")
    except InputError as error:
        return "refused" if "does not start, and nothing has changed" in str(error) else str(error)
    return "deployed"


def failing_deployments(package: Path, folder: Path) -> Answers:
    """Four of a model that cannot be loaded, then four that no node takes, each taken back while it hangs."""
    settings = server.call_controller("settings")
    broken = break_model(package, folder)
    answers = Answers(fails_to_deploy(broken, settings) for _ in range(4))
    nowhere = settings.model_copy(update={"cpus_per_replica": 1_000.0})
    other = make_package("text", folder / "store", f"compress.chat_template={json.dumps(TEMPLATE)}", "seed=1")
    hanging = describe_version(str(other), nowhere).application
    with ThreadPoolExecutor(1) as pool:
        for _ in range(4):
            deploying = pool.submit(fails_to_deploy, other, nowhere)
            wait_until(lambda: hanging in serve.status().applications)
            server.call_controller("roll_back", "stdlib-lm", "ada")
            answers[f"{deploying.result(WAIT_S)} once rolled back"] += 1
            wait_until(lambda: hanging not in serve.status().applications)
    return answers


def withstands(name: str, attack: Callable[[], Answers], attacked: Server, before_mib: float, row: Row) -> Answers:
    now_mib, began_s = memory_mib(attacked.processes), time.monotonic()
    with honest_client(attacked) as seen:
        answers = attack()
        seconds = time.monotonic() - began_s
    assert serving_processes() == attacked.processes, "a process ended, or began"
    told = ", ".join(f"{count} of {status}" for status, count in sorted(answers.items()))
    more_mib = memory_mib(attacked.processes) - now_mib
    row(name, told, f"{seconds:.0f}", seen["answered"], seen["again"], f"{seen['slowest_s']:.2f}", f"{more_mib:.0f}")
    assert seen["failed"] == []
    assert seen["answered"] > WARM_ANSWERS
    assert memory_mib(attacked.processes) - before_mib < MOST_GROWTH_MIB
    return answers


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, attacked: Server, memory_before_mib: float, row: Row) -> None:
    answers = withstands(name, lambda: ATTACKS[name](attacked.target), attacked, memory_before_mib, row)
    assert not [status for status in answers if status.startswith("5") and status != "503"], answers


def test_deployments_that_fail(attacked: Server, memory_before_mib: float, row: Row, tmp_path: Path) -> None:
    name = "A4 a model that cannot be loaded deployed, and one that no node takes, rolled back"
    answers = withstands(
        name, lambda: failing_deployments(attacked.package, tmp_path), attacked, memory_before_mib, row
    )
    assert answers == {"refused": 4, "refused once rolled back": 4}
