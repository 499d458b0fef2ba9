"""Record demonstrations in the training environments of a recipe, for `algorithm.demo_buffer`.

python examples/embodiment/record_demos.py --config-name maniskill_sac_flow_rlpd --episodes 50 [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlinf.core.errors import RlinfError


def main() -> int:
    """Record; the exit code is 0 when the folder holds what was asked for, 2 when there is something to mend."""
    parser = argparse.ArgumentParser(
        description="Record demonstrations, or go on with a recording.", allow_abbrev=False
    )
    parser.add_argument("--config-name", required=True, help="recipe whose environment is played")
    parser.add_argument("--config-path", default=Path(__file__).parent / "config", help="folder of the recipes")
    parser.add_argument("--episodes", type=int, default=50, help="episodes that the folder is to hold (50)")
    parser.add_argument("--output", help="folder; default: algorithm.demo_buffer.load_path of the recipe")
    parser.add_argument("--checkpoint", help="play with this policy instead of the task's scripted expert")
    parser.add_argument("--noise", type=float, default=0.1, help="noise on the actions, 0 for none (0.1)")
    parser.add_argument("--all", action="store_true", help="keep episodes without success, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what is different from the recipe")
    arguments = parser.parse_intermixed_args()
    # Late, so that a mistyped option is answered at once.
    from rlinf.launch.parse import load_config
    from rlinf.launch.record import record

    try:
        config = load_config(arguments.config_name, arguments.overrides, arguments.config_path)
        demo_buffer = getattr(config.algorithm, "demo_buffer", None)  # PPO has none
        output = arguments.output or (demo_buffer.load_path if demo_buffer else "demos")
        meta = record(
            config,
            output,
            episodes=arguments.episodes,
            checkpoint=arguments.checkpoint,
            noise_std=arguments.noise,
            only_successes=not arguments.all,
            note=lambda text: print(text, flush=True),
        )
    except RlinfError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was recorded is kept, the same command goes on", file=sys.stderr)
        return 130
    print(f"{output}: {meta.num_episodes} episodes, {meta.num_successes} of them successful")
    return 0


if __name__ == "__main__":
    sys.exit(main())
