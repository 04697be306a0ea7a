"""``python -m waterfill`` is the same as ``waterfill``."""

import sys

from waterfill.cli import main

sys.exit(main())
