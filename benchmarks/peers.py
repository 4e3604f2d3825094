"""Environments of the peers, which cannot live in the product's own; torch and what fits is taken from there.

    .venv/bin/python benchmarks/peers.py FOLDER

Makes FOLDER/hf (datasets, accelerate), FOLDER/trl (the same and TRL), FOLDER/llama-factory (LLaMA-Factory, with older
transformers, TRL, peft and datasets), FOLDER/mosaic (mosaicml-streaming, with older numpy and transformers), and of
servers FOLDER/transformers-serve, FOLDER/litserve and FOLDER/bentoml, with pip, in
about three minutes, and nothing where they are there already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from measuring import HERE

PLATFORM = HERE.parent / "platform"  # an editable install's own file is not read through another's
HUGGING_FACE = ("datasets>=5.2,<6", "accelerate>=1.15,<2", "multiprocess", "dill", "xxhash")
TRL = (*HUGGING_FACE, "trl>=1.16,<2")
LLAMA_FACTORY = (  # each without what it needs: pip would take another torch
    "llamafactory==0.9.5", "transformers==5.6.0", "trl==0.24.0", "peft==0.18.1", "accelerate==1.11.0",
    "datasets==4.0.0", "multiprocess<0.70.17", "dill<0.3.9", "fsspec<=2025.3.0", "xxhash", "pandas", "pytz",
    "python-dateutil", "tzdata", "six", "fire", "termcolor", "omegaconf", "antlr4-python3-runtime==4.9.3", "tyro<0.9",
    "docstring-parser", "shtab", "typeguard", "torchdata==0.11.0", "einops", "sentencepiece", "tiktoken",
    "sse-starlette", "tokenizers<0.23", "huggingface_hub<2",
)  # fmt: skip
MOSAIC = ("mosaicml-streaming>=0.13,<0.14",)
MOSAIC_NEEDS = (
    "numpy<2.2", "transformers<5", "boto3", "Brotli", "google-cloud-storage", "matplotlib", "paramiko",
    "python-snappy", "tqdm", "xxhash", "zstd", "oci", "azure-storage-blob", "azure-storage-file-datalake",
    "azure-identity", "catalogue",
)  # fmt: skip
# `transformers serve` needs openai, fastapi and uvicorn too, which are here already.
TRANSFORMERS_SERVE = ("accelerate>=1.15,<2",)
LITSERVE = ("litserve>=0.2.19,<0.3",)
BENTOML = ("bentoml>=1.4.40,<1.5",)
# Its image data sets alone use torchvision; the one that pip finds would not fit a torch without CUDA.
MOSAIC_STAND_INS = {
    "torchvision/__init__.py": "",
    "torchvision/datasets.py": "class VisionDataset: ...\n",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def to_tensor(image): raise NotImplementedError\n",
}
LLAMA_FACTORY_STAND_INS = {"torchaudio/__init__.py": ""}  # which sound alone takes


def make(folder: Path, needs: tuple[str, ...], alone: tuple[str, ...], stand_ins: dict[str, str]) -> Path:
    """An environment that sees this one's packages behind its own; gives its Python."""
    python = folder / "bin" / "python"
    done = folder / "done"
    if done.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if needs:
        subprocess.run([*install, *needs], check=True, stdout=sys.stderr)
    if alone:
        subprocess.run([*install, "--no-deps", *alone], check=True, stdout=sys.stderr)
    own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    for name, text in stand_ins.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)
    (own / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n{PLATFORM}\n")
    done.touch()
    return python


def hugging_face(folder: Path) -> Path:
    """The Python that has `datasets` and `accelerate`."""
    return make(folder / "hf", (), HUGGING_FACE, {})


def trl(folder: Path) -> Path:
    """The Python that has `trl`."""
    return make(folder / "trl", (), TRL, {})


def llama_factory(folder: Path) -> Path:
    """The Python that has `llamafactory`."""
    return make(folder / "llama-factory", (), LLAMA_FACTORY, LLAMA_FACTORY_STAND_INS)


def mosaic(folder: Path) -> Path:
    """The Python that has `streaming`."""
    return make(folder / "mosaic", MOSAIC_NEEDS, MOSAIC, MOSAIC_STAND_INS)


def transformers_serve(folder: Path) -> Path:
    """The Python that has what `transformers serve` needs."""
    return make(folder / "transformers-serve", (), TRANSFORMERS_SERVE, {})


def litserve(folder: Path) -> Path:
    """The Python that has `litserve`, with the uvicorn, uvloop and httptools that it asks for."""
    return make(folder / "litserve", LITSERVE, (), {})


def bentoml(folder: Path) -> Path:
    """The Python that has `bentoml`, with all that it asks for."""
    return make(folder / "bentoml", BENTOML, (), {})


if __name__ == "__main__":
    everyone = (hugging_face, trl, llama_factory, mosaic, transformers_serve, litserve, bentoml)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(*(made(parser.parse_args().folder.absolute()) for made in everyone))
