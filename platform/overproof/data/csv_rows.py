"""How CSV that others wrote is read."""

from __future__ import annotations

from pyarrow import csv

from overproof.data.source_files import SourceReading


def csv_options(reading: SourceReading) -> csv.ParseOptions:
    """A value may hold line ends, where it is quoted; rows of NULs are dropped, and ``reading`` counts them."""

    def on_invalid(row: csv.InvalidRow) -> str:
        if row.text.strip("\0 "):
            return "error"
        reading.nul_lines += 1
        return "skip"

    return csv.ParseOptions(newlines_in_values=True, invalid_row_handler=on_invalid)
