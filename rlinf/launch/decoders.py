"""The frozen decoder that a configuration names: what it is, whether it fits, and its weights when they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from rlinf.core.errors import CheckpointError, ConfigError
from rlinf.core.types import EnvSpaces
from rlinf.envs.maniskill.config import ManiSkillConfig, control_mode
from rlinf.launch.config import Root
from rlinf.models.embodiment.dsrl_policy import DsrlFlowConfig
from rlinf.models.embodiment.flow_decoder import (
    SPEC_FILE,
    FlowDecoderSpec,
    fingerprint,
    load_flow_decoder,
    read_flow_decoder_spec,
)
from rlinf.models.embodiment.latent_policy import Decoder
from rlinf.models.embodiment.openpi.decoder import (
    OpenpiDecoder,
    find_tokenizer,
    load_openpi_decoder,
    random_openpi_decoder,
    weights_mark,
)
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.openpi.robot_keys import CheckpointKeys
from rlinf.models.embodiment.openpi.tokenizer import Tokenizer
from rlinf.runners.checkpoint import find

TRAIN_COMMAND = "bash examples/sft/run_sft.sh"
RANDOM_MARK = 1


@dataclass(frozen=True)
class NamedDecoder:
    """A decoder before its weights are read.

    Attributes:
        noise_shape: (H, D') of the noise that makes one chunk.
        mark: a number that tells it from others, see `LatentHead`.
        check: raises ConfigError with every way in which it does not fit the environment.
        load: reads the weights. Raises RlinfError naming the file that is missing or does not fit.
    """

    noise_shape: tuple[int, int]
    mark: Callable[[], int]
    check: Callable[[EnvSpaces], None]
    load: Callable[[], Decoder]


def named_decoder(config: Root) -> NamedDecoder:
    """The decoder of a policy that steers one. Raises ConfigError or CheckpointError where there is none."""
    model = config.actor.model
    if isinstance(model, OpenpiConfig):
        return _openpi(config, model)
    assert isinstance(model, DsrlFlowConfig)
    folder = decoder_folder(model)
    spec = read_flow_decoder_spec(folder)
    return NamedDecoder(
        spec.noise_shape,
        mark=lambda: fingerprint(folder),
        check=lambda spaces: _check_flow(config, model, spec, spaces),
        load=lambda: load_flow_decoder(folder),
    )


def remark_on_decoder(config: Root) -> str | None:
    """What whoever reads this run's figures must know of its decoder; None for nothing."""
    model = config.actor.model
    if not isinstance(model, OpenpiConfig) or model.model_path is not None:
        return None
    name = "π0.5" if model.robot().model.pi05 else "π0"
    if model.openpi.use_dsrl:
        name = f"the frozen {name}"
    return (
        f"{name} ({model.openpi.size}) has random weights, to see that it runs, and solves nothing; "
        "actor.model.model_path takes the folder of real ones"
    )


# ---- a flow policy of our own


def decoder_folder(model: DsrlFlowConfig) -> Path:
    """Where the decoder's files lie. Raises ConfigError with the command that makes them where there are none."""
    path = Path(model.decoder_path).expanduser()
    if (path / SPEC_FILE).is_file():
        return path
    try:
        folder = find(path)
        read_flow_decoder_spec(folder)
    except CheckpointError as error:
        remedy = f"train one: {TRAIN_COMMAND} {model.decoder_recipe or 'RECIPE'} runner.export_dir={path}"
        raise ConfigError(f"actor.model.decoder_path: there is no decoder in {path}; {remedy}") from error
    return folder


def _check_flow(config: Root, model: DsrlFlowConfig, spec: FlowDecoderSpec, spaces: EnvSpaces) -> None:
    env = config.env.train
    controller = control_mode(env.init_params, model.policy_setup) if isinstance(env, ManiSkillConfig) else ""
    found = {
        "state size": (spec.obs_dim, spaces.obs_shapes["state"][0]),
        "action size": (spec.action_dim, spaces.action_dim),
        "control mode": (spec.control_mode, controller),
    }
    wrong = [f"{name} is {theirs or 'none'} there and {ours or 'none'} in the environment"
             for name, (theirs, ours) in found.items() if theirs != ours]  # fmt: skip
    if wrong:
        raise ConfigError(
            f"the decoder in {model.decoder_path} ({spec.env_id or 'no task named'}) does not fit: {'; '.join(wrong)}; "
            "name another in actor.model.decoder_path"
        )


# ---- π0


def _openpi(config: Root, model: OpenpiConfig) -> NamedDecoder:
    robot = model.robot()
    path = model.weights()
    dtype = kept_dtype(config, model)

    def read() -> OpenpiDecoder:
        if path is None:
            return random_openpi_decoder(robot, num_steps=model.num_steps, dtype=dtype)
        return load_openpi_decoder(robot, path, tokenizer_of(model, path), num_steps=model.num_steps, dtype=dtype)

    def load() -> OpenpiDecoder:
        # An offloaded worker empties its tensors, which nobody else may be using then.
        return read() if config.rollout.enable_offload else _shared(f"{config.profile} {model!r}", read)

    return NamedDecoder(
        (robot.model.action_horizon, robot.model.action_dim),
        mark=lambda: RANDOM_MARK if path is None else weights_mark(path),
        check=lambda spaces: check_openpi(model, spaces),
        load=load,
    )


def kept_dtype(config: Root, model: CheckpointKeys) -> torch.dtype:
    """Of weights that do not learn: those that are frozen, and those that act."""
    return torch.bfloat16 if model.in_bf16(config.profile) else torch.float32


def tokenizer_of(model: CheckpointKeys, weights: Path) -> Tokenizer:
    """The one that the keys name, or that lies beside the weights; see `find_tokenizer`."""
    wanted = None if model.tokenizer_path is None else Path(model.tokenizer_path).expanduser()
    return find_tokenizer(wanted, weights, tiny=model.openpi.size == "tiny")


def check_openpi(model: OpenpiConfig, spaces: EnvSpaces) -> None:
    """Raise ConfigError with every way in which the model does not fit the environment."""
    robot = model.robot()
    if wrong := robot.misfits(spaces):
        raise ConfigError(f"actor.model.openpi.config_name {robot.name} does not fit: {'; '.join(wrong)}")


_in_use: WeakValueDictionary[str, OpenpiDecoder] = WeakValueDictionary()
_reading = threading.Lock()


def _shared(key: str, read: Callable[[], OpenpiDecoder]) -> OpenpiDecoder:
    """What this process holds already, or has read now: policies of training and evaluation need it once."""
    with _reading:
        decoder = _in_use.get(key)
        if decoder is None:
            decoder = _in_use[key] = read()
        return decoder
