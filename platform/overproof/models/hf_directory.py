"""Models: built from a recipe, and read from and written to plain Hugging Face directories."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import fs
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from overproof.config.models import ModelSection
from overproof.data.chat_template_files import DEFAULT, named_templates, template_files
from overproof.data.manifest import TOKENIZER, TOKENIZER_CONFIG, Manifest
from overproof.data.text_tokenizer import tokenizer_config
from overproof.errors import InputError
from overproof.models.base import BaseFamily, ComposedFamily, LayerNames, ModelFamily, shape_of
from overproof.models.pretrained import refuse_pickles, weight_files
from overproof.models.safetensors_writer import FILE_BYTES, TensorShape, index_of, plan_files, write_file
from overproof.models.sizes import family_of, most_positions, require_apart, require_positions
from overproof.registry import FAMILIES

Batch = dict[str, Tensor]


def build_model(section: ModelSection, manifest: Manifest, seed: int) -> PreTrainedModel:
    """A model with fresh weights, a function of its arguments alone; the caller's generators stay untouched.

    Raises:
        InputError: the model does not fit the data.
    """
    family, shape = FAMILIES[section.kind], shape_of(manifest)
    if shape.task not in family.tasks:
        raise InputError(
            f"model.kind {section.kind!r}: the data is for {shape.task}; expected data for {' or '.join(family.tasks)}"
        )
    config = family.configuration(section, shape)
    config.architectures = [family.architectures[0]]
    return _fresh(family, config, seed).train()


def _fresh(family: ModelFamily, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = family.model_class()(config)
    return model


def layer_names(model: PreTrainedModel) -> LayerNames:
    """Where a model keeps its parts."""
    return model_family(model).names


def model_family(model: PreTrainedModel) -> ModelFamily:
    """Of a model, by its class."""
    _, family = family_of({"architectures": [type(model).__name__]}, model.config.name_or_path)
    return family


def model_parts(model: PreTrainedModel) -> Sequence[PreTrainedModel]:
    """The models that one is made of: itself, of most."""
    family = model_family(model)
    return family.parts(model) if isinstance(family, ComposedFamily) else [model]


def output_layer(model: PreTrainedModel) -> nn.Module:
    """The layer that gives a model's logits."""
    found: nn.Module | None = model.get_output_embeddings()  # known of decoders of any architecture
    return model.get_submodule(layer_names(model).output) if found is None else found


def load_model(path: Path) -> PreTrainedModel:
    """Read a Hugging Face directory, fp32, in evaluation mode.

    Raises:
        InputError: a pickle lies there, no safetensors do, the architecture is unknown, or weights do not fit.
    """
    model, wrong = _read(Path(path))
    _refuse(path, wrong)
    return model


def load_start(path: Path, manifest: Manifest, seed: int) -> PreTrainedModel:
    """A directory's model as training starts from it, in evaluation mode.

    One that was trained for other outputs is fitted to the data, where its family has a ``base``: what it lacks is
    made anew, a function of the seed; the output layer, too, unless it is of the data's classes, which it then has in
    their order; the table of positions is cut to the length of the rows.

    Raises:
        InputError: as ``load_model``, or it cannot take the data's rows.
    """
    model, wrong = _read(Path(path))
    return _started(model, wrong, path, manifest, seed)


def _started(
    model: PreTrainedModel, wrong: Mapping[str, list[str]], path: Path, manifest: Manifest, seed: int
) -> PreTrainedModel:
    _, family = family_of({"architectures": model.config.architectures}, path)
    if isinstance(family, ComposedFamily):
        _refuse(path, wrong)
        return family.renewed(model, [_started(part, {}, path, manifest, seed) for part in family.parts(model)])
    if not isinstance(family, BaseFamily):
        _refuse(path, wrong)
        return _fit_tokenizer(model, path, manifest)
    names, shape = family.base, shape_of(manifest)
    _refuse(path, {kind: [key for key in keys if not key.startswith(names.optional)] for kind, keys in wrong.items()})
    config = family.fitted(model.config, shape)
    config.architectures = [family.architectures[0]]
    fitted, state = _fresh(family, config, seed).eval(), model.state_dict()
    anew = set(wrong.get("missing_keys", ()))
    order, output = (
        family.output_order(model.config, shape),
        [n for n in state if n.startswith(f"{family.names.output}.")],
    )
    if order is None:
        anew |= set(output)
    else:
        state |= {name: state[name][order] for name in output}
    table = f"{names.positions}.weight"
    if table in state:
        state[table] = state[table][: len(fitted.state_dict()[table])]
    fitted.load_state_dict({name: value for name, value in state.items() if name not in anew}, strict=False)
    return fitted


def require_outputs(path: Path, manifest: Manifest) -> None:
    """Look whether a directory's model answers as it is: whether its outputs are the data's, where it may lack them.

    Raises:
        InputError: they are not, and would have to be trained.
    """
    _, family = family_of(read_config(path), path)
    model_class: Any = family.model_class()
    config = model_class.config_class.from_pretrained(path, local_files_only=True)
    for settings, own in family.parts_of(config) if isinstance(family, ComposedFamily) else [(config, family)]:
        _require_outputs(settings, own, path, manifest)


def _require_outputs(config: Any, family: ModelFamily, path: Path, manifest: Manifest) -> None:
    if not isinstance(family, BaseFamily):
        return
    classes = list(manifest.details["classes"])
    if config.architectures[0] != family.architectures[0] or family.output_order(config, shape_of(manifest)) is None:
        found = ", ".join(name for _, name in sorted(config.id2label.items()))
        raise InputError(
            f"{path}: has no output layer for the classes {', '.join(classes)} (its own: {found}), and train.steps is "
            "0; expected steps, or the data's classes by name as id2label of its config.json"
        )


