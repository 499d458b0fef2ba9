"""Options that several programs have. Imports nothing heavy: they are read before anything else."""

from __future__ import annotations

import argparse


def add_recording_options(parser: argparse.ArgumentParser) -> None:
    """How demonstrations are recorded."""
    parser.add_argument(
        "--episodes", type=int, default=50, metavar="N", help="episodes that the folder is to hold (50)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder (default: demos: where the recipe looks for them; "
                        "lerobot: datasets/RECIPE)")  # fmt: skip
    parser.add_argument("--checkpoint", metavar="RUN", help="play with this policy instead of the task's expert")
    parser.add_argument(
        "--noise", type=float, default=0.1, metavar="STD", help="noise on the actions, 0 for none (0.1)"
    )
    parser.add_argument("--all", action="store_true", help="keep episodes without success, too")
    parser.add_argument(
        "--format", choices=("demos", "lerobot"), default="demos",
        help="demos, for algorithm.demo_buffer; lerobot, a LeRobot data set of v3.0 (demos)",
    )  # fmt: skip
    lerobot = parser.add_argument_group("only with --format lerobot")
    lerobot.add_argument("--fps", type=int, metavar="N", help="frames per second (default: the environment's rate)")
    lerobot.add_argument("--pictures", choices=("video", "image"), help="how cameras are stored (video)")
    lerobot.add_argument("--codec", choices=("h264", "av1"), help="of videos; av1 is smaller and slower (h264)")
    lerobot.add_argument("--task", metavar="TEXT", help="what the robot does (default: what the environment says)")
    lerobot.add_argument("--robot", metavar="NAME", help="name of the robot, kept in the data set")


def add_robot_server_options(parser: argparse.ArgumentParser) -> None:
    """Which arm is served, and where."""
    parser.add_argument("--driver", metavar="NAME", help="fake, twin, franky, panda_py or serl_http")
    parser.add_argument(
        "--config", metavar="JSON", help="settings of the cell: driver, arm, safety, cameras, control_hz, park"
    )
    parser.add_argument("--robot-ip", metavar="HOST", help="address of the robot's controller (franky, panda_py)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on; 0 takes a free one (5000)")
    parser.add_argument("--park", action="store_true", help="in the end move to the reset joints instead of holding")
    parser.add_argument("--verbose", action="store_true", help="log every request and every limit")
