"""Train or evaluate the recipe that a YAML file describes.

python examples/embodiment/train.py --config-name maniskill_sac_flow_state [key=value ...]
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import NoReturn

from rlinf.core.errors import RlinfError, raised_in


def main() -> NoReturn:
    """Run one recipe and end the process; its code is 0 when it finished, 2 when the user has something to mend."""
    parser = argparse.ArgumentParser(description="Train or evaluate a recipe.", allow_abbrev=False)
    parser.add_argument("--config-name", required=True, help="YAML file without its ending, see `rlinf configs`")
    parser.add_argument("--config-path", default=Path(__file__).parent / "config", help="folder of the YAML files")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what is different in this run")
    arguments = parser.parse_intermixed_args()
    # Late, so that a mistyped option is answered at once. What is imported stays until the end: to look through it for
    # garbage takes a third of the start, and later a fifth of a second whenever everything is looked through.
    gc.disable()
    from rlinf.launch.parse import load_config
    from rlinf.launch.run import train
    from rlinf.runtime.local import leave

    gc.freeze()
    gc.enable()
    try:
        code = train(load_config(arguments.config_name, arguments.overrides, arguments.config_path))
    except RlinfError as problem:
        print(f"error: {problem}", file=sys.stderr)
        if place := raised_in(problem):
            print(f"  {place}", file=sys.stderr)
        code = 2
    leave(code)


if __name__ == "__main__":
    main()
