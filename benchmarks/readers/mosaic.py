"""mosaicml-streaming over the same rows, written as MDS without compression."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from streaming import MDSWriter, StreamingDataset
from timing import Batches, Epoch, Open, main
from torch.utils.data import DataLoader

SEED = 1


def write(root: Path) -> None:
    files = sorted((root / "lists").glob("*.parquet"))
    width = pq.read_schema(files[0]).field("tokens").type.list_size
    with MDSWriter(out=str(root / "mds"), columns={"tokens": f"ndarray:int32:{width}", "length": "int"}) as writer:
        for file in files:
            for part in pq.ParquetFile(file).iter_batches(1024, columns=["tokens", "length"]):
                tokens = part.column("tokens").flatten().to_numpy().reshape(-1, width)
                for row, length in zip(tokens, part.column("length").to_pylist(), strict=True):
                    writer.write({"tokens": row, "length": length})


def shuffled(algorithm: str) -> Open:
    def open_rows(root: Path, batch_size: int) -> Epoch:
        rows = StreamingDataset(
            local=str(root / "mds"),
            shuffle=True,
            shuffle_algo=algorithm,
            shuffle_seed=SEED,
            batch_size=batch_size,
            num_canonical_nodes=1,
        )

        def epoch(index: int) -> Batches:
            rows.next_epoch = index
            for batch in DataLoader(rows, batch_size=batch_size, drop_last=True):
                yield batch["tokens"].long(), batch["length"].long()

        return epoch

    return open_rows


if __name__ == "__main__":
    main({"mosaic_py1s": shuffled("py1s"), "mosaic_py1e": shuffled("py1e")}, write)
