"""Trains a ResNet on one rank and on two, without Ray, killed and started again as told. Run by test_batch_norm.py.

python batch_norm_ranks.py FOLDER CASES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from resume_ranks import BROKEN_ROW, run
from tiny_data import digits_like

from overproof.artifacts import Store

if __name__ == "__main__":
    folder, results = Path(sys.argv[1]), {}
    store, prepared = Store(str(folder / "store")), {}
    for name, broken in (("whole", None), ("broken", BROKEN_ROW)):
        draft = store.new_writer(name, "prepare", "a" * 64, {}, {})
        with draft.directory() as data:
            digits_like(data, broken)
        prepared[name] = draft.commit({}, 0.0)
    results = {case["name"]: run(store, prepared[case["data"]], case) for case in json.loads(sys.argv[2])}
    (folder / "results.json").write_text(json.dumps(results))
