"""`python -m harmony_core.cli`."""

import sys

from . import main

sys.exit(main())
