"""SigLIP's image encoder: patches → tokens.

A pre-norm vision transformer without a class token (Zhai et al. 2023, arXiv:2303.15343), as PaliGemma uses it: the last
layer norm is applied, the pooling head does not exist.

    B images, T tokens of an image, D width
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rlinf.models.embodiment.openpi.attention import attend, in_float32, linear_in_its_type, run_layer
from rlinf.models.embodiment.openpi.config import SiglipConfig

EPS = 1e-6


class SiglipAttention(nn.Module):
    """Every token attends to all tokens of its image."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        heads = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self._projections())
        return self.out_proj(attend(*heads))

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class SiglipMlp(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh approximation of GELU."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.self_attn = SiglipAttention(config.width, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = SiglipMlp(config.width, config.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x = x.to(self.mlp.fc1.weight.dtype)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip(nn.Module):
    """Images to tokens. Patch and position embedding are float32; the layers may be of another type."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.num_tokens, config.width)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.depth))
        self.post_layernorm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, image_size, image_size] in [−1, 1] → [B, T, D]."""
        with in_float32(images):
            x = linear_in_its_type(self.patch_embedding, images).flatten(2).transpose(1, 2)
            x = x + self.position_embedding.weight
        for layer in self.layers:
            x = run_layer(layer, self.recompute, x)
        return self.post_layernorm(x)
