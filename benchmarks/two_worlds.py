"""What stage II of RL-Co gains in the digital twin, and what of it "reality", the shifted twin, sees.

    python benchmarks/two_worlds.py logs/maniskill_ppo_co_training_openpi_pi05_tiny logs/ppo_alone --output rl_co.png

plays the policy of every kept checkpoint of the runs in both worlds, and the policy that stage I gave them, always from
the same initial states, and takes L_SFT of each on the real robot's demonstrations, with the same noise. What it finds
is kept in RUN/two_worlds.jsonl, so that it goes on where it was stopped, and when a run has gone further.

The picture has the success rate in both worlds and L_SFT over global steps, of co-training and of PPO alone
(`actor.use_real_data_co_training=False`); runs with different seeds become their mean and the band from the lowest
to the highest. Stage I alone is a level.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import ROOT, print_setting
from omegaconf import OmegaConf

from rlinf.core.errors import DataError
from rlinf.launch.build import build_networks
from rlinf.launch.config import Root
from rlinf.launch.crew import build_evaluator, spaces_of
from rlinf.launch.demonstrations import open_demonstrations
from rlinf.launch.machine import prepare_process
from rlinf.launch.run import load_run_config, publish_file
from rlinf.models.embodiment.openpi.actor_critic import Pi0ActorCritic
from rlinf.runners.checkpoint import load_policy
from rlinf.runners.evaluate import Evaluator
from rlinf.runtime.local import LocalRuntime

SHIFTED = ROOT / "examples" / "embodiment" / "config" / "env" / "maniskill_pick_and_place_shifted_twin.yaml"
RECORD = "two_worlds.jsonl"
MEASURES = {"twin": "success in the twin", "shifted": "success in the shifted twin", "sft_loss": "L_SFT on real data"}
STAGE_ONE = 0
"""Number of the global step before the first."""


class Silent:
    """A reporter to whom nobody listens."""

    def log(self, step: int, metrics: object) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def video(self, name: str, frames: object, fps: float) -> None:
        """Nothing."""


def worlds(run: Path, episodes: int, overrides: Sequence[str]) -> dict[str, Root]:
    """The run's configuration with each world to evaluate in."""
    shift = OmegaConf.load(SHIFTED).init_params.twin
    shared = [
        "env.eval.video_cfg.save_video=False",
        f"env.eval.rollout_epoch={max(1, episodes // 64)}",
        f"env.eval.total_num_envs={min(64, episodes)}",
        *overrides,
    ]
    shifted = [f"env.eval.init_params.twin.{name}={value}" for name, value in shift.items()]
    return {"twin": load_run_config(run, shared), "shifted": load_run_config(run, [*shared, *shifted])}


class Judge:
    """Judges the policies of one run."""

    def __init__(self, run: Path, episodes: int, batches: int, overrides: Sequence[str]) -> None:
        configs = worlds(run, episodes, overrides)
        config = configs["twin"]
        prepare_process(config)
        self.batches = batches
        self.evaluators: dict[str, Evaluator] = {
            name: build_evaluator(there, LocalRuntime()) for name, there in configs.items()
        }
        spaces = spaces_of(self.evaluators["twin"].env)
        policy = build_networks(config, spaces).actor
        assert isinstance(policy, Pi0ActorCritic)
        self.policy, self.beginning = policy, {name: value.clone() for name, value in policy.state_dict().items()}
        self.config = config.model_copy(
            update={"actor": config.actor.model_copy(update={"use_real_data_co_training": True})}
        )

    @torch.no_grad()
    def judge(self, step: int, path: Path | None) -> dict[str, float]:
        """Success in both worlds, and L_SFT; None: what stage I gave."""
        found: dict[str, float] = {"step": step}
        for name, evaluator in self.evaluators.items():
            if path is None:
                evaluator.weights.publish(step, self.beginning)
            else:
                publish_file(evaluator.weights, path)
            found[name] = evaluator.run(Silent(), step, film=False)["eval/success_once"]
        self.policy.load_state_dict(self.beginning if path is None else load_policy(path)[1])
        demos = open_demonstrations(self.config, self.policy, torch.device("cpu"))  # anew: the same batches and noise
        assert demos is not None
        found["sft_loss"] = float(np.mean([float(demos.loss()) for _ in range(self.batches)]))
        return found

    def close(self) -> None:
        """End the environments."""
        for evaluator in self.evaluators.values():
            evaluator.close()


