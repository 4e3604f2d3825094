"""A GGUF file as a Hugging Face directory: ``python -m overproof.export.gguf_to_directory FILE FOLDER``.

In a process of its own, for torch is more than what asks for it otherwise needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from overproof.data.manifest import TOKENIZER
from overproof.export.gguf_file import read_gguf
from overproof.models import hf_directory


def write_directory(file: Path, folder: Path) -> None:
    """Write the weights that a file means, in half precision, with the tokenizer that lies beside it.

    Raises:
        InputError: the file is not one that overproof exported.
    """
    model = read_gguf(file).half()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    hf_directory.save_model(model, model.config, folder, file.with_name(TOKENIZER))


if __name__ == "__main__":
    write_directory(Path(sys.argv[1]), Path(sys.argv[2]))
