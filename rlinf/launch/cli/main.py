"""The commands of `python -m rlinf`. Each imports what it needs when it is chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import rlinf
from rlinf.core.errors import ConfigError, RlinfError
from rlinf.launch.cli.options import (
    add_classifier_options,
    add_collection_options,
    add_dataset_options,
    add_demos_options,
    add_export_options,
    add_play_options,
    add_recording_options,
    add_robot_server_options,
)

CONFIG_DIR, SFT_CONFIG_DIR = "examples/embodiment/config", "examples/sft/config"
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 when it is done, 1 when the machine is broken, 2 for an error of use."""
    parser = build_parser()
    chosen, rest = parser.parse_known_args(arguments)
    if rest:  # argparse gives up on key=value behind an option
        if not hasattr(chosen, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        chosen.overrides += rest
    if chosen.command is None:
        parser.print_help()
        return 0
    try:
        return COMMANDS[chosen.command](chosen)
    except RlinfError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m rlinf",
        description="Embodied reinforcement learning.",
        epilog="To train: bash examples/embodiment/run_embodiment.sh RECIPE [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"rlinf {rlinf.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what works on this machine, and the command that mends the rest")
    doctor.add_argument("--timeout", type=float, default=90, metavar="S", help="seconds that a check may take (90)")

    configs = commands.add_parser("configs", help="list the recipes, one line each")
    configs.add_argument("--dir", type=Path, metavar="DIR", help=f"folder of the recipes (default: {CONFIG_DIR})")

    placement = commands.add_parser(
        "placement", allow_abbrev=False, help="show how a recipe is spread over nodes and devices"
    )
    placement.add_argument("config", metavar="RECIPE", help="name of the recipe, see `configs`")
    placement.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the recipe")
    placement.add_argument(
        "--gpus-per-node", type=_count, metavar="N", help="accelerators of every node (default: as many as here)"
    )
    placement.add_argument("--dir", type=Path, metavar="DIR", help=f"folder of the recipes (default: {CONFIG_DIR})")

    plot = commands.add_parser("plot", help="draw learning curves of one or several run directories")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, holds metrics.jsonl")
    plot.add_argument(
        "--baseline", action="append", default=[], type=Path, metavar="RUN", help="draw its last evaluation as a level"
    )
    plot.add_argument("-o", "--output", type=Path, metavar="PNG", help="picture to write (default: inside RUN)")

    evaluate = commands.add_parser("eval", help="evaluate the newest checkpoint of a run")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run directory, holds config.yaml and checkpoints")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the run's own config")

    add_export_options(commands.add_parser("export", help="put what a run has learned into a folder of its own"))

    add_play_options(commands.add_parser("play", help="film episodes of what a run has learned, or show them"))

    record = commands.add_parser(
        "record", allow_abbrev=False, help="record demonstrations of an expert or a policy, as a LeRobot data set too"
    )
    record.add_argument("config", metavar="RECIPE", help="name of the recipe whose environment is played")
    record.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the recipe")
    add_recording_options(record)
    record.add_argument("--dir", type=Path, metavar="DIR", help=f"folder of the recipes (default: {CONFIG_DIR})")

    collect = commands.add_parser(
        "collect", allow_abbrev=False, help="record what a person does with the robot of a recipe"
    )
    collect.add_argument("config", metavar="RECIPE", help="name of the recipe whose environment is played")
    collect.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the recipe")
    add_collection_options(collect)
    collect.add_argument("--dir", type=Path, metavar="DIR", help=f"folder of the recipes (default: {CONFIG_DIR})")

    demos = commands.add_parser("demos", help="list, film, check, delete or import recorded episodes")
    add_demos_options(demos)

    classifier = commands.add_parser(
        "reward_classifier", help="train the network that says from pictures whether a robot cell's task is solved"
    )
    add_classifier_options(classifier)

    dataset = commands.add_parser("dataset", help="what a LeRobot data set holds, and whether it is whole")
    add_dataset_options(dataset)

    norm_stats = commands.add_parser(
        "norm_stats", allow_abbrev=False, help="by what a recipe of supervised fine-tuning normalises, as a file"
    )
    norm_stats.add_argument("config", metavar="RECIPE", help=f"name of a recipe in {SFT_CONFIG_DIR}")
    norm_stats.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from the recipe")
    norm_stats.add_argument("-o", "--output", type=Path, metavar="PATH", help="folder or .json (norm_stats/ROBOT)")
    norm_stats.add_argument("--dir", type=Path, metavar="DIR", help=f"folder of the recipes ({SFT_CONFIG_DIR})")

    robot_server = commands.add_parser(
        "robot_server", help="offer a robot arm and its cameras over HTTP (SERL's routes), with safety limits"
    )
    add_robot_server_options(robot_server)

    convert = commands.add_parser(
        "convert-resnet10", help="SERL's resnet10_params.pkl to a file for actor.model.model_path"
    )
    convert.add_argument("source", type=Path, metavar="PKL", help="the published pickle; nothing in it is run")
    convert.add_argument("target", type=Path, metavar="FILE", help="what to write: FILE.safetensors, or a folder")
    return parser


def _count(text: str) -> int:
    """A number from 0 on. Raises ArgumentTypeError for any other text."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return int(text)


def run_doctor(chosen: argparse.Namespace) -> int:
    """Print the state of the machine; 1 when something that everything needs does not work."""
    from rlinf.launch.cli.doctor import examine

    return examine(chosen.timeout)


def run_configs(chosen: argparse.Namespace) -> int:
    """Print each recipe's name with the first comment of its file."""
    folder = chosen.dir or find_config_dir()
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder} holds no recipe (*.yaml); name the folder with --dir")
    width = max(len(file.stem) for file in files)
    for file in files:
        print(f"{file.stem:<{width}}  {describe(file)}")
    return 0


