"""`python -m ftaccum`, and with it `accelerate launch -m ftaccum`."""

import sys

from .apps.cli import main

sys.exit(main())
