"""Entry point of `python -m ftaccum` and `accelerate launch -m ftaccum`."""

import sys

from .apps.cli import main

sys.exit(main())