def run_placement(chosen: argparse.Namespace) -> int:
    """Print which process of a recipe would run where, and who talks to whom."""
    from rlinf.launch.cli.placement import show

    show(chosen.config, chosen.overrides, chosen.dir or find_config_dir(), chosen.gpus_per_node)
    return 0


def run_plot(chosen: argparse.Namespace) -> int:
    """Draw the curves of the given runs into one picture and print its name."""
    from rlinf.metrics.plot import plot_runs

    single = chosen.runs[0] / "learning_curve.png"
    path = chosen.output or (single if len(chosen.runs) == 1 else Path("learning_curves.png"))
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--output {path}: the name must end in .png, .pdf or .svg")
    try:
        plot_runs(chosen.runs, path, baselines=chosen.baseline)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place with -o") from error
    print(path)
    return 0


def run_eval(chosen: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint and print the metrics as a table."""
    if not chosen.run.is_dir():
        raise ConfigError(f"{chosen.run} is not a run directory")
    from rlinf.launch.run import evaluate_run

    print_metrics(evaluate_run(chosen.run, chosen.overrides))
    return 0


def run_export(chosen: argparse.Namespace) -> int:
    """Export a run's policy; say what it is and print the folder."""
    from rlinf.launch.cli.export import run

    run(chosen.run, chosen.output, chosen.overrides, chosen.precision)
    return 0


def run_play(chosen: argparse.Namespace) -> int:
    """Film episodes of a run's checkpoint and print how they went."""
    if not chosen.run.is_dir():
        raise ConfigError(f"{chosen.run} is not a run directory")
    if chosen.output is not None and chosen.output.suffix != ".mp4":
        raise ConfigError(f"--output {chosen.output}: the name must end in .mp4")
    from rlinf.launch.play import play_run

    metrics = play_run(
        chosen.run,
        num_envs=chosen.envs,
        seed=chosen.seed,
        stochastic=chosen.stochastic,
        window=chosen.window,
        output=chosen.output,
    )
    print_metrics(metrics)
    return 0


def run_record(chosen: argparse.Namespace) -> int:
    """Record demonstrations; what is there already is continued."""
    from rlinf.launch.cli.record import run

    return _recorded(run, chosen)


def run_collect(chosen: argparse.Namespace) -> int:
    """Record what a person does; what is there already is continued."""
    from rlinf.launch.cli.collect import run

    return _recorded(run, chosen)


def _recorded(run: Callable[..., object], chosen: argparse.Namespace) -> int:
    try:
        run(chosen, chosen.config, chosen.dir or find_config_dir())
    except KeyboardInterrupt:
        print("interrupted; what was recorded is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def run_demos(chosen: argparse.Namespace) -> int:
    """List recorded episodes, or do with them what is asked for; 1 when the check finds something."""
    from rlinf.launch.cli.demos import run

    return run(chosen)


def run_reward_classifier(chosen: argparse.Namespace) -> int:
    """Train a reward classifier on recorded episodes and print how it does on those held out."""
    from rlinf.launch.cli.reward_classifier import run

    return run(chosen)


def run_dataset(chosen: argparse.Namespace) -> int:
    """Print what a data set holds; 1 when the check finds something."""
    from rlinf.launch.cli.dataset import show

    return show(chosen.path, check=chosen.check, num_threads=chosen.threads)


def run_norm_stats(chosen: argparse.Namespace) -> int:
    """Compute norm_stats.json of a recipe's data sets and print the name of the file."""
    from rlinf.launch.cli.norm_stats import run

    run(chosen.config, chosen.overrides, chosen.dir or find_config_dir(SFT_CONFIG_DIR), chosen.output)
    return 0


def run_robot_server(chosen: argparse.Namespace) -> int:
    """Serve an arm until SIGTERM or Ctrl-C; the arm is then held or parked."""
    from rlinf.launch.cli.robot_server import run

    return run(chosen)


def run_convert(chosen: argparse.Namespace) -> int:
    """Convert SERL's encoder and print the name of the file."""
    from rlinf.models.serl_checkpoint import convert_resnet10

    print(convert_resnet10(chosen.source, chosen.target))
    return 0


def print_metrics(metrics: Mapping[str, float]) -> None:
    """A line for each."""
    from rlinf.metrics.view import short_number

    width = max(map(len, metrics), default=0)
    for tag, value in metrics.items():
        print(f"{tag:<{width}}  {short_number(value):>9}")


COMMANDS = {
    "doctor": run_doctor,
    "configs": run_configs,
    "placement": run_placement,
    "plot": run_plot,
    "eval": run_eval,
    "export": run_export,
    "play": run_play,
    "record": run_record,
    "collect": run_collect,
    "demos": run_demos,
    "reward_classifier": run_reward_classifier,
    "dataset": run_dataset,
    "norm_stats": run_norm_stats,
    "robot_server": run_robot_server,
    "convert-resnet10": run_convert,
}


def find_config_dir(folder: str = CONFIG_DIR) -> Path:
    """A folder of recipes in the working directory or in the checkout that this package belongs to."""
    for root in (Path.cwd(), Path(rlinf.__file__).parents[1]):
        if (root / folder).is_dir():
            return root / folder
    raise ConfigError(f"no folder {folder} here; start in the checkout or name the folder with --dir")


def describe(recipe: Path) -> str:
    """Text of the first comment line of a YAML file; empty where it has none before its first key."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and text.strip("# ") and not text.startswith("# @package"):
            return text.lstrip("# ")
        if text and not text.startswith("#"):
            break
    return ""
