"""int8 files of a BERT classifier by other tools, in a Python of their own, which ``encoder.py --peers`` starts.

    PYTHON benchmarks/encoder_peers.py MODEL FOLDER

FOLDER gets ``optimum.onnx`` (dynamic, per channel, for AVX-512 VNNI) and ``olive.onnx`` (fused by ONNX Runtime's
transformer optimiser, then dynamic, per channel).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from olive.workflows import run
from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig


def main(model: Path, folder: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        whole, rounded, fused = (Path(scratch, name) for name in ("whole", "rounded", "fused"))
        ORTModelForSequenceClassification.from_pretrained(model, export=True).save_pretrained(whole)
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        ORTQuantizer.from_pretrained(whole).quantize(save_dir=rounded, quantization_config=settings)
        shutil.copyfile(next(rounded.glob("*.onnx")), folder / "optimum.onnx")
        cpu = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
        shape = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
        run(
            {
                "input_model": {"type": "ONNXModel", "model_path": str(whole / "model.onnx")},
                "systems": {"here": {"type": "LocalSystem", "accelerators": [cpu]}},
                "passes": {
                    "fuse": {"type": "OrtTransformersOptimization", "model_type": "bert", "opt_level": 1, **shape},
                    "round": {"type": "OnnxDynamicQuantization", "per_channel": True, "reduce_range": True},
                },
                "target": "here", "host": "here", "output_dir": str(fused), "cache_dir": str(Path(scratch, "cache")),
            }
        )  # fmt: skip
        shutil.copyfile(next(fused.rglob("*.onnx")), folder / "olive.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
