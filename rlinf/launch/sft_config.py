"""Configuration of behaviour cloning: the root of the recipes in examples/sft/config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rlinf.core.config import Config
from rlinf.launch.algorithm_config import OptimConfig
from rlinf.launch.config import AnyEnv, LoggerConfig
from rlinf.models.embodiment.flow_decoder import FlowDecoderConfig


class RecordConfig(Config):
    """A scripted demonstrator that records what is missing."""

    episodes: PositiveInt = Field(100, description="Episodes that the folder is to hold.")
    noise: float = Field(0.1, ge=0, description="Standard deviation of the noise on the demonstrator's actions.")
    only_successes: bool = Field(True, description="Forget episodes without success.")


class DemosConfig(Config):
    """Where the demonstrations are."""

    path: str = Field(description="Folder with demonstrations, as record_demos.sh writes them.")
    record: RecordConfig | None = Field(
        None, description="Record into the folder until it holds so many episodes; null: take it as it is."
    )


class SftRunnerConfig(Config):
    """How long to train, when to evaluate and to save, and where the results go."""

    logger: LoggerConfig = Field(default_factory=LoggerConfig, description="Results and loggers.")
    seed: NonNegativeInt = Field(0, description="Root seed: demonstrations, network, batches and noise follow from it.")
    max_steps: PositiveInt = Field(10_000, description="Updates.")
    log_interval: PositiveInt = Field(100, description="Updates between two lines of the record.")
    val_check_interval: int = Field(-1, ge=-1, description="Evaluate every so many updates; -1 for only at the end.")
    save_interval: int = Field(-1, ge=-1, description="Write a checkpoint every so many updates; -1 for at the end.")
    keep_checkpoints: PositiveInt = Field(3, description="So many of the newest checkpoints are kept.")
    resume_dir: str | None = Field(None, description="Checkpoint or run directory from which to go on exactly.")
    export_dir: str | None = Field(
        None, description="New folder for the finished policy, by a name that other recipes know; null: none."
    )


class SftConfig(Config):
    """The whole configuration of behaviour cloning."""

    profile: Literal["cpu", "gpu"] = Field(
        "cpu", description="Device. On the command line also auto: gpu where torch sees one."
    )
    runner: SftRunnerConfig = Field(default_factory=SftRunnerConfig, description="Duration, results, checkpoints.")
    data: DemosConfig = Field(description="Demonstrations.")
    env: AnyEnv = Field(
        description="Environments in which demonstrations are recorded and the policy is evaluated, rollout_epoch "
        "episodes in each."
    )
    model: FlowDecoderConfig = Field(description="The policy.")
    global_batch_size: PositiveInt = Field(256, description="Examples of one update.")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer.")
