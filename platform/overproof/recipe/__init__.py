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
from overproof.recipe.distillation import (
    Cache,
    Dense,
    OnPolicy,
    Relations,
    Sampled,
    Scheme,
    States,
    Student,
    Sweep,
    TopK,
)
from overproof.recipe.models import Llama, Model, Pretrained, StudentModel, TeacherLayers, Vit
from overproof.recipe.search import Asha, Grid, Hyperband, Median, NoStop, Pbt, Random, Space, Tpe, Tune
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
    "Asha",
    "BpeTokenizer",
    "Cache",
    "Checkpoint",
    "Dense",
    "DigitsData",
    "Evaluate",
    "FolderSource",
    "Gate",
    "Gguf",
    "Grid",
    "Hyperband",
    "Improvement",
    "JsonlSource",
    "Llama",
    "Median",
    "Model",
    "NoStop",
    "OnPolicy",
    "Onnx",
    "Optimization",
    "Parity",
    "ParquetSource",
    "Pbt",
    "Pretrained",
    "Random",
    "Recipe",
    "Regression",
    "Relations",
    "Rule",
    "Sampled",
    "Scheme",
    "Section",
    "Serve",
    "Smaller",
    "Space",
    "States",
    "StdlibSource",
    "Student",
    "StudentModel",
    "Sweep",
    "TeacherLayers",
    "TextData",
    "TokenizerFile",
    "TopK",
    "Tpe",
    "Train",
    "Tune",
    "Vit",
    "load",
]
