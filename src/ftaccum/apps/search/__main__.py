"""A worker's process, as `workers` starts it."""

import sys
from pathlib import Path

from .launcher import be_worker

be_worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
