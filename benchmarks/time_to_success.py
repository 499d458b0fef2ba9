"""Wall-clock time until a recipe succeeds in 95 of 100 evaluation episodes, against Stable-Baselines3.

    python benchmarks/time_to_success.py                                      # SAC-Flow, seeds 0 1 2
    python benchmarks/time_to_success.py --recipe maniskill_sac_mlp --peer sb3
    python benchmarks/time_to_success.py --recipe frankasim_ppo_mlp --peer sb3
    python benchmarks/time_to_success.py --seeds 0 --minutes 60 algorithm.gamma=0.9
    python benchmarks/time_to_success.py --report --out FILE                  # the table of earlier runs

Each run is a process of its own: `examples/embodiment/train.py` with the shipped recipe, or its peer, one after the
other and seed by seed (A B A B). The peer is Stable-Baselines3's SAC where the recipe is SAC on ManiSkill
(`sb3_pickcube.py`), and its PPO where the recipe is PPO on Franka-Sim's state (`sb3_frankasim.py`). A run is stopped
when `eval/success_once`, the deterministic policy in the same 100 episodes every time, reaches 0.95, or after
--minutes. Words with `=` are Hydra overrides for the recipe. Every evaluation and every finished run is appended to
--out at once.

wall    minutes since the process was started, imports and evaluations included
train   wall without the evaluations
CPU     minutes of CPU time of all its processes
learn   share of wall that was spent in updates: no faster simulator can save more than the rest
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, commit, descendants, machine, process_seconds, spread

from rlinf.core.errors import ConfigError
from rlinf.envs.frankasim.config import OBS_MODES, FrankaSimConfig
from rlinf.envs.maniskill.config import ManiSkillConfig
from rlinf.launch.build import control_mode_of
from rlinf.launch.config import PpoConfig, Root, SacConfig
from rlinf.launch.parse import load_config

CONFIG_DIR = ROOT / "examples" / "embodiment" / "config"
EVAL_ENVS = 20
EVAL_STEPS = {SacConfig: 10_000, PpoConfig: 64_000}
POLL_S = 1.0
SILENCE_S = 60.0
STOP_TIMEOUT_S = 60.0
LAST_LINES = 8
PEER = "stable_baselines3"
QUICK_OVERRIDES = (
    "runner.max_epochs=2",
    "env.train.total_num_envs=4",
    "env.train.num_workers=0",
    "env.eval.num_workers=0",
    "algorithm.update_epoch=2",
    "actor.global_batch_size=16",
    "actor.micro_batch_size=16",
)
QUICK_SAC_OVERRIDES = ("algorithm.replay_buffer.min_buffer_size=16",)
QUICK_PEER_ENVS = 4


@dataclass(frozen=True)
class Trial:
    """One run that is to be timed.

    Attributes:
        name: recipe with its overrides, or the peer.
        seed: of the run.
        command: what starts it.
        journal: where it writes its metrics.
        log: where its output goes.
    """

    name: str
    seed: int
    command: list[str]
    journal: Path
    log: Path


@dataclass(frozen=True)
class Point:
    """How far a run was at an evaluation. Times in minutes; `learn` is a share of wall."""

    wall: float
    train: float
    cpu: float
    learn: float
    env_steps: int
    updates: int
    success: float


@dataclass(frozen=True)
class Result:
    """A finished run: where it reached the goal, else where it ended."""

    name: str
    seed: int
    reached: bool
    best: float
    point: Point
    problem: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Record:
    """A file of JSON lines that is complete after every line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, kind: str, content: dict[str, Any]) -> None:
        """Add a line and see it onto the disk."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **content}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def results(self) -> list[Result]:
        """All finished runs, of this and of earlier calls."""
        if not self.path.is_file():
            raise SystemExit(f"error: {self.path} does not exist; name the file with --out")
        rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        runs = [{key: value for key, value in row.items() if key != "kind"} for row in rows if row["kind"] == "run"]
        return [Result(**run | {"point": Point(**run["point"])}) for run in runs]


class Journal:
    """Reads a file of JSON lines while it is written."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Lines that were completed since the last call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        return [json.loads(line) for line in text.splitlines()]


# ---- what is run


