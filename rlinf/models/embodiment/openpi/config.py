"""Sizes of π0 and π0.5, and the variants that have names.

B batch, C cameras, P prefix tokens, H actions per chunk, A action size of the model, D network width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlinf.core.errors import ConfigError


@dataclass(frozen=True)
class SiglipConfig:
    """A SigLIP image encoder; the defaults are So400m/14 at 224 pixels.

    Attributes:
        width, depth, mlp_dim, num_heads: of its transformer.
        image_size: side of the square image, in pixels.
        patch_size: side of the square that becomes a token, in pixels.
    """

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    image_size: int = 224
    patch_size: int = 14

    @property
    def num_tokens(self) -> int:
        """Tokens of an image. A margin narrower than a patch is not seen."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma transformer.

    Attributes:
        width, depth, mlp_dim: of its layers.
        num_heads: query heads.
        num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads query heads.
        head_dim: size of a head; num_heads · head_dim need not be the width.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256


@dataclass(frozen=True)
class Pi0Config:
    """A π0 or π0.5: image encoder, language model and action expert.

    Attributes:
        pi05: π0.5. The denoising time then enters through adaptive norms, and there is no token for the state.
        vision: image encoder.
        vlm: language model, over image and text tokens.
        expert: action expert. It attends to the language model's keys and values layer by layer, so depth and heads
            must be the same.
        vocab_size: rows of the token embedding.
        action_dim: A; robots with fewer numbers are padded with zeros.
        action_horizon: H. Weights do not depend on it.
        max_token_len: longest prompt in tokens; what is longer is cut.

    Raises ConfigError when the parts do not fit each other.
    """

    pi05: bool
    vision: SiglipConfig
    vlm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int = 257_152
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 48

    def __post_init__(self) -> None:
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self.expert, field), getattr(self.vlm, field)
            if ours != theirs:
                raise ConfigError(f"expert.{field} is {ours} and vlm.{field} is {theirs}; both attend together: equal")
        for name, part in (("vlm", self.vlm), ("expert", self.expert)):
            if part.num_heads % part.num_kv_heads:
                raise ConfigError(f"{name}.num_heads ({part.num_heads}) must be a multiple of {part.num_kv_heads}")
        for name, size in (("expert.width", self.expert.width), ("head_dim", self.vlm.head_dim)):
            if size % 2:
                raise ConfigError(f"{name} is {size}; sines and cosines need an even number")
        if self.vision.width % self.vision.num_heads:
            raise ConfigError(f"vision.width ({self.vision.width}) must be a multiple of {self.vision.num_heads} heads")


GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16_384)
GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp_dim=4096)

_TINY_VISION = SiglipConfig(width=128, depth=2, mlp_dim=256, num_heads=4, image_size=64, patch_size=16)
_TINY_VLM = GemmaConfig(width=96, depth=3, mlp_dim=192, num_heads=4, head_dim=24)
_TINY_EXPERT = GemmaConfig(width=64, depth=3, mlp_dim=128, num_heads=4, head_dim=24)

PI0 = Pi0Config(False, SiglipConfig(), GEMMA_2B, GEMMA_300M)
PI05 = Pi0Config(True, SiglipConfig(), GEMMA_2B, GEMMA_300M, max_token_len=200)
TINY = Pi0Config(False, _TINY_VISION, _TINY_VLM, _TINY_EXPERT, vocab_size=512, action_horizon=8)
TINY_PI05 = Pi0Config(True, _TINY_VISION, _TINY_VLM, _TINY_EXPERT, vocab_size=512, action_horizon=8, max_token_len=200)

VARIANTS: Mapping[str, Pi0Config] = {"pi0": PI0, "pi05": PI05, "tiny": TINY, "tiny_pi05": TINY_PI05}
"""Name → model. `tiny` (0.9 M parameters, 16 tokens an image) is for tests and for recipes on CPUs."""

GEMMA_NAMES: Mapping[GemmaConfig, str] = {GEMMA_2B: "gemma_2b", GEMMA_300M: "gemma_300m"}
"""What openpi's config.json calls the published sizes."""
