"""Any verb of the command line as a job of a Ray cluster.

ray job submit --working-dir . -- python jobs/run.py train jobs/recipes/stdlib-lm.yaml --set store=s3://BUCKET/PATH
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from overproof.cli.main import main

sys.exit(main())
