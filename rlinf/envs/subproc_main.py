"""Program of a worker process of `subproc.py`: see `subproc_server`."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Serve the pipe whose descriptor is the only argument."""
    # Imports leave no garbage, and looking for it takes a sixth of the start. It goes on once the environment is built.
    gc.disable()
    from rlinf.envs.subproc_server import serve

    serve(int(sys.argv[1]))


if __name__ == "__main__":
    main()
