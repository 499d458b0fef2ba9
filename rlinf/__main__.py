"""`python -m rlinf`: see `rlinf.launch.cli.main`."""

import sys

from rlinf.launch.cli.main import main

code = main()
# Only commands that run workers have loaded it, and with it torch.
if (runtime := sys.modules.get("rlinf.runtime.local")) is not None:
    runtime.leave(code)
sys.exit(code)
