"""The recipe: one typed schema behind validation, command-line help, editor completion and fingerprints.

YAML is only its serialised form. Python users build ``Recipe(...)`` directly; every value is frozen.
"""

from overproof.recipe.data import (
    BpeTokenizer,
    DigitsData,
    FolderSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    TextData,
    TokenizerFile,
)
from overproof.recipe.distillation import Cache, Student, Sweep
from overproof.recipe.models import Llama, Pretrained, Vit
from overproof.recipe.section import Section
from overproof.recipe.shipping import (
    Agreement,
    Evaluate,
    Gate,
    Gguf,
    Improvement,
    Onnx,
    Parity,
    Regression,
    Rule,
    Serve,
    Smaller,
)
from overproof.recipe.training import Checkpoint, Optimization, Train
from overproof.recipe.whole import Recipe, load

__all__ = [
    "Agreement",
    "BpeTokenizer",
    "Cache",
    "Checkpoint",
    "DigitsData",
    "Evaluate",
    "FolderSource",
    "Gate",
    "Gguf",
    "Improvement",
    "JsonlSource",
    "Llama",
    "Onnx",
    "Optimization",
    "Parity",
    "ParquetSource",
    "Pretrained",
    "Recipe",
    "Regression",
    "Rule",
    "Section",
    "Serve",
    "Smaller",
    "StdlibSource",
    "Student",
    "Sweep",
    "TextData",
    "TokenizerFile",
    "Train",
    "Vit",
    "load",
]
