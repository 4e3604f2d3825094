"""The data section: where rows come from, how they are split and laid out."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overproof.config.base import Count, Fraction, Section


class StdlibSource(Section):
    """The source files of the running Python's standard library, without its tests."""

    kind: Literal["stdlib"] = "stdlib"


class FolderSource(Section):
    """Every file below a folder that matches a pattern, compressed (.gz, .bz2, .zst) or not; one is one document."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="Folder, or a URI such as s3://bucket/folder.")
    pattern: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "*.txt", description="File name pattern, as in fnmatch, in any case; or several, such as ['*.md', '*.txt']."
    )

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of which a file's name matches one."""
        return (self.pattern,) if isinstance(self.pattern, str) else self.pattern


class JsonlSource(Section):
    """JSON Lines; one line is one document."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="A .jsonl or .ndjson file, compressed (.gz, .bz2, .zst) or not, or a folder of them.")
    field: str = Field("text", description="Key that holds the text.")


class ParquetSource(Section):
    """Parquet; one row is one document."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="A .parquet file or a folder of them.")
    field: str = Field("text", description="Column that holds the text.")


TextSource = Annotated[StdlibSource | FolderSource | JsonlSource | ParquetSource, Field(discriminator="kind")]


class BpeTokenizer(Section):
    """A byte-level BPE tokenizer trained on the train split, on 1 GiB of it at most."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(2048, ge=288, le=65536, multiple_of=32, description="Entries.")


class TokenizerFile(Section):
    """An existing tokenizer of any kind that can write every text back."""

    kind: Literal["file"] = "file"
    path: str = Field(
        description="The directory of the model that the tokenizer belongs to, or its tokenizer.json; local or a URI."
    )
    end_token: str | None = Field(
        None,
        description="The token that ends every document, such as </s>; null takes the one that the files beside "
        "tokenizer.json name.",
    )


class NearDuplicates(Section):
    """Which documents are near-copies: by the Jaccard index of their sets of runs of words."""

    threshold: float = Field(
        0.8,
        ge=0.6,
        le=1,
        description="Near-copies have at least this share of their runs in common, of all that either has.",
    )
    words: int = Field(
        5, ge=1, le=32, description="Words in a run; characters where a script has no spaces between words."
    )


HeldOutNearDuplicates = Annotated[
    NearDuplicates | None,
    Field(
        description="Near-copies of held-out texts are left out of the train split, and those of each other in the "
        "test split are resampled as one; null: they are not looked for."
    ),
]


class DataSection(Section):
    """What every task's data has: how rows are split and laid out in shards. ``kind`` names the task."""

    kind: str
    validation_fraction: Fraction = Field(0.05, description="Share of documents or rows held out for validation.")
    test_fraction: Fraction = Field(0.05, description="Share of documents or rows held out for the gate.")
    shards: Count = Field(4, description="Train shards written; text has more where one would have over 64 MiB.")
    rows_per_group: Count = Field(16, description="Rows in every Parquet row group.")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="Whether a file that cannot be read ends the run, or is left out and counted."
    )

    @property
    def positions(self) -> int:
        """Predictions in a row."""
        return 1

    @property
    def apart(self) -> bool:
        """Whether rows hold several texts, none of which sees another."""
        return False

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction is {held_out:g}; expected less than 1, "
                "so that a train split is left"
            )
        return self


class TextData(DataSection):
    """Documents, cleaned, split by content hash, tokenised and packed to one length."""

    source: TextSource = StdlibSource()
    tokenizer: BpeTokenizer | TokenizerFile = Field(BpeTokenizer(), discriminator="kind")
    sequence_length: int = Field(128, ge=8, le=1_048_576, description="Predicted tokens in a row.")
    cross_document_attention: bool = Field(
        False,
        description="Whether a token attends to the documents before its own in a train row, and counts its position "
        "from the row's beginning; else from its document's, which is then read as if it stood alone.",
    )
    near_duplicates: HeldOutNearDuplicates = NearDuplicates()

    @property
    def positions(self) -> int:
        """Predictions in a row."""
        return self.sequence_length

    @property
    def apart(self) -> bool:
        return not self.cross_document_attention
