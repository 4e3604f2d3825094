"""Trains a ResNet on one rank and on two, without Ray, killed and started again as told. Run by test_batch_norm.py.

python batch_norm_ranks.py FOLDER CASES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from resume_ranks import BROKEN_ROW, run_all
from tiny_data import digits_like

if __name__ == "__main__":
    data = {"whole": digits_like, "broken": lambda root: digits_like(root, BROKEN_ROW)}
    run_all(Path(sys.argv[1]), json.loads(sys.argv[2]), data)
