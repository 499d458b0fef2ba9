"""Configuration of supervised training: the root of the recipes in examples/sft/config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlinf.core.config import Config
from rlinf.launch.algorithm_config import OptimConfig
from rlinf.launch.config import AnyEnv, LoggerConfig
from rlinf.models.embodiment.flow_decoder import FlowDecoderConfig
from rlinf.models.embodiment.openpi.cloning import OpenpiCloningConfig


class RecordConfig(Config):
    """A scripted demonstrator that records what is missing."""

    episodes: PositiveInt = Field(100, description="Episodes that the folder is to hold.")
    noise: float = Field(0.1, ge=0, description="Standard deviation of the noise on the demonstrator's actions.")
    only_successes: bool = Field(True, description="Forget episodes without success.")


class RecordDatasetConfig(RecordConfig):
    """A scripted demonstrator that records what is missing of a LeRobot data set."""

    env: AnyEnv = Field(description="Environments in which is recorded; one that ends with success has no idle frames.")
    seed: NonNegativeInt = Field(0, description="Of initial states and noise.")
    pictures: Literal["video", "image"] = Field("video", description="How cameras are stored; images are lossless.")


class DatasetConfig(Config):
    """One LeRobot data set (v2.1 or v3.0) among those that are learned from."""

    path: str = Field(description="Folder that holds meta/, or its name below $HF_LEROBOT_HOME.")
    weight: PositiveFloat | None = Field(
        None,
        description="Share of every batch; only the ratio to the others' counts. null, for all of them: the number of "
        "frames.",
    )
    num_episodes: PositiveInt | None = Field(None, description="Only the first so many episodes; null: all.")
    columns: dict[str, str] = Field(
        {},
        description="Feature of the data set by its path in an observation (images/front, state) or actions, where it "
        "is called otherwise than the robot's data configuration says.",
    )
    record: RecordDatasetConfig | None = Field(
        None, description="Record into the folder until it holds so many episodes; null: take it as it is."
    )


class SourcesConfig(Config):
    """Where the demonstrations are: one folder of `record_demos.sh` (path), or LeRobot data sets (datasets)."""

    path: str | None = Field(None, description="Folder with demonstrations, as record_demos.sh writes them.")
    record: RecordConfig | None = Field(
        None, description="Record into the folder until it holds so many episodes; null: take it as it is."
    )
    datasets: dict[str, DatasetConfig] | None = Field(
        None, description="LeRobot data sets by names of your own, under which their losses are shown."
    )
    cache_gb: float = Field(4.0, ge=0, description="Memory for unpacked pictures of all data sets, in 10⁹ bytes.")
    map_to: str | None = Field(
        None,
        description="Folder for packed pictures as memory-mapped files, for data sets of images that are larger than "
        "memory; null: in memory.",
    )
    num_threads: PositiveInt = Field(1, description="So many pictures or videos are unpacked at a time.")

    @model_validator(mode="after")
    def _weights_all_or_none(self) -> SourcesConfig:
        given = {name: part.weight is not None for name, part in (self.datasets or {}).items()}
        if any(given.values()) and not all(given.values()):
            lacking = ", ".join(name for name, has in given.items() if not has)
            raise ValueError(f"datasets have a weight each or none; {lacking} lacks one")
        return self


class SftRunnerConfig(Config):
    """How long to train, when to evaluate and to save, and where the results go."""

    logger: LoggerConfig = Field(default_factory=LoggerConfig, description="Results and loggers.")
    seed: NonNegativeInt = Field(0, description="Root seed: demonstrations, network, batches and noise follow from it.")
    max_steps: PositiveInt = Field(10_000, description="Updates.")
    log_interval: PositiveInt = Field(100, description="Updates between two lines of the record.")
    val_check_interval: int = Field(
        -1, ge=-1, description="Evaluate every so many updates; -1: only at the end; 0: never, without a simulator."
    )
    save_interval: int = Field(-1, ge=-1, description="Write a checkpoint every so many updates; -1 for at the end.")
    keep_checkpoints: PositiveInt = Field(3, description="So many of the newest checkpoints are kept.")
    resume_dir: str | None = Field(None, description="Checkpoint or run directory from which to go on exactly.")
    export_dir: str | None = Field(
        None, description="New folder for the finished policy, by a name that other recipes know; null: none."
    )


class SftConfig(Config):
    """The whole configuration of behaviour cloning and supervised fine-tuning."""

    profile: Literal["cpu", "gpu"] = Field(
        "cpu", description="Device. On the command line also auto: gpu where torch sees one."
    )
    runner: SftRunnerConfig = Field(default_factory=SftRunnerConfig, description="Duration, results, checkpoints.")
    data: SourcesConfig = Field(description="Demonstrations.")
    env: AnyEnv | None = Field(
        None,
        description="Environments in which the policy is evaluated, rollout_epoch episodes in each, and in which "
        "data.path is recorded. null: no evaluation.",
    )
    model: Annotated[FlowDecoderConfig | OpenpiCloningConfig, Field(discriminator="model_type")] = Field(
        description="The policy."
    )
    global_batch_size: PositiveInt = Field(256, description="Examples of one update.")
    micro_batch_size: PositiveInt | None = Field(
        None, description="openpi: examples that are computed at a time, for memory; null: all of an update's."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="openpi: average of the weights, which acts and is exported; null: the last ones."
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer.")

    @model_validator(mode="before")
    @classmethod
    def _names_its_policy(cls, tree: Any) -> Any:
        """A flow decoder where nothing is said, as in recipes from before there were others."""
        if isinstance(tree, dict) and isinstance(tree.get("model"), dict) and "model_type" not in tree["model"]:
            return tree | {"model": tree["model"] | {"model_type": "flow_decoder"}}
        return tree

    @model_validator(mode="after")
    def _data_fit_the_policy(self) -> SftConfig:
        lerobot, openpi = self.data.datasets is not None, isinstance(self.model, OpenpiCloningConfig)
        if lerobot == (self.data.path is not None):
            raise ValueError("data: give either path or datasets")
        if lerobot and not self.data.datasets:
            raise ValueError("data.datasets is empty; name a data set")
        if lerobot != openpi:
            wanted, given = ("datasets", "path") if openpi else ("path", "datasets")
            raise ValueError(f"model_type {self.model.model_type} learns from data.{wanted}, not from data.{given}")
        if not openpi and self.env is None:
            raise ValueError("env: a flow decoder needs the environment whose demonstrations it learns")
        return self
