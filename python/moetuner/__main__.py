"""``python -m moetuner`` is the command line."""

import sys

from moetuner.cli import main

sys.exit(main())
