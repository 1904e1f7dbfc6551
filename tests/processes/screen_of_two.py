"""`ftaccum train` on two processes, with these options."""

import os
import sys

from ftaccum.apps.cli import main

assert os.environ["WORLD_SIZE"] == "2"
sys.exit(main(["train", *sys.argv[1:]]))
