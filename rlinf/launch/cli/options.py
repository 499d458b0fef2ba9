"""Options that several programs have. Imports nothing heavy: they are read before anything else."""

from __future__ import annotations

import argparse
from pathlib import Path


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
    _add_lerobot_options(parser.add_argument_group("only with --format lerobot"))


def add_collection_options(parser: argparse.ArgumentParser) -> None:
    """How a person's demonstrations are recorded."""
    parser.add_argument(
        "--operator", choices=("spacemouse", "keyboard", "gamepad", "scripted"),
        help="whose hands: a device, or the task's scripted expert (default: what env.train.teleop says)",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=20, metavar="N", help="that the folder is to hold (20)")
    parser.add_argument(
        "--format", choices=("demos", "lerobot", "both"), default="demos",
        help="demos, for algorithm.demo_buffer; lerobot, a LeRobot data set of v3.0; both, in one pass (demos)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="folder (default: demos: where the recipe looks for them; "
                        "lerobot: datasets/RECIPE). With both: their parent, DIR/demos and DIR/lerobot")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="keep episodes without success, too")
    parser.add_argument(
        "--keep-idle", type=int, default=5, metavar="N", help="steps that stay of the waiting at the end (5)"
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="this policy acts, and the person takes over where needed")
    parser.add_argument("--noise", type=float, default=0.0, metavar="STD", help="of the scripted operator (0)")
    _add_lerobot_options(parser.add_argument_group("only with --format lerobot or both"))


def add_demos_options(parser: argparse.ArgumentParser) -> None:
    """What is done with a folder of demonstrations."""
    parser.add_argument("folder", metavar="FOLDER", help="demonstrations or a LeRobot data set; or the word `import`")
    parser.add_argument("source", nargs="?", metavar="PATH", help="after `import`: RLinf's demo folder, or its parent")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", type=int, metavar="N", help="film episode N")
    what.add_argument("--delete", type=int, nargs="+", metavar="N", help="take these episodes out, for ever")
    what.add_argument("--check", action="store_true", help="read everything, and say what is damaged")
    parser.add_argument("--fps", type=float, metavar="N", help="of the film (10, or the data set's)")
    parser.add_argument("--window", action="store_true", help="with --show: show the film in a window, too")
    parser.add_argument(
        "-o", "--output", metavar="PATH", help="the film (default: FOLDER-episode-N.mp4 here); the folder to import to"
    )
    parser.add_argument("--task", metavar="ID", help="with import: name of the task, kept in the folder")
    parser.add_argument("--control-mode", default="", metavar="NAME", help="with import: what an action means")
    parser.add_argument(
        "--camera", default="wrist_1", metavar="NAME", help="with import: the camera of main_images (wrist_1)"
    )
    parser.add_argument("--instruction", metavar="TEXT", help="with import: what the robot was told, if that is shown")


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """What is done with a LeRobot data set."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="episodes, frames, features, tasks and size")
    info.add_argument("path", metavar="PATH", help="folder that holds meta/, or its name below $HF_LEROBOT_HOME")
    info.add_argument("--check", action="store_true", help="read everything, and say what is damaged")
    info.add_argument("--threads", type=int, default=1, metavar="N", help="with --check: N pictures at a time (1)")


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """What a reward classifier is trained on, and how."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="demonstrations, of successes and failures")
    parser.add_argument(
        "--failures", nargs="+", action="extend", default=[], metavar="FOLDER",
        help="demonstrations of which every picture shows failure",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the weights (default: reward_classifier.safetensors in FOLDER)"
    )
    parser.add_argument(
        "--success-frames", type=int, default=1, metavar="N",
        help="so many last pictures of a successful episode show success (1)",
    )  # fmt: skip
    parser.add_argument(
        "--gap", type=int, default=0, metavar="N", help="leave out so many pictures before those: neither for sure (0)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.85, metavar="P",
        help="probability that counts as success, as override_cfg.classifier_threshold (0.85)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=float, default=0.2, metavar="SHARE", help="share of the episodes to judge by (0.2)"
    )
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="updates (600)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures of an update (64)")
    parser.add_argument(
        "--shift", type=int, metavar="N", help="shift pictures by up to N pixels (1/32 of their height); 0: never"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of split, weights and batches (0)")


def _add_lerobot_options(lerobot: argparse._ArgumentGroup) -> None:
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
    parser.add_argument(
        "--park",
        action="store_true",
        help="in the end move to the reset joints, without lifting first, instead of holding",
    )
    parser.add_argument("--verbose", action="store_true", help="log every request and every limit")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """What is exported, where to, and of which type."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints/global_step_<N>"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the run's own config")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="new folder (exports/ inside RUN)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="of pi0's weights (that in which the run's policy acts)"
    )


def add_play_options(parser: argparse.ArgumentParser) -> None:
    """What is filmed, and how it is shown."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints/global_step_<N>"
    )
    parser.add_argument("--envs", type=int, default=4, metavar="N", help="episodes, side by side in the picture (4)")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="other initial states than those of the run's evaluations"
    )
    parser.add_argument("--stochastic", action="store_true", help="explore as in training")
    parser.add_argument("--window", action="store_true", help="show the film in a window too")
    parser.add_argument("-o", "--output", type=Path, metavar="MP4", help="the film (default: videos/ inside RUN)")
