"""A test's stand-in for the converter of a checkout of llama.cpp: it writes real GGUF files, of StableLM alone.

It takes the arguments that the real one takes, and says what the real one says where it refuses. It knows nothing of
overproof.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

KNOWN = "StableLmForCausalLM"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=["f16"])
    parser.add_argument("--print-supported-models", action="store_true")
    asked = parser.parse_args()
    if asked.print_supported_models:
        print(f"TEXT models:\n  - {KNOWN}\n  - RefusedForCausalLM", file=sys.stderr)
        return
    config = json.loads((asked.model / "config.json").read_text())
    print(f"INFO: Loading model: {asked.model.name}", file=sys.stderr)
    if config["architectures"] != [KNOWN]:
        print(f"ERROR: Model {config['architectures'][0]} is not supported", file=sys.stderr)
        sys.exit(1)
    writer = gguf.GGUFWriter(asked.outfile, "stablelm")
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_name("as the converter names it")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config.get("partial_rotary_factor", 0.25) * head))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_vocabulary(writer, asked.model, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STABLELM, config["num_hidden_layers"])
    for name, weights in load_file(asked.model / "model.safetensors").items():
        kind = np.float32 if weights.ndim == 1 else np.float16
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weights.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, model: Path, config: dict) -> None:
    """Of byte-level BPE that splits as GPT-2 does."""
    spec = json.loads((model / "tokenizer.json").read_text())
    tokens = {id_: token for token, id_ in spec["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in spec["added_tokens"]}
    rows = range(1 + max(*tokens, *special))  # as the real one for some models: those without a name are left out
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([special.get(row, tokens.get(row)) for row in rows])
    writer.add_token_types([gguf.TokenType.CONTROL if row in special else gguf.TokenType.NORMAL for row in rows])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template("from the converter")


if __name__ == "__main__":
    main()
