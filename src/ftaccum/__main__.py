"""`python -m ftaccum`, and with it `accelerate launch -m ftaccum`."""

import sys

from .cli import main

sys.exit(main())
