"""π0 and π0.5 as what supervised fine-tuning trains: weights, and the robot's transforms around them.

B batch, H actions per chunk, A action size of the model, A' of the robot
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlinf.core.config import Config
from rlinf.core.types import Obs
from rlinf.models.embodiment.openpi.config import Pi0Config
from rlinf.models.embodiment.openpi.dataconfig import Pipeline
from rlinf.models.embodiment.openpi.model import Pi0, Prefix
from rlinf.models.embodiment.openpi.robot_keys import CheckpointKeys


class TrainedParts(Config):
    """Keys of `model.train`: what of the model learns."""

    vision: bool = Field(True, description="The image encoder and the projection of its tokens.")
    language: bool = Field(True, description="The language model.")
    # The expert always learns: the loss is of its actions.


class OpenpiCloningConfig(CheckpointKeys):
    """Keys of `model` for `model_type: openpi`: π0 or π0.5, trained by supervision."""

    norm_stats_path: str | None = Field(
        None,
        description="norm_stats.json, or a folder with it, by which states and actions are normalised. null: those of "
        "this robot beside the weights in model_path, or else computed from the data sets in their proportions.",
    )
    num_action_chunks: int = Field(5, gt=0, description="So many actions of the chunk are played in evaluations.")
    num_steps: int = Field(4, gt=0, description="K, Euler steps from noise to actions in evaluations.")
    train: TrainedParts = Field(default_factory=TrainedParts, description="What learns besides the action expert.")
    gradient_checkpointing: bool = Field(
        False, description="Compute the layers' activations again in the backward pass instead of keeping them."
    )
    noises_per_example: int = Field(
        1,
        gt=0,
        description="Noises and times for which the loss of an example is taken at once. Pictures and prompt are "
        "encoded once for all of them, so that they cost little.",
    )
    padding_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean loss of the numbers that pad actions to the model's 32, beside that of the "
        "robot's own. 0: they are masked. A model from random weights needs them, 0.1 say: its walk from noise to "
        "actions carries them along, and would leave what training has shown.",
    )

    @model_validator(mode="after")
    def _fits(self) -> OpenpiCloningConfig:
        horizon = self.robot().model.action_horizon
        if self.num_action_chunks > horizon:
            raise ValueError(
                f"num_action_chunks is {self.num_action_chunks}, but chunks of {self.openpi.config_name} have "
                f"{horizon} actions"
            )
        return self


class Pi0Cloning(nn.Module):
    """A model and the loss of demonstrations.

    Args:
        model: π0 or π0.5, float32.
        pipeline: of the robot, with the statistics of the data.
        action_dim: A'.
        noises_per_example: R.
        padding_weight: w.

    Attributes:
        noise_shape: (R, H, A) of the noise that the loss of an example takes.
    """

    def __init__(
        self,
        model: Pi0,
        pipeline: Pipeline,
        *,
        action_dim: int,
        noises_per_example: int = 1,
        padding_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.pipeline, self.action_dim, self.padding_weight = model, pipeline, action_dim, padding_weight
        self.noise_shape: tuple[int, ...] = (noises_per_example, model.config.action_horizon, model.config.action_dim)

    def flow_matching_loss(
        self,
        obs: Obs,
        actions: Float[Tensor, "B H A2"],
        valid: Bool[Tensor, "B H"],
        *,
        noise: Float[Tensor, "B R H A"],
        time: Float[Tensor, "B R"],
    ) -> Float[Tensor, "B R H"]:
        """|v(x_t, t) − u|² for every action of the chunk, 0 where it is not valid.

        It is the mean over the robot's numbers, plus w times the mean over those that pad them.

        Args:
            obs: observations as a data set or an environment gives them.
            actions: in the robot's units.
            noise: standard normal.
            time: see `model.training_time`.
        """
        inputs, chunk = self.pipeline.encode_with_actions(obs, actions, noise.device)
        batch, repeats = noise.shape[:2]
        chunk = chunk[:, None].expand_as(noise).flatten(0, 1)
        noise, flat_time = noise.flatten(0, 1), time.flatten()
        t = flat_time[:, None, None]
        prefix = repeat_prefix(self.model.encode(inputs), repeats)
        velocity = self.model.velocity(prefix, t * noise + (1 - t) * chunk, flat_time)
        square = (velocity - (noise - chunk)).square()
        error = square[..., : self.action_dim].mean(-1)
        if self.padding_weight and self.action_dim < square.shape[-1]:
            error = error + self.padding_weight * square[..., self.action_dim :].mean(-1)
        return error.view(batch, repeats, -1) * valid[:, None]


def repeat_prefix(prefix: Prefix, times: int) -> Prefix:
    """The prefix of every observation `times` times, one after another."""
    if times == 1:
        return prefix
    past = tuple((key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)) for key, value in prefix.past)
    return Prefix(past, prefix.visible.repeat_interleave(times, 0), prefix.state.repeat_interleave(times, 0))


def freeze(model: Pi0, parts: TrainedParts) -> None:
    """Make what is not to learn, and what of the language model nothing reads, need no gradient."""
    model.requires_grad_(True)
    if not parts.vision:
        model.vision.requires_grad_(False)
        model.projector.requires_grad_(False)
    if not parts.language:
        model.vlm.requires_grad_(False)
    unread = unread_parameters(model.config)
    for name, parameter in model.named_parameters():
        if name in unread:
            parameter.requires_grad_(False)


def unread_parameters(config: Pi0Config) -> set[str]:
    """Names of what comes behind the language model's last keys and values: no action depends on it."""
    last = f"vlm.layers.{config.vlm.depth - 1}."
    names = {f"{last}{part}.weight" for part in ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm")}
    return names | {f"{last}mlp.{part}_proj.weight" for part in ("gate", "up", "down")} | {"vlm.norm.weight"}