def checkpoints(run: Path) -> dict[int, Path | None]:
    """By global step, and what was before the first."""
    found: dict[int, Path | None] = {STAGE_ONE: None}
    for path in sorted((run / "checkpoints").glob("global_step_*")):
        found[int(path.name.rpartition("_")[2])] = path
    return dict(sorted(found.items()))


def known(run: Path) -> dict[int, dict[str, float]]:
    """What was found before."""
    file = run / RECORD
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {int(row["step"]): row for row in rows}


def examine(
    run: Path, every: int, episodes: int, batches: int, overrides: Sequence[str]
) -> dict[int, dict[str, float]]:
    """All that is to be known of a run."""
    rows = known(run)
    missing = {
        step: path
        for step, path in checkpoints(run).items()
        if step not in rows and (step % every == 0 or path is None)
    }
    if not missing:
        return rows
    judge = Judge(run, episodes, batches, overrides)
    for step, path in missing.items():
        row = judge.judge(step, path)
        with (run / RECORD).open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows[step] = row
        print(f"{run.name} step {step}: " + ", ".join(f"{name} {row[name]:.3f}" for name in MEASURES), flush=True)
    judge.close()
    return dict(sorted(rows.items()))


def label(run: Path) -> str:
    """What a run is a case of."""
    return "co-training" if load_run_config(run).actor.use_real_data_co_training else "PPO alone"


def draw(found: dict[Path, dict[int, dict[str, float]]], path: Path) -> None:
    """The picture."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[Path]] = defaultdict(list)
    for run in found:
        kinds[label(run)].append(run)
    figure = Figure(figsize=(5.0 * len(MEASURES), 3.6), dpi=110, layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for number, (kind, runs) in enumerate(sorted(kinds.items())):
            steps = sorted(set.intersection(*({*found[run]} for run in runs)))
            values = np.array([[found[run][step][measure] for step in steps] for run in runs])
            name = f"{kind}, {len(runs)} seed{'s' * (len(runs) > 1)}"
            axes.plot(steps, values.mean(0), color=f"C{number}", marker="o", markersize=3, label=name)
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.2, linewidth=0)
        before = np.mean([rows[STAGE_ONE][measure] for rows in found.values()])
        axes.axhline(float(before), color="0.5", linestyle="--", label="stage I alone")
        axes.set(title=title, xlabel="global steps of stage II")
        axes.set_ylim(bottom=0, top=None if measure == "sft_loss" else 1)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", type=Path, help="run directories of stage II")
    options.add_argument("--every", type=int, default=25, help="only checkpoints of every so many steps (default: 25)")
    options.add_argument("--episodes", type=int, default=128, help="in each world (default: 128)")
    options.add_argument("--batches", type=int, default=40, help="of demonstrations, for L_SFT (default: 40)")
    options.add_argument("--output", type=Path, help="the picture; none is drawn without it")
    options.add_argument("--override", action="append", default=[], help="of the runs' configurations; repeatable")
    arguments = options.parse_args()
    print_setting(1)
    try:
        found = {
            run: examine(run, arguments.every, arguments.episodes, arguments.batches, arguments.override)
            for run in arguments.runs
        }
    except DataError as problem:
        sys.exit(str(problem))
    if arguments.output is not None:
        draw(found, arguments.output)


if __name__ == "__main__":
    main()
