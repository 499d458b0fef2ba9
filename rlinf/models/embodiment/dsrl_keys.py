"""Keys that every policy has whose noise is steered (DSRL), whatever its decoder."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from rlinf.core.config import Config


class DsrlKeys(Config):
    """Keys of the networks that choose the decoder's noise, and of their critics."""

    dsrl_state_dim: int | None = Field(None, gt=0, description="Expected size of the state; checked against the env.")
    dsrl_action_noise_dim: int | None = Field(
        None, gt=0, description="Expected size of the decoder's noise for one action; checked against the decoder."
    )
    dsrl_num_q_heads: int = Field(10, gt=0, description="E, critics in the ensemble.")
    dsrl_image_latent_dim: int = Field(64, gt=0, description="Features of the image, where there is one.")
    dsrl_state_latent_dim: int = Field(64, gt=0, description="Features of the state.")
    dsrl_hidden_dims: tuple[PositiveInt, ...] = Field(
        (128, 128, 128), min_length=1, description="Widths of the hidden layers of policy and critics."
    )
    dsrl_action_magnitude: PositiveFloat = Field(
        1.0,
        description="b, the largest noise that the policy may choose, in standard deviations of the decoder's noise.",
    )
    dsrl_repeat_noise: bool = Field(
        True,
        description="The policy chooses the noise of one action, which every action of the chunk starts from. False: "
        "that of each action by itself.",
    )
    dsrl_camera: str | None = Field(
        None, description="Camera that policy and critics look at, at 64 x 64 pixels; null: they see the state alone."
    )
    dsrl_image_strides: tuple[PositiveInt, ...] = Field(
        (2, 2, 2, 2),
        min_length=1,
        description="Strides of the image encoder's convolutions. The reference implementation's [2, 1, 1, 1] makes "
        "each encoder 2.1 million weights instead of 62 thousand.",
    )
