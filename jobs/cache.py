"""`ray job submit --working-dir . -- python jobs/cache.py jobs/recipes/stdlib-lm.yaml`"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from overproof.cli.main import main

sys.exit(main(["cache", *sys.argv[1:]]))
