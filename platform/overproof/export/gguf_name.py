"""The name in a GGUF file, from which llama.cpp also concludes how special tokens strip the spaces beside them.

A file has no field for that. `llama-vocab.cpp` (https://github.com/ggml-org/llama.cpp) looks at ``general.name``, in
small letters: one that has "phi-3" or "phi3" in it makes every special or added token take the spaces that follow it,
as Phi-3's own do, but for three, and a vocabulary that lacks one of those cannot be loaded; "modern-bert" makes [MASK]
take the spaces before it.
"""

from __future__ import annotations

import json
import re

from overproof.data.tokenizer_json import entries

SPOKEN_TO = re.compile(r"phi-?3|modern-bert", re.IGNORECASE)
PHI3 = "phi-3"
STRIPPING, KEEPING = "</s>", ("<unk>", "<s>", "<|endoftext|>")  # by name; each must be in the vocabulary


def written_name(name: str, tokenizer: str) -> str:
    """A model's name such that llama.cpp reads special tokens as a ``tokenizer.json``, of this content, does.

    Spaces stand in the place of what llama.cpp looks for, and Phi-3 before the name of a model that has its tokens.
    """
    safe = SPOKEN_TO.sub(lambda found: " ".join(re.findall(r"[^\W\d]+|\d+", found[0])), name)
    return f"{PHI3} {safe}" if _strips_as_phi3(tokenizer) else safe


def _strips_as_phi3(tokenizer: str) -> bool:
    spec = json.loads(tokenizer)
    strips = {token["content"]: bool(token.get("rstrip")) for token in spec["added_tokens"]}
    known = set(entries(spec).values())
    return (
        any(strips.values())
        and {STRIPPING, *KEEPING} <= known
        and all(strip == (token not in KEEPING) for token, strip in strips.items())
    )
