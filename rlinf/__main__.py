"""`python -m rlinf`: see `rlinf.launch.cli.main`."""

import sys

from rlinf.launch.cli.main import main

sys.exit(main())
