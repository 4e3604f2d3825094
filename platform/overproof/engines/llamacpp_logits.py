"""llama.cpp's logits at every place of a row of tokens, through the C interface of the library in `xllamacpp`.

The binding's server reports log-probabilities of what it generates, never of a prompt. The library beneath it exports
llama.cpp's C functions (https://github.com/ggml-org/llama.cpp, `include/llama.h`), which ctypes calls here. That header
is not in the wheel, so its structures are written down below for one release of the package. Before the first call
they are held against the defaults that the library itself fills in: no other layout is ever guessed at.

Shapes: S tokens of a row, P of them in one batch, V entries of the vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from overproof.config.base import KvCache
from overproof.engines.llamacpp_library import xllamacpp
from overproof.engines.llamacpp_memory import batch_tokens
from overproof.engines.prompt_limits import require_context
from overproof.errors import InputError

RELEASE = "2026.10.11549"  # of xllamacpp, whose structures these are
F32, F16, Q8_0 = 0, 1, 8  # of enum ggml_type
CACHES = {"f32": F32, "f16": F16, "q8_0": Q8_0}
WITHOUT_FLASH, WITH_FLASH = 0, 1  # of enum llama_flash_attn_type

# Name, type and default value of each field, in order. A pointer's default is None.
MODEL_PARAMS: tuple[tuple[str, Any, Any], ...] = (
    ("devices", c_void_p, None),
    ("tensor_buft_overrides", c_void_p, None),
    ("n_gpu_layers", c_int32, -1),
    ("split_mode", c_int32, 1),
    ("load_mode", c_int32, -1),
    ("lazy_mode", c_int32, 1),
    ("main_gpu", c_int32, 0),
    ("tensor_split", c_void_p, None),
    ("progress_callback", c_void_p, None),
    ("progress_callback_user_data", c_void_p, None),
    ("kv_overrides", c_void_p, None),
    ("vocab_only", c_bool, False),
    ("check_tensors", c_bool, False),
    ("use_extra_bufts", c_bool, True),
    ("no_host", c_bool, False),
    ("no_alloc", c_bool, False),
    ("load_mtp", c_bool, False),
)
CONTEXT_PARAMS: tuple[tuple[str, Any, Any], ...] = (
    ("n_ctx", c_uint32, 512),
    ("n_batch", c_uint32, 2048),
    ("n_ubatch", c_uint32, 512),
    ("n_seq_max", c_uint32, 1),
    ("n_rs_seq", c_uint32, 0),
    ("n_outputs_max", c_uint32, 0),
    ("n_outputs_max_per_seq", c_uint32, 1),
    ("n_threads", c_int32, 4),
    ("n_threads_batch", c_int32, 4),
    ("ctx_type", c_int32, 0),
    ("rope_scaling_type", c_int32, -1),
    ("pooling_type", c_int32, -1),
    ("attention_type", c_int32, -1),
    ("flash_attn_type", c_int32, -1),
    ("rope_freq_base", c_float, 0.0),
    ("rope_freq_scale", c_float, 0.0),
    ("yarn_ext_factor", c_float, -1.0),
    ("yarn_attn_factor", c_float, -1.0),
    ("yarn_beta_fast", c_float, -1.0),
    ("yarn_beta_slow", c_float, -1.0),
    ("yarn_orig_ctx", c_uint32, 0),
    ("defrag_thold", c_float, -1.0),
    ("cb_eval", c_void_p, None),
    ("cb_eval_user_data", c_void_p, None),
    ("type_k", c_int32, F16),
    ("type_v", c_int32, F16),
    ("abort_callback", c_void_p, None),
    ("abort_callback_data", c_void_p, None),
    ("unnamed", c_void_p, None),  # of this release; published headers that are older do not have it
    ("embeddings", c_bool, False),
    ("offload_kqv", c_bool, True),
    ("no_perf", c_bool, True),
    ("op_offload", c_bool, True),
    ("swa_full", c_bool, True),
    ("kv_unified", c_bool, False),
    ("samplers", c_void_p, None),
    ("n_samplers", c_size_t, 0),
    ("ctx_other", c_void_p, None),
)


class ModelParams(ctypes.Structure):
    """``struct llama_model_params``."""

    _fields_ = [(name, kind) for name, kind, _ in MODEL_PARAMS]


class ContextParams(ctypes.Structure):
    """``struct llama_context_params``."""

    _fields_ = [(name, kind) for name, kind, _ in CONTEXT_PARAMS]


class Batch(ctypes.Structure):
    """``struct llama_batch``: tokens, and for each its position, its sequence, and whether its logits are wanted."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # result and arguments
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_supports_mmap": (c_bool, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_free": (None, (c_void_p,)),
}


@cache
def library() -> Any:
    """The library, its functions declared, once its structures are known to be those above.

    Raises:
        InputError: another release is installed, or its defaults lie elsewhere than expected.
    """
    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    check_layout(found, xllamacpp.__version__)
    # It logs thousands of lines to stderr. A function of its own that only returns stands in for a callback: one of
    # Python would be called by the threads of a server that runs beside, even while the interpreter ends.
    found.llama_log_set(ctypes.cast(found.llama_supports_mmap, c_void_p), None)
    return found