def quick_overrides(config: Root) -> tuple[str, ...]:
    """That make a recipe tiny."""
    return QUICK_OVERRIDES + (QUICK_SAC_OVERRIDES if isinstance(config.algorithm, SacConfig) else ())


def eval_steps_of(options: argparse.Namespace, config: Root) -> int:
    """Environment steps between evaluations, of recipe and peer alike."""
    return options.eval_steps or EVAL_STEPS[type(config.algorithm)]


def recipe_trial(options: argparse.Namespace, config: Root, seed: int) -> Trial:
    """The shipped recipe through its launcher."""
    place = options.runs / f"{options.recipe}-seed{seed}"
    steps = config.env.train.total_num_envs * config.env.train.max_steps_per_rollout_epoch
    interval = max(1, round(eval_steps_of(options, config) / (steps * config.env.train.rollout_epoch)))
    eval_envs = math.gcd(EVAL_ENVS, options.episodes)
    overrides = [
        f"runner.seed={seed}",
        f"runner.logger.log_path={place}",
        f"runner.val_check_interval={interval}",
        f"env.eval.total_num_envs={eval_envs}",
        f"env.eval.rollout_epoch={options.episodes // eval_envs}",
        "env.eval.video_cfg.save_video=False",
        *([f"actor.num_threads={options.threads}"] if options.threads else []),
        *(quick_overrides(config) if options.quick else ()),
        *options.overrides,
    ]
    script = str(ROOT / "examples" / "embodiment" / "train.py")
    command = [sys.executable, script, "--config-name", options.recipe, *overrides]
    name = " ".join(["rlinf", options.recipe, *options.overrides])
    journal = place / config.runner.logger.experiment_name / "metrics.jsonl"
    return Trial(name, seed, command, journal, place.with_suffix(".log"))


def peer_trial(options: argparse.Namespace, config: Root, seed: int) -> Trial:
    """Stable-Baselines3 on the same task and controller."""
    place, eval_steps = options.runs / f"{PEER}-seed{seed}", eval_steps_of(options, config)
    script, *words = peer_command(options, config)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    command += ["--journal", f"{place}.jsonl", "--seed", str(seed)]
    command += ["--eval-steps", str(eval_steps), "--episodes", str(options.episodes)]
    command += ["--threads", str(options.peer_threads)]
    if options.quick:
        command += ["--steps", str(4 * eval_steps)]
    return Trial(PEER, seed, command, Path(f"{place}.jsonl"), place.with_suffix(".log"))


def peer_command(options: argparse.Namespace, config: Root) -> list[str]:
    """The peer's script, and the words that tell it the recipe's task.

    Raises:
        ConfigError: no peer plays the recipe's environment by its algorithm.
    """
    env, algorithm = config.env.train, config.algorithm
    if isinstance(env, ManiSkillConfig) and isinstance(algorithm, SacConfig):
        control_mode = str(control_mode_of(env, config.actor.model.policy_setup))
        return ["sb3_pickcube.py", "--task", env.init_params.id, "--control-mode", control_mode]
    if isinstance(env, FrankaSimConfig) and isinstance(algorithm, PpoConfig) and OBS_MODES[env.gym_id] == "state":
        return ["sb3_frankasim.py", *(["--envs", str(QUICK_PEER_ENVS)] if options.quick else [])]
    raise ConfigError(
        f"--peer {options.peer} plays ManiSkill by SAC and Franka-Sim's state by PPO; {options.recipe} is neither: "
        f"env_type {env.env_type}, loss_type {algorithm.loss_type}"
    )


# ---- running and watching


