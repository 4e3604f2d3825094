"""What GGUF cannot hold is told before anything is trained, of every model that a recipe takes from a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finished import RECIPES
from overproof.cli.main import main
from overproof.export.check_models import refusals
from overproof.models.base import DataShape, GgufFamily
from overproof.models.decoder import DecoderModel
from overproof.models.student_config import with_layers
from overproof.registry import FAMILIES, FORMATS

TEXT = RECIPES / "stdlib-lm.yaml"
SHAPE = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def config(architecture: str, **changes: Any) -> dict[str, Any]:
    """What a config.json holds."""
    return {"architectures": [architecture], **SHAPE, **changes}


LLAMA, GEMMA2 = config("LlamaForCausalLM"), config("Gemma2ForCausalLM", query_pre_attn_scalar=16, head_dim=16)


def refusal(of: dict[str, Any], positions: int = 128) -> str:
    return "\n".join(refusals("gguf", positions, {"MODEL": of}))


@pytest.mark.parametrize(
    ("of", "told"),
    [
        (config("LlamaForCausalLM", rope_parameters=YARN),
         "found rope_type 'yarn'; expected 'default' or 'linear' or 'llama3': the GGUF export of llama covers no"),
        (config("Qwen2ForCausalLM", rope_scaling={"type": "yarn", "factor": 4.0}), "found rope_type 'yarn'"),
        (config("Qwen3ForCausalLM", head_dim=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
         "found rope_type 'dynamic'"),
        (config("LlamaForCausalLM", hidden_size=80, head_dim=20, intermediate_size=100),
         "found embedding_length 80; expected a multiple of 32; and feed_forward_length 100; expected a multiple of 32"
         "; and heads of 80; expected a multiple of 32"),
        (config("FalconForCausalLM", alibi=True), "found alibi True; expected False"),
        ({**GEMMA2, "layer_types": ["full_attention"] * 4}, "found layer_types ['full_attention', "),
        (config("MistralForCausalLM", sliding_window=64), "lower data.sequence_length to 64"),
        (config("Phi3ForCausalLM", rope_parameters=LONG, original_max_position_embeddings=64),
         "rows of 128 tokens (data.sequence_length), and llama.cpp computes what the model does up to 64 tokens"),
        ({"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64},
         "up to 64 tokens"),
        (config("StableLmForCausalLM"), "architecture StableLmForCausalLM is not written as GGUF"),
        ({**LLAMA, "hidden_size": "wide"}, "transformers cannot read it: "),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_told_with_what_would(of: dict[str, Any], told: str) -> None:
    assert refusal(of).startswith("MODEL/config.json: ")
    assert told in refusal(of)


@pytest.mark.parametrize("of", [LLAMA, GEMMA2, config("MistralForCausalLM", sliding_window=128)])
def test_one_that_fits_is_not(of: dict[str, Any]) -> None:
    assert refusal(of) == ""


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily)])
def test_what_a_recipe_describes_always_fits(kind: str) -> None:
    """So that only directories have to be asked about, and what has fewer of a directory's layers."""
    section = FAMILIES[kind].section
    assert section is not None
    assert issubclass(section, DecoderModel)
    for hidden, heads, layers in ((32, 2, 1), (96, 3, 5), (160, 1, 46)):
        numbers = {"hidden_size": hidden, "intermediate_size": 32, "layers": layers, "heads": heads, "kv_heads": 1}
        made = section(**{name: value for name, value in numbers.items() if name in section.model_fields})
        shape = DataShape("language_modeling", 320, 4096, bos_id=0, end_id=0)
        found = FAMILIES[kind].configuration(made, shape).to_dict() | {
            "architectures": [FAMILIES[kind].architectures[0]]
        }
        FORMATS["gguf"].check_model(found, 4096, kind)


def test_fewer_layers_are_asked_about_as_they_will_be() -> None:
    """Gemma 2 of 46 layers scales attention otherwise, and llama.cpp knows it by that number."""
    whole = config("Gemma2ForCausalLM", num_hidden_layers=46, head_dim=32, query_pre_attn_scalar=16)
    assert refusal(whole) == ""
    fewer = with_layers(whole, 6, FAMILIES["gemma2"].names)
    assert "found query_pre_attn_scalar 16; expected 32" in refusal(fewer)
    listed = with_layers({**GEMMA2, "layer_types": ["sliding_attention", "full_attention"] * 2}, 3,
                         FAMILIES["gemma2"].names)  # fmt: skip
    assert listed["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert refusal(listed) == ""
    assert with_layers({"n_layer": 4}, 2, FAMILIES["gpt2"].names) == {"n_layer": 2}


def directory(folder: Path, of: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(of))
    return str(folder)


def test_a_plan_asks_about_every_model_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = config("Gemma2ForCausalLM", num_hidden_layers=46, head_dim=32, query_pre_attn_scalar=16)
    teacher = {"kind": "pretrained", "path": directory(tmp_path / "teacher", whole)}
    student = {"kind": "pretrained", "path": directory(tmp_path / "long", {**LLAMA, "rope_parameters": YARN})}
    fresh = {"kind": "llama", "hidden_size": 64, "intermediate_size": 96, "layers": 1, "heads": 2, "kv_heads": 2}
    students = [
        {"name": "half", "model": {"kind": "teacher_layers", "layers": 6}},
        {"name": "long", "model": student},
        {"name": "fresh", "model": fresh},
    ]
    changes = (
        f"train.model={json.dumps(teacher)}", f"sweep.students={json.dumps(students)}", "tune={}",
        f"store={tmp_path / 'store'}",
    )  # fmt: skip
    assert main(["plan", str(TEXT), *(word for change in changes for word in ("--set", change))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        f"overproof: student half: what is left of {tmp_path}/teacher/config.json: found query_pre_attn_scalar 16;"
    )
    assert lines[1].startswith(f"student long: {tmp_path}/long/config.json: found rope_type 'yarn'; expected 'default'")
    assert len(lines) == 2
    assert not (tmp_path / "store").exists()
