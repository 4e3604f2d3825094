"""Run llama.cpp's converter on several models: ``converter_driver.py CHECKOUT JOBS``, in a process of its own.

``JOBS`` is a JSON file: a list of objects with ``model``, ``file``, ``type``, ``split`` and ``pieces``. The converter
knows splits by hashes of what published vocabularies make of one text, which no other vocabulary has: it is told the
split's name. It reads SentencePiece's vocabularies from ``tokenizer.model``, which is made of ``pieces`` if there are
any: each its name, its score and its type.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

checkout, jobs = sys.argv[1:]
sys.path.insert(0, checkout)

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402
from sentencepiece import sentencepiece_model_pb2  # noqa: E402

BPE = 2  # of TrainerSpec.ModelType

for job in json.loads(Path(jobs).read_text()):
    if job["pieces"]:
        made = sentencepiece_model_pb2.ModelProto()
        made.trainer_spec.model_type, made.trainer_spec.byte_fallback = BPE, True
        for piece, score, kind in job["pieces"]:
            made.pieces.add(piece=piece, score=score, type=kind)
        Path(job["model"], "tokenizer.model").write_bytes(made.SerializeToString())
    TextModel.get_vocab_base_pre = lambda *_, split=job["split"]: split
    sys.argv = ["convert_hf_to_gguf.py", job["model"], "--outfile", job["file"], "--outtype", job["type"]]
    print(f"--- {job['file']}", flush=True)
    convert_hf_to_gguf.main()