class Watch:
    """One running trial: reads its journal, knows where it stands, ends it."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._journal = Journal(trial.journal)
        self._eval_s = self._learn_s = self._cpu_s = 0.0
        self._env_steps = self._updates = 0
        self.best = self._latest = 0.0
        trial.log.parent.mkdir(parents=True, exist_ok=True)
        self._began_s = time.monotonic()
        with trial.log.open("wb") as output:
            # A session of its own: Ctrl-C reaches this program alone, which then asks the run to stop.
            self.process = subprocess.Popen(
                trial.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def minutes(self) -> float:
        """Since the start."""
        return (time.monotonic() - self._began_s) / 60

    def look(self) -> list[Point]:
        """Evaluations since the last look."""
        # A process that has ended is gone from the kernel's account: what was seen last counts.
        cpu_s = sum(process_seconds(pid) for pid in descendants(self.process.pid))
        self._cpu_s = max(self._cpu_s, cpu_s)
        points = []
        for row in self._journal.new_rows():
            self._eval_s += row.get("time/eval") or 0.0
            self._learn_s += row.get("time/actor_training") or 0.0
            self._env_steps = int(row.get("time/env_steps", self._env_steps))
            self._updates = int(row.get("time/updates", self._updates))
            if (success := row.get("eval/success_once")) is not None:
                self._latest = success
                self.best = max(self.best, success)
                points.append(self.point())
        return points

    def point(self) -> Point:
        """Where the run stands."""
        wall_s = time.monotonic() - self._began_s
        return Point(
            wall=round(wall_s / 60, 3),
            train=round((wall_s - self._eval_s) / 60, 3),
            cpu=round(self._cpu_s / 60, 3),
            learn=round(self._learn_s / wall_s, 3),
            env_steps=self._env_steps,
            updates=self._updates,
            success=self._latest,
        )

    def stop(self) -> None:
        """End the run: politely, so that it saves what it has, then by force. Its simulators end with it."""
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                break
            self.process.send_signal(signal_number)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue

    def last_words(self) -> str:
        """The end of what the run printed."""
        lines = self.trial.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


def play(trial: Trial, options: argparse.Namespace, record: Record, runs_after: int) -> Result:
    """Run a trial to its goal or to its end, telling how it goes."""
    watch = Watch(trial)
    reached: Point | None = None
    told_s, problem = time.monotonic(), ""
    try:
        while reached is None:
            ended = watch.process.poll() is not None
            points = watch.look()
            for point in points:
                record.append("eval", {"name": trial.name, "seed": trial.seed, **asdict(point)})
                if reached is None and point.success >= options.until:
                    reached = point
            if points or time.monotonic() - told_s > SILENCE_S:
                told_s = time.monotonic()
                tell(trial, watch, options, runs_after)
            if ended and not points:
                code = watch.process.returncode
                problem = f"exit code {code}: {watch.last_words()}" if code else ""
                break
            if watch.minutes > options.minutes:
                break
            if not ended and reached is None:
                time.sleep(POLL_S)
        at = reached or watch.point()
    finally:
        watch.stop()
    about = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "command": trial.command,
        "until": options.until,
        "episodes": options.episodes,
        "load": os.getloadavg()[0],
    }
    result = Result(trial.name, trial.seed, reached is not None, watch.best, at, problem, about)
    record.append("run", asdict(result))
    if problem:
        print(f"{trial.name}, seed {trial.seed}, failed with {problem}", flush=True)
    return result


def tell(trial: Trial, watch: Watch, options: argparse.Namespace, runs_after: int) -> None:
    """One line of progress."""
    at, left = watch.point(), max(0.0, options.minutes - watch.minutes) + runs_after * options.minutes
    print(
        f"{trial.name}, seed {trial.seed}: {at.wall:.1f} of at most {options.minutes:g} min, "
        f"{at.env_steps:,} env steps, {at.updates:,} updates, success {at.success:.2f}, best {watch.best:.2f}; "
        f"all done in at most {left:.0f} min",
        flush=True,
    )


# ---- the table


def print_results(results: Sequence[Result], until: float) -> None:
    """One row per run and, where there is a peer, how many times longer it took."""
    print(f"\nfirst evaluation with success_once >= {until:g}; '>': not reached, the row is where the run ended")
    print(f"{'':40}{'seed':>5}{'wall':>8}{'train':>7}{'CPU':>7}{'learn':>7}{'env steps':>11}{'updates':>9}{'best':>6}")
    for result in results:
        at, wall = result.point, f"{'' if result.reached else '>'}{result.point.wall:.1f}"
        name = result.name if len(result.name) < 40 else f"{result.name[:36]}..."
        print(
            f"{name:40}{result.seed:5}{wall:>8}{at.train:7.1f}{at.cpu:7.1f}{at.learn:7.0%}{at.env_steps:11,}"
            f"{at.updates:9,}{result.best:6.2f}" + (" failed" if result.problem else "")
        )
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        done = [result.point.wall for result in own if result.reached]
        minutes = f"; wall minutes {spread(done)}" if done else ""
        print(f"{name}: {len(done)} of {len(own)} seeds{minutes}")
        if name != PEER:
            print_ratios(own, [result for result in results if result.name == PEER])


def print_ratios(own: Sequence[Result], peers: Sequence[Result]) -> None:
    """Peer's time over ours, by the medians of the seeds; only if all of ours were successful."""
    if not peers or not all(result.reached for result in own):
        return
    bound = "" if all(result.reached for result in peers) else "at least "
    ratios = {
        kind: median(getattr(result.point, kind) for result in peers)
        / max(1e-9, median(getattr(result.point, kind) for result in own))
        for kind in ("wall", "train", "cpu")
    }
    shown = ", ".join(f"{kind} {bound}{value:.2f}" for kind, value in ratios.items())
    print(f"  {PEER} / rlinf, medians: {shown}")


