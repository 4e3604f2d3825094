"""The recipe: one typed schema behind validation, command-line help, editor completion and fingerprints.

YAML is only its serialised form. Python users build ``Recipe(...)`` directly; every value is frozen.
"""

from overproof.config.base import Section
from overproof.config.data import (
    BpeTokenizer,
    DataSection,
    FolderSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    TextData,
    TokenizerFile,
)
from overproof.config.distillation import (
    AttentionRelationLoss,
    Cache,
    Dense,
    Generate,
    HiddenStateLoss,
    OnPolicy,
    Sampled,
    Scheme,
    Student,
    Sweep,
    TopK,
)
from overproof.config.evaluation import (
    Agreement,
    Evaluate,
    Gate,
    Improvement,
    Parity,
    Regression,
    Rule,
    Smaller,
)
from overproof.config.export import FormatSection, Speculate
from overproof.config.models import LayeredModel, ModelSection, Pretrained, TeacherLayers
from overproof.config.recipe import Recipe, load_recipe, parse_overrides
from overproof.config.search import Asha, Grid, Hyperband, Median, NoStop, Pbt, Random, Space, Tpe, Tune
from overproof.config.serving import SERVER_FIELDS, Canary, Serve, Traffic
from overproof.config.training import CheckpointPolicy, Optimization, Train, Training, ZeroSettings

__all__ = [
    "SERVER_FIELDS",
    "Agreement",
    "Asha",
    "AttentionRelationLoss",
    "BpeTokenizer",
    "Cache",
    "Canary",
    "CheckpointPolicy",
    "DataSection",
    "Dense",
    "Evaluate",
    "FolderSource",
    "FormatSection",
    "Gate",
    "Generate",
    "Grid",
    "HiddenStateLoss",
    "Hyperband",
    "Improvement",
    "JsonlSource",
    "LayeredModel",
    "Median",
    "ModelSection",
    "NoStop",
    "OnPolicy",
    "Optimization",
    "Parity",
    "ParquetSource",
    "Pbt",
    "Pretrained",
    "Random",
    "Recipe",
    "Regression",
    "Rule",
    "Sampled",
    "Scheme",
    "Section",
    "Serve",
    "Smaller",
    "Space",
    "Speculate",
    "StdlibSource",
    "Student",
    "Sweep",
    "TeacherLayers",
    "TextData",
    "TokenizerFile",
    "TopK",
    "Tpe",
    "Traffic",
    "Train",
    "Training",
    "Tune",
    "ZeroSettings",
    "load_recipe",
    "parse_overrides",
]