def check_layout(found: Any, release: str) -> None:
    """Declare the functions of a library, and hold its defaults against the structures of this file.

    Raises:
        InputError: it is another release, lacks a function, or fills in other defaults.
    """
    wrong = [] if release == RELEASE else [f"release {release}"]
    wrong += [f"no function {name}" for name in FUNCTIONS if not hasattr(found, name)]
    if not wrong:
        for name, (result, arguments) in FUNCTIONS.items():
            getattr(found, name).restype, getattr(found, name).argtypes = result, arguments
        for params, fields in (
            (found.llama_model_default_params(), MODEL_PARAMS),
            (found.llama_context_default_params(), CONTEXT_PARAMS),
        ):
            given = ((name, getattr(params, name), default) for name, _, default in fields)
            wrong += [f"{name} {value} where the default is {default}" for name, value, default in given
                      if value != default]  # fmt: skip
    if wrong:
        raise InputError(
            f"xllamacpp: found {wrong[0]}; scoring calls llama.cpp's C interface as it is in {RELEASE}: "
            f"pip install xllamacpp=={RELEASE}"
        )


class LlamaCppLogits:
    """One GGUF file that reads rows of tokens, each from its beginning, in batches of bounded memory.

    Keys and values are cached as they are where a file is served, or in 32 bits. For one thread.
    """

    def __init__(
        self, path: Path, positions: int, threads: int = 1, kv_cache: KvCache | Literal["f32"] = "f16"
    ) -> None:
        """Load a file for rows of ``positions`` tokens at most.

        Raises:
            InputError: the file is missing, llama.cpp cannot load it, its context is shorter than the rows, or the C
                interface is not as expected.
        """
        if not path.is_file():
            raise InputError(f"{path}: missing; expected a GGUF file")
        self.positions = positions
        self._library = library()
        self._context = None
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if self._model is None:
            raise InputError(f"{path}: llama.cpp cannot load it; expected a whole GGUF file")
        try:
            require_context(path, positions, self._library.llama_model_n_ctx_train(self._model))
        except InputError:
            self.close()
            raise
        vocabulary = self._library.llama_model_get_vocab(self._model)
        self.outputs: int = self._library.llama_vocab_n_tokens(vocabulary)  # V
        self.batch_tokens = batch_tokens(positions, self.outputs)
        params = self._library.llama_context_default_params()
        params.n_ctx = positions
        params.n_batch = params.n_ubatch = params.n_outputs_max = params.n_outputs_max_per_seq = self.batch_tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHES[kv_cache]
        if kv_cache == "f32":
            params.flash_attn_type = WITHOUT_FLASH  # which casts a cache of 32 bits to 16
        elif kv_cache != "f16":
            params.flash_attn_type = WITH_FLASH  # without it values cannot be quantised
        self._context = self._library.llama_init_from_model(self._model, params)
        if self._context is None:
            self.close()
            why = "" if kv_cache != "q8_0" else ", cached in q8_0, which needs heads of a multiple of 32 numbers"
            raise InputError(f"{path}: llama.cpp cannot make room for {positions} tokens of it{why}")

    def batches(
        self, tokens_S: NDArray[Any], wanted_S: NDArray[np.bool_] | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The logits after each token of a row, or after those wanted, a batch (P, V) after the other; each is gone
        when the next comes. What no wanted place needs is left out of the last layer.

        Raises:
            RuntimeError: llama.cpp does not take the tokens: an id is not in the vocabulary, or the row is too long.
        """
        if len(tokens_S) > self.positions:
            raise RuntimeError(f"{len(tokens_S)} tokens in a row; llama.cpp was given room for {self.positions}")
        wanted_S = np.ones(len(tokens_S), bool) if wanted_S is None else wanted_S
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
        for start in range(0, len(tokens_S), self.batch_tokens):
            batch = slice(start, start + self.batch_tokens)
            yield self._decode(tokens_S[batch].astype(np.int32), start, wanted_S[batch])

    def logits_at(self, tokens_S: NDArray[Any], places_P: NDArray[np.int64]) -> NDArray[np.float32]:
        """The logits (P, V) after the tokens at some places of a row, in ascending order."""
        wanted_S = np.zeros(len(tokens_S), bool)
        wanted_S[places_P] = True
        return np.concatenate([logits_PV.copy() for logits_PV in self.batches(tokens_S, wanted_S)])

    def _decode(self, tokens_P: NDArray[np.int32], start: int, wanted_P: NDArray[np.bool_]) -> NDArray[np.float32]:
        count = len(tokens_P)
        positions_P = np.arange(start, start + count, dtype=np.int32)
        ones_P, sequence = np.ones(count, np.int32), np.zeros(1, np.int32)
        sequences_P = np.full(count, sequence.ctypes.data, np.uintp)
        flags_P = wanted_P.astype(np.int8)
        arrays = (positions_P, ones_P, sequences_P, flags_P)
        batch = Batch(count, tokens_P.ctypes.data, None, *(array.ctypes.data for array in arrays))
        code = self._library.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(
                f"llama.cpp gave {code} for {count} tokens from place {start} on, ids {tokens_P.min()} to "
                f"{tokens_P.max()} of {self.outputs}"
            )
        shape = (int(wanted_P.sum()), self.outputs)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape)

    def close(self) -> None:
        """Free the model."""
        if self._context is not None:
            self._library.llama_free(self._context)
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._context = self._model = None
