"""OpenAI's package, LiteLLM and LangChain as people install them, from an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_tools import HERMES

from overproof.engines.llamacpp import LlamaCpp
from overproof.export.gguf_file import export_gguf
from overproof.serve.middleware import Access
from overproof.serve.routes import build_app
from single_model import listening, one

CLIENTS_PYTHON = "OVERPROOF_CLIENTS"
PROGRAM = Path(__file__).with_name("client_program.py")
OTHERWISE = {  # what comes of a thing that is tried, where that is not simply true
    "openai: a tool is called": ["on"],
    "openai: a prompt that is too long": "context_length_exceeded",
    "litellm: a tool is called": ["on"],
    "litellm: a prompt that is too long": "ContextWindowExceededError",
    "litellm: falls back to a larger model": "from the larger",
    "langchain: a tool is called": ["on"],
    "langchain: choices, seeds, log-probabilities": 2,
    "langchain: completions": 2,
}


@pytest.mark.trial
@pytest.mark.skipif(
    CLIENTS_PYTHON not in os.environ,
    reason=f"{CLIENTS_PYTHON} names the Python of an environment with litellm and langchain-openai",
)
def test_clients_work_unmodified(text_package: Path, tmp_path: Path) -> None:
    (student,) = text_package.parent.glob("sweep-*/students/student")
    file = tmp_path / "model.gguf"
    export_gguf(student, text_package / "tokenizer.json", file, format="q8_0", name="tools", chat_template=HERMES)
    engine = LlamaCpp(file, slots=2)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with listening(build_app(one(text_package, engine, max_tokens=96), Access())) as url:
        command = [os.environ[CLIENTS_PYTHON], str(PROGRAM), f"{url}/v1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    engine.close()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 20
    wrong = {name: value for name, value in found.items() if value != OTHERWISE.get(name, True)}
    assert wrong == {}
