"""The torch module of ``mlp``: a Hugging Face model, so that it is saved, loaded and trained as the others are.

Shapes: B rows, C columns, H width of the residual stream, V outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

CLIP = 10.0  # deviations: int8 has one scale for a batch, in which one row's outlier must not drown the others


class TabularMlpConfig(PretrainedConfig):  # type: ignore[misc]
    """What config.json holds: the shape, and of each column how it is standardised or how many categories it has."""

    model_type = "overproof_tabular_mlp"

    def __init__(
        self,
        hidden_size: int = 32,
        intermediate_size: int = 64,
        num_hidden_layers: int = 2,
        means: list[float] | None = None,
        deviations: list[float] | None = None,
        categories: list[int] | None = None,  # 0 for a numeric column
        embedding_widths: list[int] | None = None,  # of the other columns
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.initializer_range = num_hidden_layers, initializer_range
        self.means, self.deviations, self.categories = means or [], deviations or [], categories or []
        self.embedding_widths = embedding_widths or []
        super().__init__(**kwargs)


class ResidualLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, config: TabularMlpConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states_B1H: Tensor) -> Tensor:
        changed: Tensor = self.down(gelu(self.up(self.norm(states_B1H))))
        return states_B1H + changed


class TabularMlp(PreTrainedModel):  # type: ignore[misc]
    """Rows of a table to logits. Constants of the columns come from the configuration: nothing casts them."""

    config_class = TabularMlpConfig
    base_model_prefix = ""
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # it has no attention, and refuses none

    def __init__(self, config: TabularMlpConfig) -> None:
        super().__init__(config)
        counts = [count for count in config.categories if count]
        self.numeric = [place for place, count in enumerate(config.categories) if not count]
        self.categorical = [place for place, count in enumerate(config.categories) if count]
        self.embeddings = nn.ModuleList(
            nn.Embedding(count + 1, width) for count, width in zip(counts, config.embedding_widths, strict=True)
        )
        width = 2 * len(self.numeric) + sum(config.embedding_widths)
        self.project = nn.Linear(width, config.hidden_size)
        self.layers = nn.ModuleList(ResidualLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        """``features`` (B, C), as ``models.mlp`` describes them; a category's number counts from 0."""
        states_B1H = self.project(self._inputs(features))[:, None]
        for layer in self.layers:
            states_B1H = layer(states_B1H)
        return SequenceClassifierOutput(logits=self.head(self.norm(states_B1H))[:, 0])

    def _inputs(self, features_BC: Tensor) -> Tensor:
        dtype, parts = self.project.weight.dtype, []
        missing_BC = features_BC.isnan()
        known_BC = torch.where(missing_BC, 0.0, features_BC)
        if self.numeric:
            means, deviations = (
                torch.tensor([values[place] for place in self.numeric], device=features_BC.device)
                for values in (self.config.means, self.config.deviations)
            )
            absent = missing_BC[:, self.numeric]
            standard = ((known_BC[:, self.numeric] - means) / deviations).clamp(-CLIP, CLIP)
            scaled = torch.where(absent, 0.0, standard)
            parts += [scaled.to(dtype), absent.to(dtype)]
        for place, table in zip(self.categorical, self.embeddings, strict=True):
            number_B = torch.where(missing_BC[:, place], 0, known_BC[:, place].long() + 1)  # 0 stands for missing
            parts.append(table(number_B))
        return torch.cat(parts, 1)
