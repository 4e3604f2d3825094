"""Whether a GGUF file can hold a model, by its configuration alone: asked before anything is trained, and when one is
written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overproof.errors import InputError, suggest_name
from overproof.export import llama_cpp_converter
from overproof.models.base import GgufFamily
from overproof.models.gguf_layout import GgufLayout
from overproof.models.sizes import family_of
from overproof.registry import FAMILIES

BLOCK = 32  # weights that share one scale in q8_0 and q4_0


def check_model(config: Mapping[str, Any], positions: int, where: object, variants: Sequence[str] = ()) -> None:
    """See ``Format.check_model``."""
    if not isinstance(family_of(config, where)[1], GgufFamily) and llama_cpp_converter.is_configured():
        require_plain(variants, where)
        llama_cpp_converter.require_architecture(config["architectures"][0], where)
        return
    kind, family = gguf_family_of(config, where)
    read = _configuration(family, config, where)
    check_configuration(kind, family.gguf, read, where)
    context = family.gguf.metadata(read)["context_length"]
    if positions > context:
        raise InputError(
            f"{where}/config.json: rows of {positions} tokens (data.sequence_length), and llama.cpp computes what the "
            f"model does up to {context} tokens (by its positions, its sliding window or the length they were scaled "
            f"from): lower data.sequence_length to {context}"
        )


def require_plain(variants: Sequence[str], where: object) -> None:
    """Look whether a model that llama.cpp's converter writes is asked for in plain variants alone.

    Raises:
        InputError: one is calibrated.
    """
    for variant in variants:
        if "-" in variant:
            able = ", ".join(kind for kind, family in FAMILIES.items() if isinstance(family, GgufFamily))
            raise InputError(
                f"{where}: compress.formats: {variant} is calibrated, as models of {able} can be alone: leave it out"
            )


def check_configuration(kind: str, layout: GgufLayout, config: Any, where: object) -> None:
    """Return where llama.cpp computes what a model of this Hugging Face configuration does; ``where`` is its folder.

    Raises:
        InputError: it does not, with everything that was found.
    """
    found = [*layout.unfit(config), *_widths_unfit(layout, config)]
    if found:
        raise InputError(
            f"{where}/config.json: found {'; and '.join(found)}: the GGUF export of {kind} covers no other: "
            "give a model that has what was expected"
        )


def _widths_unfit(layout: GgufLayout, config: Any) -> Iterator[str]:
    figures = layout.metadata(config)
    heads_width = figures["attention.head_count"] * figures.get("attention.key_length", BLOCK)
    for key, width in (
        ("embedding_length", figures["embedding_length"]),
        ("feed_forward_length", figures["feed_forward_length"]),
        ("heads of", heads_width),
    ):
        if width % BLOCK:
            yield f"{key} {width}; expected a multiple of {BLOCK}"


def gguf_family_of(config: Mapping[str, Any], where: object) -> tuple[str, Any]:
    """The family of a model by the content of its config.json, and its kind.

    Raises:
        InputError: llama.cpp has none of it, or it is unknown.
    """
    kind, family = family_of(config, where)
    if isinstance(family, GgufFamily):
        return kind, family
    [named, *_] = config["architectures"]
    known = [name for other in FAMILIES.values() if isinstance(other, GgufFamily) for name in other.architectures]
    near = suggest_name(named, known)
    raise InputError(
        f"{where}/config.json: architecture {named} is not written as GGUF{near}; expected {' or '.join(known)}"
        f"{llama_cpp_converter.HOW}"
    )


def _configuration(family: Any, config: Mapping[str, Any], where: object) -> Any:
    """As transformers reads it, with what it fills in."""
    try:
        return family.configuration_class().from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{where}/config.json: transformers cannot read it: {' '.join(str(error).split())}") from None
