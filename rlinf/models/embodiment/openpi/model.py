"""π0 and π0.5: the velocity of a flow from noise to a chunk of actions, given images, a prompt and the robot's state.

Time runs backwards here, as in the published weights: t = 1 is noise and t = 0 the action,

    x_t = t · noise + (1 − t) · action,        target velocity  u = noise − action,        loss  E |v(x_t, t) − u|²,

and sampling is Euler's method from t = 1 down to 0. (`functional.flow` counts the other way.)

The tokens of the prefix, images and then text, all attend to each other. π0's suffix is one token for the state, which
sees the prefix and itself, and H action tokens, which see everything; the time is mixed into the action tokens. π0.5's
suffix is the action tokens alone, and the time sets its adaptive norms. What is padding is never attended to and takes
no position: a camera that is masked may as well be left out.

What is not here: reading images and prompts (`transforms`, `tokenizer`) and files (`checkpoint`).

References:
    [1] π0, arXiv:2410.24164, §IV and appendix B.        [2] π0.5, arXiv:2504.16054.

    B batch, C cameras, T tokens of an image, L text tokens, P = C·T + L, H actions per chunk, A action size, K steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlinf.core.errors import ShapeError
from rlinf.models.embodiment.openpi.attention import in_float32, linear_in_its_type
from rlinf.models.embodiment.openpi.config import Pi0Config
from rlinf.models.embodiment.openpi.gemma import AdaRmsNorm, Gemma, KeysValues, Modulations, RmsNorm, key_bias
from rlinf.models.embodiment.openpi.siglip import Siglip

SHORTEST_PERIOD, LONGEST_PERIOD = 4e-3, 4.0
"""Of the sines and cosines that encode the time."""


@dataclass(frozen=True)
class Pi0Inputs:
    """B observations as the model takes them.

    Attributes:
        images: float32 [B, C, 3, image_size, image_size] in [−1, 1].
        image_mask: bool [B, C]; false where a camera is absent.
        tokens: int64 [B, L].
        token_mask: bool [B, L]; false where the prompt is padded.
        state: float32 [B, A], normalised and padded; π0.5 does not read it.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor

    def to(self, device: torch.device | str) -> Pi0Inputs:
        """The same on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class Prefix:
    """All that the action expert needs to know of B observations. Nothing changes it.

    Attributes:
        past: keys and values of the language model, layer by layer.
        visible: bool [B, P], false for padding.
        state: float32 [B, A].
        output: the language model's normed output [B, P, W] where it was asked for, else None.
    """

    past: tuple[KeysValues, ...]
    visible: Tensor
    state: Tensor
    output: Tensor | None = None


class Pi0(nn.Module):
    """π0 or π0.5.

    Weights may be bfloat16 but for the parts that `stays_float32` names. Nothing here draws random numbers or turns
    gradients off: whoever samples with frozen weights does so under `torch.no_grad()`, or without, for the derivative
    with respect to the noise.
    """

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.vision = Siglip(config.vision)
        self.projector = nn.Linear(config.vision.width, config.vlm.width)
        self.vlm = Gemma(config.vlm, vocab_size=config.vocab_size)
        self.expert = Gemma(config.expert, adaptive=config.pi05)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    # ---- what trains and shards it

    def shard_units(self) -> list[nn.Module]:
        """The transformer layers, each called once per pass: units for sharding parameters over devices (FSDP).

        The root's forward methods are `loss`, `encode`, `features`, `project`, `velocity`, `sample_actions` and
        `denoise`; the last two also call `modulation` of the expert's layers for π0.5. In mixed precision set
        `cast_forward_inputs=False`: layers cast what they take, and a time cut to bfloat16 would have no phase left.
        """
        return [*self.vision.layers, *self.vlm.layers, *self.expert.layers]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Those of the action expert and the projections around it: all but image encoder and language model."""
        backbone = {id(p) for part in (self.vision, self.projector, self.vlm) for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in backbone]

    def recompute_layers(self, enabled: bool = True) -> None:
        """Trade time for memory: keep no activations within layers, compute them again in the backward pass."""
        self.vision.recompute = self.vlm.recompute = self.expert.recompute = enabled

    # ---- the prefix

    def encode(self, inputs: Pi0Inputs, *, with_output: bool = False) -> Prefix:
        """Run image encoder and language model.

        Args:
            inputs: observations.
            with_output: also the last layer's output, for heads that read it; it costs half a layer.

        Raises ShapeError when images have another size than the encoder's.
        """
        batch, cameras = inputs.images.shape[:2]
        size = self.config.vision.image_size
        if inputs.images.shape[2:] != (3, size, size):
            raise ShapeError(f"images are {list(inputs.images.shape)} instead of [B, C, 3, {size}, {size}]")
        image = self.projector(self.vision(inputs.images.flatten(0, 1)))
        tokens = image.shape[1]
        text = self.vlm.embed(inputs.tokens)
        x = torch.cat([image.view(batch, cameras * tokens, -1).to(text.dtype), text], 1)
        visible = torch.cat([inputs.image_mask.repeat_interleave(tokens, 1), inputs.token_mask], 1)
        # Padded queries are computed like the others, so that no row is empty; nobody reads what comes of them.
        output, past = self.vlm(x, visible.cumsum(1) - 1, key_bias(visible)[:, None, None], with_output=with_output)
        return Prefix(past, visible, inputs.state, output)

    # ---- the suffix

    def features(self, prefix: Prefix, x: Tensor, time: Tensor) -> Tensor:
        """The action expert's output for every action token, float32 [B, H, D].

        Args:
            prefix: of B observations.
            x: noisy actions float32 [B, H, A].
            time: float32 [B] or [1] in (0, 1].
        """
        return self._features(prefix, self._bias(prefix, x.shape[1]), x, time, self._condition(time))

    def velocity(self, prefix: Prefix, x: Tensor, time: Tensor) -> Tensor:
        """v(x, t), float32 [B, H, A]; arguments as of `features`."""
        return self.project(self.features(prefix, x, time))

    def loss(self, inputs: Pi0Inputs, actions: Tensor, *, noise: Tensor, time: Tensor) -> Tensor:
        """|v(x_t, t) − u|² of every element, float32 [B, H, A]. Its mean is the flow-matching loss.

        Args:
            inputs: observations.
            actions: float32 [B, H, A], normalised and padded.
            noise: standard normal numbers [B, H, A].
            time: [B] in (0, 1]; see `training_time`.

        Raises ShapeError when `noise` has another shape than `actions`.
        """
        if noise.shape != actions.shape:
            raise ShapeError(f"noise is {list(noise.shape)}, but actions are {list(actions.shape)}")
        t = time[:, None, None]
        x = t * noise + (1 - t) * actions
        return (self.velocity(self.encode(inputs), x, time) - (noise - actions)).square()

    def sample_actions(self, inputs: Pi0Inputs, *, noise: Tensor, num_steps: int = 10) -> Tensor:
        """Actions float32 [B, H, A], normalised and padded: x at t = 0 of Euler's method from `noise` at t = 1.

        Args:
            inputs: observations.
            noise: [B, H, A], standard normal numbers or what a latent policy chose.
            num_steps: K.

        Raises ShapeError when `noise` is not of that shape.
        """
        return self.denoise(self.encode(inputs), noise, num_steps=num_steps)

    def denoise(self, prefix: Prefix, noise: Tensor, *, num_steps: int = 10) -> Tensor:
        """The second half of `sample_actions`, for a prefix that is there already."""
        batch, size = prefix.visible.shape[0], self.config.action_dim
        if noise.ndim != 3 or noise.shape[0] != batch or noise.shape[2] != size:
            raise ShapeError(f"noise is {list(noise.shape)} instead of [{batch}, H, {size}]")
        times = denoising_times(num_steps).to(noise.device)
        conditions = self._condition(times)
        modulations = None if conditions is None else self.expert.modulations(conditions)
        bias = self._bias(prefix, noise.shape[1])
        x = noise.float()
        for k in range(num_steps):
            row = None if modulations is None else modulations.row(k)
            x = x - self.project(self._features(prefix, bias, x, times[k : k + 1], row)) / num_steps
        return x

    def _features(
        self, prefix: Prefix, bias: Tensor, x: Tensor, time: Tensor, condition: Tensor | Modulations | None
    ) -> Tensor:
        tokens = self._suffix(prefix.state, x, time)
        first = prefix.visible.sum(1, keepdim=True)
        positions = first + torch.arange(tokens.shape[1], device=x.device)
        output, _ = self.expert(tokens, positions, bias, prefix.past, condition)
        return output[:, -x.shape[1] :].float()

    def _suffix(self, state: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Embedded tokens [B, H, D], or [B, 1 + H, D] with the state's."""
        with in_float32(x):
            actions = linear_in_its_type(self.action_in_proj, x)
            if self.config.pi05:
                return actions
            # The layer over [action; time], without repeating the time for every action.
            for_action, for_time = self.action_time_mlp_in.weight.chunk(2, 1)
            time = self._time_embedding(time).to(actions.dtype)
            timed = F.linear(time, for_time, self.action_time_mlp_in.bias)
            actions = self.action_time_mlp_out(F.silu(F.linear(actions, for_action) + timed[:, None]))
            return torch.cat([linear_in_its_type(self.state_proj, state)[:, None], actions], 1)

    def _condition(self, time: Tensor) -> Tensor | None:
        """Of the adaptive norms, [B or 1, D]."""
        if not self.config.pi05:
            return None
        with in_float32(time):
            hidden = F.silu(linear_in_its_type(self.time_mlp_in, self._time_embedding(time)))
            return F.silu(self.time_mlp_out(hidden))

    def _time_embedding(self, time: Tensor) -> Tensor:
        return time_embedding(time, self.config.expert.width)

    def project(self, features: Tensor) -> Tensor:
        """`features` → velocities float32 [B, H, A]."""
        with in_float32(features):
            return linear_in_its_type(self.action_out_proj, features).float()

    def _bias(self, prefix: Prefix, horizon: int) -> Tensor:
        """What the suffix may attend to, [B, 1, S, P + S]: rows of actions see everything, the state's no action."""
        length = horizon + (not self.config.pi05)
        visible = F.pad(prefix.visible, (0, length), value=True)[:, None, None]
        if not self.config.pi05:
            visible = visible.expand(-1, 1, length, -1).clone()
            visible[:, :, 0, -horizon:] = False
        return key_bias(visible)

    # ---- weights

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Random weights: variance 1 / fan-in, zero biases, norms that do nothing, closed gates of adaptive norms."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = math.prod(module.weight.shape[1:])
                module.weight.normal_(0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, module.embedding_dim**-0.5, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, RmsNorm):
                module.weight.zero_()
        for module in self.modules():
            if isinstance(module, AdaRmsNorm):
                module.dense.weight.zero_()


def stays_float32(name: str) -> bool:
    """Whether a parameter of `Pi0` is float32 where the others are bfloat16.

    Those are the norms of both streams with all that modulates them, the embedding of patches and positions, and the
    projections of state, action and time.
    """
    if name.startswith(("vlm.", "expert.")):
        return "layernorm" in name or ".norm." in name
    if name.startswith("vision."):
        return name.startswith(("vision.patch_embedding.", "vision.position_embedding."))
    return not name.startswith("projector.")


def build_pi0(
    config: Pi0Config,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Pi0:
    """A model with random weights, in memory once.

    Args:
        config: sizes.
        dtype: float32 or bfloat16; see `stays_float32`.
        device: where the weights live.
        generator: draws them, on `device`; None for torch's own.
    """
    model = empty_pi0(config)
    tensors = {
        name: torch.empty(p.shape, dtype=torch.float32 if stays_float32(name) else dtype, device=device)
        for name, p in model.named_parameters()
    }
    model.load_state_dict(tensors, assign=True)
    model.initialize(generator)
    return model


def empty_pi0(config: Pi0Config) -> Pi0:
    """A model whose parameters have names and shapes but no memory."""
    with torch.device("meta"):
        return Pi0(config)


def time_embedding(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of `time` [B] with periods from 0.004 to 4 in geometric steps, [B, width] in its type.

    In float64: the phase of the shortest period is 1571 at t = 1, and float32 would lose four digits of it.
    """
    steps = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    periods = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** steps
    angles = (1.0 / periods * 2 * math.pi)[None] * time[:, None]
    return torch.cat([angles.sin(), angles.cos()], 1).to(time.dtype)


def denoising_times(num_steps: int) -> Tensor:
    """1, 1 − 1/K, …, 1/K as float32 [K], by repeated subtraction.

    The published implementations count so, and the shortest period turns the last bits of t into 1e-4 of phase.
    """
    times = torch.ones(num_steps)
    step = torch.tensor(1.0 / num_steps)
    for k in range(1, num_steps):
        times[k] = times[k - 1] - step
    return times


def training_time(batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """float32 [B] in [0.001, 1]: 0.001 + 0.999 s with s ~ Beta(1.5, 1), which favours noise.   [1, appendix B]

    The distribution function of Beta(a, 1) is s^a, so s is a uniform number to the power 1/a.
    """
    uniform = torch.rand(batch, generator=generator, device=device)
    return 0.001 + 0.999 * uniform ** (1 / 1.5)


def stack_cameras(images: Sequence[Tensor]) -> Tensor:
    """uint8 [B, size, size, 3] of every camera → float32 [B, C, 3, size, size] in [−1, 1]."""
    return torch.stack([image.permute(0, 3, 1, 2) for image in images], 1).float() / 255.0 * 2.0 - 1.0
