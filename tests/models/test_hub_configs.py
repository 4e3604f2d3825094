"""What publishers write in config.json: every family is recognised, planned, built, written as GGUF and named in it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hub_configs import HUB_CONFIGS
from safetensors.torch import save_file

from made_tokenizers import byte_level
from overproof.config import Pretrained, TeacherLayers
from overproof.distill.pruning import keep_layers
from overproof.errors import InputError
from overproof.export.gguf_check import check_model
from overproof.export.gguf_file import export_gguf
from overproof.models import hf_directory
from overproof.models.base import DataShape, GgufFamily
from overproof.models.sizes import family_of, model_size, student_size
from overproof.registry import FAMILIES

SHAPE = DataShape("language_modeling", 0, 32, bos_id=0, end_id=0)
KINDS = [kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily)]


def _written(config: dict[str, Any], folder: Path) -> Path:
    """A directory of a model with random weights and this config.json, as it lies on the Hub."""
    _, family = family_of(config, folder)
    from transformers import AutoConfig

    read = {name: value for name, value in copy.deepcopy(config).items() if name not in ("auto_map",)}
    torch.manual_seed(0)
    model_class: Any = family.model_class()
    built = AutoConfig.for_model(**read)
    built.dtype = torch.float32
    make = getattr(model_class, "from_config", None)
    model = make(built) if make else model_class(built)
    kept = family.untied(model.config, list(model.state_dict()))
    folder.mkdir(parents=True)
    save_file({name: model.state_dict()[name].clone() for name in kept}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(_tokenizer())
    return folder


def _tokenizer() -> str:
    """Of no more tokens than the models have."""
    spec = json.loads(byte_level())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 300]
    vocabulary = {token: id_ for token, id_ in spec["model"]["vocab"].items() if id_ < 300}
    merges = [m for m in spec["model"]["merges"] if "".join(m if isinstance(m, list) else m.split(" ")) in vocabulary]
    spec["model"] |= {"vocab": vocabulary, "merges": merges}
    return json.dumps(spec)


def test_every_family_has_one() -> None:
    assert sorted(HUB_CONFIGS) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_configuration_is_planned_built_and_written(kind: str, tmp_path: Path) -> None:
    config = HUB_CONFIGS[kind]
    folder = _written(config, tmp_path / "model")
    assert family_of(config, folder)[0] == kind
    check_model(config, SHAPE.positions, folder)
    model = hf_directory.load_model(folder)
    planned = model_size(Pretrained(path=str(folder)), SHAPE)
    assert planned.parameters == hf_directory.count_parameters(model)
    assert planned.layers == model.config.num_hidden_layers
    file = tmp_path / "model.gguf"
    export_gguf(folder, folder / "tokenizer.json", file, "f16", kind)
    family: Any = FAMILIES[kind]
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.architecture)
    known = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    names = {known.get_name(key, (".weight", ".bias")) for key in family.untied(model.config, list(model.state_dict()))}
    assert None not in names
    assert names <= {tensor.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
@pytest.mark.parametrize("setting", [None, False, True])
def test_attention_in_both_directions_is_refused_and_none_and_false_are_one(kind: str, setting: bool | None) -> None:
    config = HUB_CONFIGS[kind] | {"use_bidirectional_attention": setting}
    if setting:
        with pytest.raises(InputError, match="use_bidirectional_attention True"):
            check_model(config, 32, kind)
    else:
        check_model(config, 32, kind)


# Cohere 2 has windows in three layers of four, and no writer here: as published for c4ai-command-r7b, smaller.
COHERE2 = {
    "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 96, "layer_norm_eps": 1e-05, "logit_scale": 0.25, "max_position_embeddings": 8192,
    "model_type": "cohere2", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2,
    "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0, "rope_theta": 50000, "sliding_window": 8,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 320,
}  # fmt: skip


def test_fewer_layers_of_another_decoder_keep_their_kinds_and_are_planned(tmp_path: Path) -> None:
    folder = _written(COHERE2, tmp_path / "model")
    planned = student_size(TeacherLayers(layers=(0, 1, 3)), Pretrained(path=str(folder)), SHAPE)
    fewer = keep_layers(hf_directory.load_model(folder), (0, 1, 3))
    assert fewer.config.layer_types == ["sliding_attention"] * 3
    assert planned.parameters == hf_directory.count_parameters(fewer)
    assert planned.layers == 3


def test_layers_that_are_kept_elsewhere_are_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    """Bloom's lie at ``transformer.h``."""
    config = {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4,
        "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder = _written(config, tmp_path / "model")
    teacher = Pretrained(path=str(folder))
    assert model_size(teacher, SHAPE).layers == 2
    with pytest.raises(InputError, match=r"keeps no layers at model\.layers"):
        student_size(TeacherLayers(layers=1), teacher, SHAPE)


def test_decoders_alone_are_taken_for_decoders() -> None:
    """Whatever transformers can run as a causal model, and also fill masks with, was trained to look both ways; except
    halves of models that translate, which are decoders.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    for kind, named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if not isinstance(named, str) or not named.endswith(("ForCausalLM", "LMHeadModel")):
            continue
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in ("bart", "mbart", "mvp"):
            with pytest.raises(InputError, match=f"architecture {named}"):
                family_of({"architectures": [named]}, "here")
        elif kind not in ("bert-generation", "xlnet"):
            assert family_of({"architectures": [named]}, "here")[0] in (*KINDS, "causal_lm")