def _read(path: Path) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """A directory's model in evaluation mode, and the names of weights that are missing, too many or of another shape.

    Raises:
        InputError: a pickle lies there, no safetensors do, or the architecture is unknown.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected a Hugging Face model directory")
    refuse_pickles(path, (file.name for file in path.rglob("*")))
    weight_files(fs.LocalFileSystem(), str(path))
    _, family = family_of(read_config(path), path)
    model_class: Any = family.model_class()
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation=family.attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,  # transformers asks at a terminal where nothing is said
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told in info, and refused below
            )
    except SafetensorError as error:
        raise InputError(f"{path}: not safetensors: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a model's own class raises over what stands in config.json
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: transformers cannot build it: {found}") from None
    return model.eval(), {kind: sorted(map(str, keys)) for kind, keys in info.items()}


def _refuse(path: Path, wrong: Mapping[str, Sequence[str]]) -> None:
    for kind, keys in wrong.items():
        if keys:
            raise InputError(f"{path}: weights do not fit config.json: {kind.replace('_', ' ')}: {keys[0]}")


def _fit_tokenizer(model: PreTrainedModel, path: Path, manifest: Manifest) -> PreTrainedModel:
    """A vocabulary that has more entries than the data's ends with it: those are padding, of which models of one
    tokenizer have more or less. Its texts begin and end as the data's do from here on."""
    if manifest.apart:
        require_apart({"architectures": model.config.architectures}, path)
    if manifest.tokenizer_sha256 is not None:
        require_positions(model.config.to_dict(), manifest.positions)
        found = model.config.vocab_size
        if found < manifest.outputs:
            raise InputError(
                f"{path}: a vocabulary of {found}; the data's has {manifest.outputs}: expected a model of its tokenizer"
            )
        if found > manifest.outputs:
            model.resize_token_embeddings(manifest.outputs)
    if manifest.end_id is not None:
        model.config.bos_token_id, model.config.eos_token_id = manifest.bos_id, manifest.end_id
    return model


def model_of_state(family: ModelFamily, config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model that holds these weights, none drawn only to be replaced; in evaluation mode.

    Raises:
        RuntimeError: they are not all that the configuration asks for.
    """
    model_class: Any = family.model_class()
    with _quiet():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            attn_implementation=family.attention,
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise RuntimeError(f"weights do not fit their configuration: {wrong}")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no table from transformers: what goes wrong is told once, by the error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


def read_config(path: Path) -> dict[str, Any]:
    """A directory's config.json, empty where there is none that can be read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    return config if isinstance(config, dict) else {}


def save_model(
    weights: PreTrainedModel | Mapping[str, Tensor],
    config: Any,
    path: Path,
    tokenizer: Path | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a plain Hugging Face directory: config.json, safetensors in files of ``file_bytes`` at most and, for text,
    the tokenizer.

    ``config`` is the model's own (``model.config``); ``weights`` may be a gathered state instead of a model.
    """
    state, architectures = weights, config.architectures
    if isinstance(weights, nn.Module):
        state, architectures = weights.state_dict(), [type(weights).__name__]
    save_description(config, architectures, path, tokenizer)
    shapes = {name: TensorShape.of(state[name]) for name in written_names(config, architectures, list(state))}
    files = plan_files(shapes, file_bytes)
    for file in files:
        with (path / file.name).open("wb") as stream:
            write_file(stream, file, shapes, (state[name] for name in file.tensors))
    for name, content in index_of(files, shapes).items():
        (path / name).write_bytes(content)


def written_names(config: Any, architectures: list[str], names: list[str]) -> list[str]:
    """Of the names in a model's state, those that its directory has: tied weights once, and no constants."""
    _, family = family_of({"architectures": architectures}, config.name_or_path)
    return family.untied(config, names)


def save_description(config: Any, architectures: list[str], path: Path, tokenizer: Path | None = None) -> None:
    """All of a Hugging Face directory but its weights."""
    path.mkdir(parents=True, exist_ok=True)
    written_config = copy.copy(config)
    written_config.architectures = architectures
    written_config.save_pretrained(path)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, path / TOKENIZER)
        text, most = tokenizer.read_text(encoding="utf-8"), most_positions(config.to_dict())
        limit = {} if most is None else {"model_max_length": most}
        bos, eos = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
        end = eos[0] if isinstance(eos, list) else eos
        (path / TOKENIZER_CONFIG).write_text(tokenizer_config(text, bos, end, **limit), encoding="utf-8")


def chat_template(path: Path) -> str | None:
    """The Jinja text by which a Hugging Face directory writes chat messages as a prompt, None where it has none."""
    return named_templates(template_files(str(path))).get(DEFAULT)


def count_parameters(model: nn.Module) -> int:
    """Numbers in a model, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def to_tensors(columns: Mapping[str, NDArray[Any]], pinned: bool = False) -> Batch:
    """Columns as tensors that share no memory with them; integers become int64. ``pinned``: in memory that a GPU copies
    from while it computes.
    """
    batch = {
        name: torch.from_numpy(values.astype(np.int64 if values.dtype.kind in "iu" else values.dtype))
        for name, values in columns.items()
    }
    return {name: values.pin_memory() for name, values in batch.items()} if pinned else batch
