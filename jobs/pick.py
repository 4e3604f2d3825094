"""`ray job submit --working-dir . -- python jobs/pick.py jobs/recipes/stdlib-lm.yaml`"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from overproof.cli.main import main

sys.exit(main(["pick", *sys.argv[1:]]))
