"""The program of a worker process, which the launcher starts."""

import sys
from pathlib import Path

from .launcher import run_worker

run_worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
