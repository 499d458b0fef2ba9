"""Models with every parameter random, and random observations."""

from dataclasses import replace

import torch

from rlinf.models.embodiment.openpi.checkpoint import openpi_name
from rlinf.models.embodiment.openpi.config import TINY, TINY_PI05
from rlinf.models.embodiment.openpi.model import Pi0Inputs, build_pi0

CONFIGS = {"pi0": TINY, "pi05": TINY_PI05}


def random_model(config, dtype=torch.float32):
    """No norm that does nothing, no gate that is closed, no bias that is zero."""
    generator = torch.Generator().manual_seed(0)
    model = build_pi0(config, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or ".dense." in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.ndim == 2 else 1))
    if dtype is torch.float32:
        return model
    other = build_pi0(config, dtype=dtype)
    other.load_state_dict(model.state_dict())
    return other


def public_weights(model):
    """float64 parameters by the names in openpi's files, differentiable."""
    return {openpi_name(name): p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def random_inputs(config, batch=2, cameras=2, length=11):
    """Prompts of several lengths; the last camera is absent in the second observation."""
    generator = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    mask = torch.ones(batch, cameras, dtype=torch.bool)
    mask[1::2, -1] = False
    lengths = torch.arange(length, length - 4 * batch, -4)
    return Pi0Inputs(
        images=2 * torch.rand(batch, cameras, 3, size, size, generator=generator) - 1,
        image_mask=mask,
        tokens=torch.randint(config.vocab_size, (batch, length), generator=generator),
        token_mask=torch.arange(length) < lengths[:, None],
        state=torch.randn(batch, config.action_dim, generator=generator),
    )


def random_chunk(config, batch=2, seed=2):
    """[B, H, A]."""
    shape = (batch, config.action_horizon, config.action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def without_last_camera(inputs):
    return replace(inputs, images=inputs.images[:, :-1], image_mask=inputs.image_mask[:, :-1])


def row(inputs, b):
    """The observation b alone."""
    return Pi0Inputs(*(getattr(inputs, field)[b : b + 1] for field in Pi0Inputs.__dataclass_fields__))
