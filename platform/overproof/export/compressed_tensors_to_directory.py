"""A file in compressed-tensors as vLLM reads it: ``python -m overproof.export.compressed_tensors_to_directory FILE
FOLDER``.

The weights are the file itself, copied, so that nobody changes them under a server; beside it lie the configuration
that its header holds, its tokenizer and, since vLLM is given token ids, a GGUF file without tensors that says what
bytes they stand for.
In a process of its own, for torch is more than what asks for it otherwise needs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf

from overproof.data.manifest import TOKENIZER, TOKENIZER_CONFIG
from overproof.data.text_tokenizer import tokenizer_config
from overproof.engines.vllm_server import VOCABULARY
from overproof.export.compressed_tensors_file import configuration, opened
from overproof.export.gguf_vocabulary import add_vocabulary
from overproof.models.pretrained import WEIGHTS
from overproof.models.sizes import most_positions


def write_directory(file: Path, folder: Path) -> None:
    """Make the folder of a file that has its tokenizer beside it.

    Raises:
        InputError: the file is not one that overproof exported.
    """
    with opened(file) as (_, header):
        config, family = configuration(header.config, file)
    tokenizer = file.with_name(TOKENIZER)
    text, ends = tokenizer.read_text(encoding="utf-8"), config.eos_token_id
    (folder / "config.json").write_text(json.dumps(header.config, indent=1), encoding="utf-8")
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    described = tokenizer_config(text, config.bos_token_id, ends[0] if isinstance(ends, list) else ends)
    (folder / TOKENIZER_CONFIG).write_text(described, encoding="utf-8")
    writer = gguf.GGUFWriter(folder / VOCABULARY, family.gguf.architecture)
    context = most_positions(header.config) or family.gguf.metadata(config)["context_length"]
    writer.add_context_length(context)
    add_vocabulary(writer, tokenizer, config)
    if header.chat_template is not None:
        writer.add_chat_template(header.chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    shutil.copyfile(file, folder / WEIGHTS)


if __name__ == "__main__":
    write_directory(Path(sys.argv[1]), Path(sys.argv[2]))
