"""π0 and π0.5 as a whole, against a slow reference written from the equations."""

import math
from dataclasses import replace

import pytest
import torch

from rlinf.core.errors import ConfigError, ShapeError
from rlinf.models.embodiment.openpi.checkpoint import openpi_name
from rlinf.models.embodiment.openpi.config import PI0, TINY, VARIANTS, GemmaConfig, SiglipConfig
from rlinf.models.embodiment.openpi.model import (
    build_pi0,
    denoising_times,
    empty_pi0,
    stack_cameras,
    stays_float32,
    time_embedding,
    training_time,
)
from tests.models.openpi import pi0_reference as reference
from tests.models.openpi.pi0_samples import (
    CONFIGS,
    public_weights,
    random_chunk,
    random_inputs,
    random_model,
    row,
    without_last_camera,
)

KINDS = pytest.mark.parametrize("kind", CONFIGS)
TIME = torch.tensor([0.9, 0.15])


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def models():
    return {kind: random_model(config) for kind, config in CONFIGS.items()}


# ---- parity


@KINDS
def test_loss_and_its_gradient_are_the_references(models, kind):
    model, config = models[kind], CONFIGS[kind]
    weights, inputs = public_weights(model), random_inputs(config)
    actions, noise = random_chunk(config), random_chunk(config, seed=3)
    loss = model.loss(inputs, actions, noise=noise, time=TIME)
    expected = reference.loss(weights, config, inputs, actions, noise, TIME)
    assert loss.shape == (2, config.action_horizon, 32) and loss.dtype is torch.float32
    close(loss, expected)

    model.zero_grad()
    loss.mean().backward()
    expected.mean().backward()
    unused = []
    for name, p in model.named_parameters():
        theirs = weights[openpi_name(name)].grad
        if p.grad is None:
            unused.append(name)
            assert theirs is None or not theirs.any()
        else:
            close(p.grad, theirs)
    # Nobody reads the language model's output, and its last layer is run for keys and values only.
    last = f"vlm.layers.{config.vlm.depth - 1}."
    assert sorted(unused) == sorted(
        ["vlm.norm.weight", f"{last}post_attention_layernorm.weight"]
        + [f"{last}self_attn.{part}_proj.weight" for part in "qo"]
        + [f"{last}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    )


@KINDS
@pytest.mark.parametrize("num_steps", [10, 3])
def test_samples_are_the_references(models, kind, num_steps):
    model, config = models[kind], CONFIGS[kind]
    inputs, noise = random_inputs(config), random_chunk(config)
    with torch.no_grad():
        found = model.sample_actions(inputs, noise=noise, num_steps=num_steps)
        weights = {name: p.detach() for name, p in public_weights(model).items()}
        close(found, reference.sample(weights, config, inputs, noise, num_steps))


@KINDS
def test_output_of_the_prefix_is_the_references(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, noise = random_inputs(config), random_chunk(config)
    with torch.no_grad():
        prefix = model.encode(inputs, with_output=True)
        weights = public_weights(model)
        for b in range(2):
            _, expected = reference.forward(weights, config, inputs, b, noise[b].double(), TIME[b].double())
            close(prefix.output[b][prefix.visible[b]], expected[prefix.visible[b]])
        assert model.encode(inputs).output is None


# ---- masks


@KINDS
def test_padding_may_as_well_be_left_out(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, noise = random_inputs(config), random_chunk(config)
    with torch.no_grad():
        both = model.sample_actions(inputs, noise=noise, num_steps=3)
        second = without_last_camera(row(inputs, 1))
        length = int(second.token_mask.sum())
        second = replace(second, tokens=second.tokens[:, :length], token_mask=second.token_mask[:, :length])
        alone = model.sample_actions(second, noise=noise[1:], num_steps=3)
    close(alone, both[1:])


@KINDS
def test_what_is_masked_is_not_seen(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, noise = random_inputs(config), random_chunk(config)
    images, tokens = inputs.images.clone(), inputs.tokens.clone()
    images[1, -1] = 1.0
    tokens[~inputs.token_mask] = 0
    with torch.no_grad():
        expected = model.sample_actions(inputs, noise=noise, num_steps=2)
        close(model.sample_actions(replace(inputs, images=images, tokens=tokens), noise=noise, num_steps=2), expected)
        images[0, -1] = 1.0
        changed = model.sample_actions(replace(inputs, images=images), noise=noise, num_steps=2)
    assert (changed[0] - expected[0]).abs().max() > 1e-3


def test_pi0_reads_the_state_as_numbers_and_pi05_does_not(models):
    for kind, reads in (("pi0", True), ("pi05", False)):
        inputs, noise = random_inputs(CONFIGS[kind]), random_chunk(CONFIGS[kind])
        other = replace(inputs, state=inputs.state + 1)
        with torch.no_grad():
            found, changed = (models[kind].sample_actions(i, noise=noise, num_steps=2) for i in (inputs, other))
        assert torch.equal(found, changed) is not reads


# ---- the prefix is computed once


@KINDS
def test_prefix_runs_once_and_nothing_changes_it(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, noise = random_inputs(config), random_chunk(config)
    calls = {"vision": 0, "vlm": 0, "expert": 0}
    hooks = [
        getattr(model, part).register_forward_hook(lambda *_, part=part: calls.__setitem__(part, calls[part] + 1))
        for part in calls
    ]
    with torch.no_grad():
        sampled = model.sample_actions(inputs, noise=noise, num_steps=10)
        assert calls == {"vision": 1, "vlm": 1, "expert": 10}
        prefix = model.encode(inputs)
        before = [(k.clone(), v.clone()) for k, v in prefix.past]
        for _ in range(2):
            assert torch.equal(model.denoise(prefix, noise, num_steps=10), sampled)
        fresh = model.velocity(model.encode(inputs), noise, TIME)
        assert torch.equal(model.velocity(prefix, noise, TIME), fresh)
    for (k, v), (old_k, old_v) in zip(prefix.past, before, strict=True):
        assert torch.equal(k, old_k) and torch.equal(v, old_v)
    for hook in hooks:
        hook.remove()


@KINDS
def test_denoising_is_euler_over_velocity(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, x = random_inputs(config), random_chunk(config)
    with torch.no_grad():
        prefix = model.encode(inputs)
        expected = model.denoise(prefix, x, num_steps=4)
        for time in denoising_times(4):
            x = x - model.velocity(prefix, x, time.expand(2)) / 4
    close(x, expected, 1e-6)


def test_horizon_is_free(models):
    inputs = random_inputs(TINY)
    with torch.no_grad():
        assert models["pi0"].sample_actions(inputs, noise=torch.randn(2, 3, 32), num_steps=1).shape == (2, 3, 32)


# ---- gradients


@KINDS
def test_frozen_model_is_differentiable_in_the_noise(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs = random_inputs(config)
    noise = random_chunk(config).requires_grad_()
    model.requires_grad_(False)
    out = model.sample_actions(inputs, noise=noise, num_steps=3)
    weight = random_chunk(config, seed=5)
    (out * weight).sum().backward()
    model.requires_grad_(True)
    direction = random_chunk(config, seed=6)
    with torch.no_grad():
        ends = [
            (model.sample_actions(inputs, noise=noise + h * direction, num_steps=3) * weight).double().sum()
            for h in (-1e-2, 1e-2)
        ]
    slope = (ends[1] - ends[0]) / 2e-2
    torch.testing.assert_close((noise.grad * direction).double().sum(), slope, rtol=1e-2, atol=1e-2)
    assert not out.detach().requires_grad and out.requires_grad


@KINDS
def test_sampling_without_gradients_keeps_no_graph(models, kind):
    config = CONFIGS[kind]
    with torch.no_grad():
        out = models[kind].sample_actions(random_inputs(config), noise=random_chunk(config), num_steps=1)
    assert out.grad_fn is None


@KINDS
def test_expert_is_trained_alone(models, kind):
    model, config = models[kind], CONFIGS[kind]
    model.requires_grad_(False)
    for p in model.expert_parameters():
        p.requires_grad_(True)
    model.zero_grad()
    chunk = random_chunk(config)
    model.loss(random_inputs(config), chunk, noise=random_chunk(config, seed=3), time=TIME).mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    model.requires_grad_(True)
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith(("vision.", "projector.", "vlm."))}


@KINDS
def test_recomputed_layers_give_the_same_gradient(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, actions, noise = random_inputs(config), random_chunk(config), random_chunk(config, seed=3)
    gradients = []
    for recompute in (False, True):
        model.recompute_layers(recompute)
        model.zero_grad()
        model.loss(inputs, actions, noise=noise, time=TIME).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.recompute_layers(False)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


@KINDS
def test_shard_units_are_all_layers_each_called_once(models, kind):
    model, config = models[kind], CONFIGS[kind]
    units = model.shard_units()
    assert len(units) == config.vision.depth + 2 * config.vlm.depth
    calls = []
    hooks = [unit.register_forward_hook(lambda module, *_: calls.append(id(module))) for unit in units]
    model.loss(random_inputs(config), random_chunk(config), noise=random_chunk(config, seed=3), time=TIME)
    assert calls == [id(unit) for unit in units]
    for hook in hooks:
        hook.remove()


@KINDS
def test_a_fresh_model_learns_a_batch(kind):
    config = CONFIGS[kind]
    model = build_pi0(config, generator=torch.Generator().manual_seed(0))
    inputs, actions = random_inputs(config), 0.5 * random_chunk(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = model.loss(inputs, actions, noise=random_chunk(config, seed=3), time=TIME).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 5
    assert losses[-1] < 0.2 * losses[0]


# ---- types


@KINDS
def test_bfloat16_keeps_the_float32_parts_and_the_result(models, kind):
    config = CONFIGS[kind]
    model = random_model(config, torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype is (torch.float32 if stays_float32(name) else torch.bfloat16), name
    inputs, noise = random_inputs(config), random_chunk(config)
    with torch.no_grad():
        found = model.sample_actions(inputs, noise=noise)
        expected = models[kind].sample_actions(inputs, noise=noise)
        assert model.encode(inputs, with_output=True).output.dtype is torch.bfloat16
    assert found.dtype is torch.float32
    assert (found - expected).norm() / expected.norm() < 0.03
    assert model.loss(inputs, noise, noise=random_chunk(config, seed=3), time=TIME).dtype is torch.float32


@KINDS
def test_float32_parts_by_name(kind):
    kept = {name for name in empty_pi0(CONFIGS[kind]).state_dict() if stays_float32(name)}
    assert {name for name in kept if name.startswith("vision.")} == {
        "vision.patch_embedding.weight",
        "vision.patch_embedding.bias",
        "vision.position_embedding.weight",
    }
    streams = {name for name in kept if name.startswith(("vlm.", "expert."))}
    assert all("norm" in name for name in streams)
    assert len(streams) == 7 + (14 if kind == "pi05" else 7)
    assert "projector.weight" not in kept and "vlm.embed_tokens.weight" not in kept
    heads = {name for name in kept if not name.startswith(("vision.", "vlm.", "expert."))}
    assert len(heads) == (8 if kind == "pi05" else 10)


@KINDS
def test_autocast_runs_float32_weights_in_bfloat16(models, kind):
    model, config = models[kind], CONFIGS[kind]
    inputs, noise = random_inputs(config), random_chunk(config)
    seen = []
    hook = model.expert.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    outside = model.action_out_proj.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.sample_actions(inputs, noise=noise, num_steps=1)
        assert seen == [torch.bfloat16, torch.float32]
        hook.remove(), outside.remove()
        expected = model.sample_actions(inputs, noise=noise, num_steps=1)
    assert found.dtype is torch.float32
    assert (found - expected).norm() / expected.norm() < 0.03


def test_streams_of_different_types_attend_together():
    """A frozen bfloat16 language model under a float32 expert, and the other way round."""
    model = random_model(TINY, torch.bfloat16)
    inputs, noise = random_inputs(TINY), random_chunk(TINY)
    with torch.no_grad():
        expected = model.sample_actions(inputs, noise=noise, num_steps=2)
        model.expert.float()
        found = model.sample_actions(inputs, noise=noise, num_steps=2)
        assert (found - expected).norm() / expected.norm() < 0.03
        model.vlm.float(), model.expert.bfloat16()
        found = model.sample_actions(inputs, noise=noise, num_steps=2)
    assert (found - expected).norm() / expected.norm() < 0.03


# ---- time, images, sizes


def test_time_embedding_by_hand():
    """Width 4: periods 0.004 and 4. At t = 0.5 they are passed 125 and 1/8 times."""
    found = time_embedding(torch.tensor([0.5, 0.001]), 4)
    expected = [
        [0.0, math.sin(math.pi / 4), 1.0, math.cos(math.pi / 4)],
        [1.0, math.sin(math.pi / 2000), 0.0, math.cos(math.pi / 2000)],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)
    assert found.dtype is torch.float32


def test_denoising_times_count_down_in_float32():
    for steps in (1, 4, 10, 50):
        times = denoising_times(steps)
        assert len(times) == steps and times[0] == 1
        torch.testing.assert_close(times, 1 - torch.arange(steps) / steps, atol=2e-6, rtol=0)
    by_hand = torch.tensor(1.0) - torch.tensor(0.1) - torch.tensor(0.1) - torch.tensor(0.1)
    assert denoising_times(10)[3] == by_hand


def test_training_time_is_beta():
    time = training_time(100_000, torch.Generator().manual_seed(0))
    assert time.min() >= 0.001 and time.max() <= 1
    s = (time - 0.001) / 0.999
    assert s.mean() == pytest.approx(0.6, abs=0.003)  # a / (a + b)
    assert s.var() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.002)
    for x in (0.1, 0.5, 0.9):
        assert (s < x).float().mean() == pytest.approx(x**1.5, abs=0.005)


def test_images_are_scaled_to_plus_minus_one():
    black, white = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    red = black.clone()
    red[..., 0] = 51
    out = stack_cameras([black, white, red])
    assert out.shape == (2, 3, 3, 4, 4)
    assert (out[:, 0] == -1).all() and (out[:, 1] == 1).all() and (out[:, 2, 1:] == -1).all()
    torch.testing.assert_close(out[:, 2, 0], torch.full((2, 4, 4), -0.6))


def test_shapes_are_checked(models):
    inputs, noise = random_inputs(TINY), random_chunk(TINY)
    with pytest.raises(ShapeError, match=r"noise is \[1, 8, 32\] instead of \[2, H, 32\]"):
        models["pi0"].sample_actions(inputs, noise=noise[:1])
    with pytest.raises(ShapeError, match=r"noise is \[2, 8, 32\], but actions are \[2, 1, 32\]"):
        models["pi0"].loss(inputs, noise[:, :1], noise=noise, time=TIME)
    with pytest.raises(ShapeError, match=r"instead of \[B, C, 3, 64, 64\]"):
        models["pi0"].encode(replace(inputs, images=inputs.images[..., :28]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert": GemmaConfig(64, 2, 128, num_heads=4, head_dim=24)}, "expert.depth is 2 and vlm.depth is 3"),
        ({"expert": GemmaConfig(64, 3, 128, num_heads=8, head_dim=24)}, "expert.num_heads is 8"),
        ({"expert": GemmaConfig(65, 3, 128, num_heads=4, head_dim=24)}, "expert.width is 65"),
        ({"vision": SiglipConfig(width=30, num_heads=4)}, "vision.width"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **change)


def test_full_sizes():
    """Parameters as published: the token embedding is tied, the expert's head not there."""
    counts = {"pi0": (776, 3_238_048_528), "pi05": (811, 3_353_433_872)}
    for variant, (tensors, total) in counts.items():
        model = empty_pi0(VARIANTS[variant])
        assert len(model.state_dict()) == tensors
        assert sum(p.numel() for p in model.parameters()) == total
        assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    assert PI0.vision.num_tokens == 256


def test_random_weights_follow_the_generator():
    one, same, other = (build_pi0(TINY, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    name = "expert.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert all(p.isfinite().all() for p in one.parameters())


def test_inputs_move_together():
    moved = random_inputs(TINY).to("meta")
    assert all(getattr(moved, name).is_meta for name in ("images", "image_mask", "tokens", "token_mask", "state"))
