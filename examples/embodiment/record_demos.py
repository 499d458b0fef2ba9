"""Record demonstrations in the training environments of a recipe, for `algorithm.demo_buffer` or as a LeRobot data set.

python examples/embodiment/record_demos.py --config-name maniskill_sac_flow_rlpd --episodes 50 [key=value ...]

The same as `python -m rlinf record RECIPE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlinf.core.errors import RlinfError
from rlinf.launch.cli.options import add_recording_options


def main() -> int:
    """Record; the exit code is 0 when the folder holds what was asked for, 2 when there is something to mend."""
    parser = argparse.ArgumentParser(
        description="Record demonstrations, or go on with a recording.", allow_abbrev=False
    )
    parser.add_argument("--config-name", required=True, help="recipe whose environment is played")
    parser.add_argument("--config-path", default=Path(__file__).parent / "config", help="folder of the recipes")
    add_recording_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what is different from the recipe")
    arguments = parser.parse_intermixed_args()
    # Late, so that a mistyped option is answered at once.
    from rlinf.launch.cli.record import run

    try:
        run(arguments, arguments.config_name, Path(arguments.config_path))
    except RlinfError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was recorded is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
