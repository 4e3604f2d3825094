"""Artifacts: what a stage leaves behind, with its identity, its record and its parents.

An artifact is the directory ``<store>/<recipe name>/<stage>-<8 hex of the fingerprint>/``. Its record,
``artifact.json``, is written last and atomically: a directory without a record does not exist.
"""

from overproof.artifacts.artifact import Artifact, local_folder
from overproof.artifacts.record import (
    RECORD,
    RECORD_FORMAT,
    TOOLS,
    Record,
    StoreUnavailable,
    artifact_id,
    compute_fingerprint,
    json_sha256,
    read_record,
)
from overproof.artifacts.store import Store
from overproof.artifacts.writer import WORK, ArtifactWriter

__all__ = [
    "RECORD",
    "RECORD_FORMAT",
    "TOOLS",
    "WORK",
    "Artifact",
    "ArtifactWriter",
    "Record",
    "Store",
    "StoreUnavailable",
    "artifact_id",
    "compute_fingerprint",
    "json_sha256",
    "local_folder",
    "read_record",
]