# ---- the command


def read_command(words: Sequence[str]) -> argparse.Namespace:
    """Options; words like key=value are overrides wherever they stand."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="maniskill_sac_flow_state", help="of examples/embodiment/config")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs (default: 0 1 2)")
    options.add_argument("--peer", choices=("sb3",), help="also time Stable-Baselines3 with every seed")
    options.add_argument("--until", type=float, default=0.95, help="success_once that ends a run (default: 0.95)")
    options.add_argument("--minutes", type=float, default=30.0, help="longest time of a run (default: 30)")
    options.add_argument(
        "--eval-steps", type=int, help="env steps between evaluations (default: 10,000; of PPO 64,000)"
    )
    options.add_argument("--episodes", type=int, default=100, help="episodes of an evaluation (default: 100)")
    options.add_argument("--threads", type=int, help="of our learner (default: as the recipe decides)")
    options.add_argument("--peer-threads", type=int, default=os.cpu_count(), help="of the peer (default: all cores)")
    options.add_argument("--out", type=Path, default=Path("results/time_to_success.jsonl"), help="file to append to")
    options.add_argument("--runs", type=Path, help="folder of the run directories (default: beside --out)")
    options.add_argument("--report", action="store_true", help="run nothing: print the table of what is in --out")
    options.add_argument("--quick", action="store_true", help="two global steps of a tiny recipe, one seed")
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    chosen = options.parse_args([word for word in words if word not in overrides])
    chosen.overrides = overrides
    if chosen.quick:
        chosen.seeds, chosen.episodes, chosen.eval_steps, chosen.minutes = chosen.seeds[:1], 2, 16, 2.0
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    chosen.runs = (chosen.runs or chosen.out.parent / f"{chosen.out.stem}-{stamp}").resolve()
    return chosen


def main() -> int:
    options = read_command(sys.argv[1:])
    record = Record(options.out)
    if options.report:
        results = record.results()
        print_results(results, results[-1].about["until"] if results else options.until)
        return 0
    if options.peer and importlib.util.find_spec("stable_baselines3") is None:
        print("error: --peer sb3 needs `bash requirements/install.sh embodied --bench`", file=sys.stderr)
        return 2
    makers = [recipe_trial, peer_trial] if options.peer else [recipe_trial]
    try:
        config = load_config(options.recipe, options.overrides, CONFIG_DIR)
        if options.quick:
            config = load_config(options.recipe, [*quick_overrides(config), *options.overrides], CONFIG_DIR)
        trials = [make(options, config, seed) for seed in options.seeds for make in makers]
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(machine())
    print(f"commit {commit()}; {datetime.date.today().isoformat()}; results go to {options.out}", flush=True)
    # As Ctrl-C: the run in progress is stopped before this program ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = []
    try:
        for number, trial in enumerate(trials, start=1):
            results.append(play(trial, options, record, len(trials) - number))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    if results:
        print_results(results, options.until)
    return 1 if any(result.problem for result in results) or len(results) < len(trials) else 0


if __name__ == "__main__":
    sys.exit(main())
