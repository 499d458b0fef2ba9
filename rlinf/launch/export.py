"""What a run has learned as a folder of its own, which others load without the run.

A checkpoint holds what a run needs to go on. Of π0 under PPO that is what is trained: here it is joined with the frozen
part that `model_path` names, into the files that openpi, stage I and other recipes read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlinf.launch.build import load_weights_into
from rlinf.launch.config import Root
from rlinf.launch.decoders import kept_dtype
from rlinf.launch.folders import put_whole, refuse_to_export_over
from rlinf.launch.pi0_policy import open_pi0_policy
from rlinf.launch.run import load_run_config
from rlinf.launch.sft_openpi import TRAINER_FILE
from rlinf.models.embodiment.dsrl_policy import DsrlFlowConfig, steering_keys
from rlinf.models.embodiment.openpi.decoder import save_openpi
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.runners.checkpoint import find, load_policy, verify
from rlinf.workers.learner_worker import POLICY_FILE

EXPORTS = "exports"
MODEL_FILE = "config.json"


@dataclass(frozen=True)
class Exported:
    """Where a policy was put.

    Attributes:
        folder: that which was made.
        remarks: what it is and what may be done with it, a line each.
    """

    folder: Path
    remarks: tuple[str, ...]


def export_run(
    run: Path, output: Path | None = None, overrides: Sequence[str] = (), *, dtype: torch.dtype | None = None
) -> Exported:
    """Put the policy of a run into a new folder, whole or not at all.

    Args:
        run: run directory, or one `checkpoints/global_step_<N>` in it; of a directory the newest checkpoint.
        output: the folder; None for exports/global_step_<N> of the run.
        overrides: what differs from the run's configuration, such as where the weights lie that it began with.
        dtype: of π0's weights; None for that in which the run's policy acts.

    Raises ConfigError where there is no run or the folder is there already, CheckpointError or DataError where
    something is missing, damaged or of another model, or cannot be written.
    """
    checkpoint = find(run)
    folder = output or checkpoint.parents[1] / EXPORTS / checkpoint.name
    refuse_to_export_over(folder, "-o")
    files = verify(checkpoint, only=POLICY_FILE).files
    if TRAINER_FILE in files:
        return _export_tuned(checkpoint, folder, [name for name in files if name != TRAINER_FILE])
    config = load_run_config(checkpoint.parents[1], overrides)
    model = config.actor.model
    if isinstance(model, OpenpiConfig) and not model.openpi.use_dsrl:
        return _export_pi0(model, checkpoint, folder, dtype or kept_dtype(config, model))
    return _export_policy(config, checkpoint, folder)


def _export_pi0(model: OpenpiConfig, checkpoint: Path, folder: Path, dtype: torch.dtype) -> Exported:
    policy = open_pi0_policy(model, dtype=dtype)
    load_weights_into(policy, load_policy(checkpoint)[1], str(checkpoint))
    put_whole(folder, lambda unfinished: save_openpi(policy.model, policy.pipeline, unfinished))
    total, trained = (sum(p.numel() for p in some) for some in (policy.model.parameters(), _trained(policy.model)))
    name, begun = "pi0.5" if policy.model.config.pi05 else "pi0", model.model_path or "random weights"
    heads = "value head" if policy.noise_head is None else "value head and noise network"
    return Exported(
        folder,
        (
            f"{name} of {checkpoint}: {total:,} weights ({trained:,} of them trained, the others of {begun}), as "
            "openpi's files have them",
            f"to train on, steer or evaluate it: actor.model.model_path={folder}, of run_sft.sh "
            f"model.model_path={folder}",
            f"the {heads} are for PPO alone and not in it; PPO goes on with them by runner.ckpt_path={checkpoint} and "
            f"actor.model.model_path={begun if model.model_path else 'null'}",
        ),
    )


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _export_tuned(checkpoint: Path, folder: Path, names: Sequence[str]) -> Exported:
    """A checkpoint of supervised training holds the exported files."""
    for name in names:
        verify(checkpoint, only=name)
    inside = [name for name in names if Path(name).name == name]
    put_whole(folder, lambda unfinished: _copy(checkpoint, inside, unfinished))
    return Exported(
        folder,
        (
            f"the policy of {checkpoint}, the average of its weights where the run keeps one: {', '.join(inside)}",
            f"to use it: actor.model.model_path={folder} where it is pi0, actor.model.decoder_path={folder} where it "
            "is a flow decoder",
        ),
    )


def _export_policy(config: Root, checkpoint: Path, folder: Path) -> Exported:
    """All other policies are whole in their checkpoint; beside the weights stands what builds the network."""
    model = config.actor.model

    def fill(unfinished: Path) -> None:
        _copy(checkpoint, [POLICY_FILE], unfinished)
        described = {"actor": {"model": model.model_dump(mode="json")}}
        (unfinished / MODEL_FILE).write_text(json.dumps(described, indent=2) + "\n")

    put_whole(folder, fill)
    remarks = [
        f"{model.model_type} of {checkpoint}: what acts, without critics and optimizers; {MODEL_FILE} says how it is "
        "built",
        f"to train on or evaluate it with the recipe that made it: runner.ckpt_path={folder / POLICY_FILE}",
    ]
    if steering_keys(model) is not None:
        frozen = model.decoder_path if isinstance(model, DsrlFlowConfig) else getattr(model, "model_path", None)
        remarks.append(
            "it chooses the noise of a frozen policy, which is not in it, as nothing of that was trained: "
            f"{frozen or 'random weights'}"
        )
    return Exported(folder, tuple(remarks))


def _copy(source: Path, names: Sequence[str], target: Path) -> None:
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
