"""Decoders that overproof itself does not write as GGUF, through the converter of a checkout of llama.cpp.

``OVERPROOF_LLAMA_CPP`` names the checkout (https://github.com/ggml-org/llama.cpp). Its ``convert_hf_to_gguf.py`` runs
in a process of its own, in the checkout's virtual environment where it has one. What it writes is quantised, held
against the model and judged as every other file is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from overproof.errors import InputError

CHECKOUT_VARIABLE = "OVERPROOF_LLAMA_CPP"
HOW = f"; or set {CHECKOUT_VARIABLE} to a checkout of llama.cpp, whose converter may write it"
SCRIPT = "convert_hf_to_gguf.py"
ENVIRONMENTS = (".venv", "venv")
QUOTED_LINES = 4  # of what a converter that failed has said last


def is_configured() -> bool:
    """Whether a checkout is named."""
    return bool(os.environ.get(CHECKOUT_VARIABLE))


def checkout_script() -> Path:
    """The converter of the checkout that is named.

    Raises:
        InputError: there is no such folder, or it has no converter.
    """
    named = os.environ.get(CHECKOUT_VARIABLE, "")
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"{CHECKOUT_VARIABLE}: {named}: no such folder; expected a checkout of llama.cpp")
    script = folder / SCRIPT
    if not script.is_file():
        raise InputError(
            f"{CHECKOUT_VARIABLE}: {named}: no {SCRIPT} in it; expected a checkout of llama.cpp, which has one at its "
            "top: git clone --depth 1 https://github.com/ggml-org/llama.cpp"
        )
    return script


def require_architecture(architecture: str, where: object) -> None:
    """Ask the converter whether it writes models of an architecture, by its name in config.json.

    Raises:
        InputError: it does not, or it cannot be run.
    """
    script = checkout_script()
    done = _run(script, "--print-supported-models")
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise InputError(f"{CHECKOUT_VARIABLE}: {script} cannot be run: {_last_lines(done)}; {_requirements(script)}")
    if re.search(rf"\b{re.escape(architecture)}\b", said) is None:
        raise InputError(
            f"{where}/config.json: architecture {architecture} is not among those that {script} writes; expected a "
            "newer checkout of llama.cpp, if any knows it"
        )


def convert(model: Path, file: Path) -> None:
    """Write a Hugging Face directory as one GGUF file in half precision.

    Raises:
        InputError: the converter refuses it, with what it said last.
    """
    script = checkout_script()
    done = _run(script, str(model), "--outfile", str(file), "--outtype", "f16")
    if done.returncode != 0 or not file.is_file():
        file.unlink(missing_ok=True)
        raise InputError(
            f"{model}: {script} wrote no file (exit code {done.returncode}): {_last_lines(done)}; expected a model and "
            "a tokenizer that this checkout of llama.cpp knows: update it, or train a model of another family"
        )


def _run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The converter, offline: a directory has all that it needs."""
    command = [str(_python(script.parent)), str(script), *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, env=variables | {"HF_HUB_OFFLINE": "1"}, cwd=script.parent, text=True, errors="replace",
        capture_output=True, check=False,
    )  # fmt: skip


def _python(checkout: Path) -> Path:
    found = (checkout / name / "bin" / "python" for name in ENVIRONMENTS)
    return next((python for python in found if python.is_file()), Path(sys.executable))


def _last_lines(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return " | ".join(lines[-QUOTED_LINES:]) or "it said nothing"


def _requirements(script: Path) -> str:
    return (
        f"expected its requirements in {script.parent}/{ENVIRONMENTS[0]}, or in this environment: "
        "pip install -r requirements/requirements-convert_hf_to_gguf.txt"
    )
