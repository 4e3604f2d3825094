"""`ray job submit --working-dir . -- python jobs/serve.py store/stdlib-lm/package-1a2b3c4d`"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from overproof.cli.main import main

sys.exit(main(["serve", *sys.argv[1:]]))
