"""A small flow-matching policy on the state, learned by behaviour cloning: the frozen decoder that DSRL steers.

It turns Gaussian noise into a chunk of actions by K Euler steps of a learned velocity (`functional.flow`). The walk
has no noise of its own, so that the chunk is a function of state and noise: what DSRL needs.

On disk a decoder is a folder with `model.safetensors` and `config.json`; nothing in them is run.

    B batch, N environments, H actions per chunk, A action size, S state size, K denoising steps
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlinf.core.config import Config
from rlinf.core.errors import CheckpointError
from rlinf.core.tensor_file import save_tensors
from rlinf.core.types import Obs
from rlinf.functional.flow import integrate
from rlinf.models.modules.mlp import mlp

WEIGHTS_FILE, SPEC_FILE = "model.safetensors", "config.json"
TIME_FEATURES = 16
_FORMAT, _VERSION = "rlinf flow decoder", 1


class FlowDecoderConfig(Config):
    """Keys of `model` in a recipe of examples/sft: a flow policy on the state that answers with chunks of actions."""

    model_type: Literal["flow_decoder"] = Field("flow_decoder", description="Selects this policy.")
    policy_setup: str | None = Field(
        "panda-ee-dpos", description="Robot and action convention; fixes the simulator's control mode."
    )
    num_action_chunks: int = Field(5, gt=0, description="H, actions that the policy answers with at once.")
    denoising_steps: int = Field(10, gt=0, description="K, Euler steps from noise to actions.")
    hidden_dims: tuple[PositiveInt, ...] = Field(
        (256, 256, 256), min_length=1, description="Widths of the velocity's hidden layers."
    )


@dataclass(frozen=True)
class FlowDecoderSpec:
    """What a decoder is, without its weights.

    Attributes:
        obs_dim, action_dim, horizon: S, A and H.
        hidden_dims: widths of the velocity's hidden layers.
        denoising_steps: K.
        env_id, control_mode: task and meaning of actions in the demonstrations.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    hidden_dims: tuple[int, ...]
    denoising_steps: int
    env_id: str = ""
    control_mode: str = ""

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(H, A): as many numbers as a chunk of actions has."""
        return self.horizon, self.action_dim


class FlowDecoder(nn.Module):
    """x_{k+1} = x_k + v(s, x_k, k/K)/K from noise x_0 to the chunk x_K.

    Attributes:
        spec: its sizes.
        state_mean, state_std: [S], of the demonstrations; states are normalised by them.
    """

    state_mean: Tensor
    state_std: Tensor

    def __init__(self, spec: FlowDecoderSpec) -> None:
        super().__init__()
        self.spec, self.noise_shape = spec, spec.noise_shape
        size = spec.horizon * spec.action_dim
        self.net = mlp(spec.obs_dim + size + TIME_FEATURES, spec.hidden_dims, size, activation="silu")
        self.register_buffer("state_mean", torch.zeros(spec.obs_dim))
        self.register_buffer("state_std", torch.ones(spec.obs_dim))

    def velocity(self, obs: Obs, x: Tensor, t: Tensor) -> Tensor:
        """v [B, H, A] at x [B, H, A] and time t [B] in [0, 1]."""
        features = torch.cat([self._normalized(obs), x.flatten(1), time_features(t)], -1)
        return self.net(features).view(x.shape)

    @torch.no_grad()
    def decode(self, obs: Obs, noise: Tensor) -> Tensor:
        """The chunk of actions [N, H, A] in [−1, 1] that noise [N, H, A] stands for in these states."""
        state, steps = self._normalized(obs), self.spec.denoising_steps
        times = time_features(torch.arange(steps, device=noise.device, dtype=noise.dtype) / steps)

        def velocity(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
            return self.net(torch.cat([state, x, times[k].expand(len(x), -1)], -1)), x.new_zeros(())

        return integrate(velocity, noise.flatten(1), steps=steps).clamp(-1, 1).view(noise.shape)

    def _normalized(self, obs: Obs) -> Tensor:
        return ((obs["state"] - self.state_mean) / self.state_std).clamp(-10, 10)


def time_features(t: Tensor) -> Tensor:
    """cos and sin of t at frequencies from π/2 to 4 π in equal ratios, [..., TIME_FEATURES]."""
    half = TIME_FEATURES // 2
    frequencies = math.pi / 2 * 8.0 ** (torch.arange(half, device=t.device, dtype=t.dtype) / (half - 1))
    angle = t[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1)


def save_flow_decoder(decoder: FlowDecoder, folder: Path) -> None:
    """Write weights and sizes into `folder`, which is made when needed. Raises CheckpointError."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in decoder.state_dict().items()}
    described = {"format": _FORMAT, "version": _VERSION, **asdict(decoder.spec)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        (folder / SPEC_FILE).write_text(json.dumps(described, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the decoder could not be written into {folder}: {error}") from error


def read_flow_decoder_spec(folder: Path) -> FlowDecoderSpec:
    """What the decoder in `folder` is. Raises CheckpointError naming the file that is missing or damaged."""
    path = folder / SPEC_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"it is a {content['format']}, version {content['version']}")
        found = {field.name: content[field.name] for field in fields(FlowDecoderSpec)}
        return FlowDecoderSpec(**found | {"hidden_dims": tuple(found["hidden_dims"])})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {folder} holds no decoder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not describe a decoder of this version ({error!r}); train it anew"
        ) from error


def fingerprint(folder: Path) -> int:
    """CRC-32 of the weights in `folder`. Raises CheckpointError where there are none."""
    try:
        return zlib.crc32((folder / WEIGHTS_FILE).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} is missing or cannot be read; train the decoder anew"
        ) from error


def load_flow_decoder(folder: Path) -> FlowDecoder:
    """The decoder in `folder`, frozen. Raises CheckpointError naming the file that is missing or does not fit."""
    decoder = FlowDecoder(read_flow_decoder_spec(folder))
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            decoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; train the decoder anew") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not hold the weights that {SPEC_FILE} describes ({reason})") from error
    return decoder.requires_grad_(False).eval()
