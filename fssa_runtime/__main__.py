"""``python -m fssa_runtime``: the ``fssa`` command."""

import sys

from .cli import main

sys.exit(main())
