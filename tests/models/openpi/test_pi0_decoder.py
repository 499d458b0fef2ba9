"""π0 as a frozen decoder: whole observations and noise to the robot's actions."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlinf.core.errors import CheckpointError, DataError
from rlinf.models.embodiment.latent_policy import LatentHead, LatentPolicy
from rlinf.models.embodiment.openpi.checkpoint import save_pi0
from rlinf.models.embodiment.openpi.decoder import (
    OpenpiDecoder,
    find_tokenizer,
    load_openpi_decoder,
    random_openpi_decoder,
    weights_mark,
)
from rlinf.models.embodiment.openpi.norm_stats import NormStats, write_norm_stats
from rlinf.models.embodiment.openpi.policy_config import OpenpiConfig
from rlinf.models.embodiment.openpi.tokenizer import ByteTokenizer, WordTokenizer
from rlinf.models.modules.compact_encoder import CompactEncoder
from tests.models.openpi.pi0_samples import random_model

HORIZON = 6


def robot(name="pi0_libero"):
    data = OpenpiConfig(openpi={"config_name": name, "size": "tiny", "use_dsrl": True}).robot()
    return replace(data, model=replace(data.model, action_horizon=HORIZON))


def observations(n=3):
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randint(0, 256, (2, n, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return {
        "state": torch.randn(n, 8, generator=generator),
        "images": {"agentview": pictures[0], "wrist": pictures[1]},
        "instruction": ["put the bowl on the plate", "open the drawer", "push"][:n],
    }


def noise(n=3, seed=0):
    return torch.randn(n, HORIZON, 32, generator=torch.Generator().manual_seed(seed))


def statistics():
    def of(size, seed):
        generator = torch.Generator().manual_seed(seed)
        low = torch.randn(size, generator=generator).double()
        scale = torch.rand(size, generator=generator).double() + 0.5
        return NormStats(low + scale / 2, scale, low, low + scale)

    return {"state": of(8, 1), "actions": of(7, 2)}


@pytest.fixture(params=["pi0_libero", "pi05_libero"])
def folder(request, tmp_path):
    data = robot(request.param)
    save_pi0(random_model(data.model), tmp_path / "weights")
    write_norm_stats(statistics(), tmp_path / "weights" / "assets" / data.asset_id)
    return data, tmp_path / "weights"


def test_a_chunk_is_what_the_model_samples_in_the_robots_units(folder):
    """By the parts: encode, Euler steps, undo the normalisation, add the state where actions are relative to it."""
    data, path = folder
    decoder = load_openpi_decoder(data, path, ByteTokenizer(), num_steps=4, dtype=torch.float32)
    obs = observations()
    actions = decoder.decode(obs, noise())
    assert actions.shape == (3, HORIZON, 7) and actions.dtype is torch.float32 and not actions.requires_grad

    inputs = decoder.pipeline.encode(obs)
    with torch.no_grad():
        raw = decoder.model.sample_actions(inputs, noise=noise(), num_steps=4)[..., :7].double()
    offset, scale = statistics()["actions"].affine(data.quantiles)
    expected = raw * scale + offset
    if data.delta_mask is not None:
        expected[..., :6] += obs["state"][:, None, :6]
    torch.testing.assert_close(actions.double(), expected, atol=1e-5, rtol=1e-5)


def test_it_is_a_function_of_observation_and_noise(folder):
    data, path = folder
    decoder = load_openpi_decoder(data, path, ByteTokenizer(), num_steps=2, dtype=torch.float32)
    obs, first = observations(), noise()
    once, again = decoder.decode(obs, first), decoder.decode(obs, first)
    assert torch.equal(once, again)
    other = decoder.decode(obs, noise(seed=1))
    assert ((other - once).abs().amax((1, 2)) > 1e-3).all(), "noise steers every chunk"
    elsewhere = obs | {"images": obs["images"] | {"agentview": 255 - obs["images"]["agentview"]}}
    assert ((decoder.decode(elsewhere, first) - once).abs().amax((1, 2)) > 1e-5).all(), "it looks"
    alone = {"state": obs["state"][:1], "images": {k: v[:1] for k, v in obs["images"].items()},
             "instruction": obs["instruction"][:1]}  # fmt: skip
    torch.testing.assert_close(decoder.decode(alone, first[:1]), once[:1], atol=1e-5, rtol=1e-5)


def test_a_latent_policy_steers_it_and_nothing_of_it_learns():
    decoder = random_openpi_decoder(robot(), num_steps=2)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    head = LatentHead(CompactEncoder(8, 16, camera="agentview"), 32, (32,), 1.0)
    policy = LatentPolicy(head, decoder, num_action_chunks=5)
    head.begin_learning()
    out = policy.act(observations(), "train", torch.randn(3, 32))
    assert out.action.shape == (3, 5, 7) and out.decision.shape == (3, 32)
    repeated = out.decision[:, None].expand(-1, HORIZON, -1)
    assert torch.equal(out.action, decoder.decode(observations(), repeated)[:, :5])
    assert all(name.startswith("head.") for name in policy.state_dict())
    assert not any(p.requires_grad for p in decoder.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_random_weights_are_always_the_same():
    one, other = (random_openpi_decoder(robot(), num_steps=2) for _ in range(2))
    assert torch.equal(one.decode(observations(), noise()), other.decode(observations(), noise()))
    assert one.noise_shape == (HORIZON, 32)


def test_weights_may_be_bfloat16_and_actions_are_float32():
    decoder = random_openpi_decoder(robot(), num_steps=2, dtype=torch.bfloat16)
    exact = random_openpi_decoder(robot(), num_steps=2)
    assert {p.dtype for p in decoder.model.parameters()} == {torch.bfloat16, torch.float32}
    rough = decoder.decode(observations(), noise())
    assert rough.dtype is torch.float32
    torch.testing.assert_close(rough, exact.decode(observations(), noise()), atol=0.2, rtol=0.1)


# ---- what is refused


def test_a_missing_camera_is_named():
    decoder, obs = random_openpi_decoder(robot(), num_steps=2), observations()
    obs["images"] = {"agentview": obs["images"]["agentview"]}
    with pytest.raises(DataError, match=r"no camera for left_wrist_0_rgb: looked for wrist or .* there is agentview"):
        decoder.decode(obs, noise())


def test_files_that_are_missing_are_named(tmp_path):
    data, path = robot(), tmp_path / "weights"
    with pytest.raises(CheckpointError, match="weights does not exist"):
        load_openpi_decoder(data, path, ByteTokenizer(), num_steps=2, dtype=torch.float32)
    path.mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_openpi_decoder(data, path, ByteTokenizer(), num_steps=2, dtype=torch.float32)
    save_pi0(random_model(data.model), path)
    with pytest.raises(DataError, match="there are no statistics at"):
        load_openpi_decoder(data, path, ByteTokenizer(), num_steps=2, dtype=torch.float32)
    with pytest.raises(DataError, match=r"no tokenizer in .*actor.model.tokenizer_path.*PaliGemma"):
        find_tokenizer(None, path, tiny=False)
    assert isinstance(find_tokenizer(None, path, tiny=True), WordTokenizer)
    with pytest.raises(DataError, match="there is no tokenizer at"):
        find_tokenizer(tmp_path / "nowhere.model", path, tiny=True)


def test_weights_of_the_other_model_are_refused(tmp_path):
    save_pi0(random_model(robot("pi05_libero").model), tmp_path)
    write_norm_stats(statistics(), tmp_path)
    with pytest.raises(CheckpointError, match=r"but those of pi0\.5"):
        load_openpi_decoder(robot(), tmp_path, ByteTokenizer(), num_steps=2, dtype=torch.float32)


def test_the_mark_tells_checkpoints_apart(tmp_path):
    model = random_model(robot().model)
    save_pi0(model, tmp_path / "one")
    mark = weights_mark(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert weights_mark(tmp_path / "copy") == mark == weights_mark(tmp_path / "one" / "model.safetensors")
    with torch.no_grad():
        model.action_out_proj.weight.add_(1e-3)
    save_pi0(model, tmp_path / "trained")
    assert weights_mark(tmp_path / "trained") != mark
    with pytest.raises(CheckpointError, match="does not exist"):
        weights_mark(tmp_path / "nothing")


def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path):
    """A difference of two megabytes is seen wherever it is, and one byte more at the end, too."""
    content, file, marks = bytes(range(256)) * (5 << 16), tmp_path / "model.safetensors", set()
    for start in (None, 0, 39 << 20, len(content) - (2 << 20)):
        changed = bytearray(content)
        if start is not None:
            changed[start : start + (2 << 20)] = bytes(2 << 20)
        file.write_bytes(changed)
        marks.add(weights_mark(file))
    file.write_bytes(content + b"\0")
    marks.add(weights_mark(file))
    assert len(marks) == 5


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"openpi": {"use_dsrl": True}}, "model_path must name the folder with the weights of pi0"),
        ({"openpi": {"config_name": "pi0_libro", "size": "tiny"}}, "did you mean 'pi0_libero'"),
        ({"openpi": {"size": "tiny", "dsrl_heads": 3}}, "dsrl_heads"),
    ],
)
def test_keys_that_cannot_be(keys, text):
    with pytest.raises(ValidationError, match=text):
        OpenpiConfig(**keys)


def test_sizes_follow_the_named_robot():
    full = OpenpiConfig(model_path="weights", openpi={"config_name": "pi05_libero"}).robot()
    assert (full.model.action_horizon, full.model.vlm.width, full.model.pi05) == (10, 2048, True)
    tiny = OpenpiConfig(openpi={"config_name": "pi05_libero", "size": "tiny"}).robot()
    assert (tiny.model.action_horizon, tiny.model.vlm.width, tiny.model.pi05) == (10, 96, True)
    assert tiny.cameras == full.cameras and isinstance(random_openpi_decoder(tiny, num_steps=1), OpenpiDecoder)
