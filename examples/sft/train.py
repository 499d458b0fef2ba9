"""Clone demonstrations as a YAML file describes.

python examples/sft/train.py --config-name maniskill_flow_bc [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlinf.core.errors import RlinfError


def main() -> int:
    """Run one recipe; the exit code is 0 when it finished, 2 when the user has something to mend."""
    parser = argparse.ArgumentParser(description="Behaviour cloning of a recipe.", allow_abbrev=False)
    parser.add_argument("--config-name", required=True, help="YAML file without its ending")
    parser.add_argument("--config-path", default=Path(__file__).parent / "config", help="folder of the YAML files")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what is different in this run")
    arguments = parser.parse_intermixed_args()
    # Late, so that a mistyped option is answered at once.
    from rlinf.launch.parse import load_as
    from rlinf.launch.sft import run_sft
    from rlinf.launch.sft_config import SftConfig

    try:
        return run_sft(load_as(SftConfig, arguments.config_name, arguments.overrides, arguments.config_path))
    except RlinfError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
