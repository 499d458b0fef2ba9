"""Supervised tuning: masks, micro-batches, the average, resuming."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.supervised import SupervisedTuning, swap_
from rlinf.core.errors import CheckpointError
from rlinf.data.chunks import ChunkBatch
from rlinf.models.embodiment.openpi.cloning import OpenpiCloningConfig, Pi0Cloning, TrainedParts, freeze
from rlinf.models.embodiment.openpi.config import GemmaConfig, SiglipConfig
from rlinf.models.embodiment.openpi.model import build_pi0, training_time
from rlinf.models.embodiment.openpi.norm_stats import NormStats
from rlinf.models.embodiment.openpi.tokenizer import WordTokenizer

SIZES = {"depth": 2, "mlp_dim": 32, "num_heads": 2, "head_dim": 8}


def network(train=None, **options):
    config = OpenpiCloningConfig(openpi={"config_name": "pi05_maniskill_sim_real_co_training", "size": "tiny"})
    robot = config.robot()
    vision = SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2, image_size=16, patch_size=8)
    small = replace(
        robot.model, vision=vision, vlm=GemmaConfig(width=16, **SIZES), expert=GemmaConfig(width=16, **SIZES)
    )
    robot = replace(robot, model=replace(small, action_horizon=3))
    one = torch.ones(32, dtype=torch.float64)
    stats = {name: NormStats(0 * one, one, -one, one) for name in ("state", "actions")}
    model = build_pi0(robot.model, generator=torch.Generator().manual_seed(0))
    freeze(model, train or TrainedParts())
    return Pi0Cloning(model, robot.pipeline(stats, WordTokenizer()), action_dim=robot.action_dim, **options)


def batch(rows=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    valid = torch.arange(3)[None] < torch.tensor([3, 1, 2, 3, 1])[:rows, None]
    obs = {
        "state": torch.randn(rows, 7, generator=draw),
        "images": {"front": torch.randint(0, 255, (rows, 16, 16, 3), generator=draw, dtype=torch.uint8)},
        "instruction": ["put it there", "go"] * (rows // 2) + ["go"] * (rows % 2),
    }
    return ChunkBatch(obs, torch.randn(rows, 3, 7, generator=draw), valid)


def tuning(model=None, **options):
    return SupervisedTuning(
        model or network(),
        OptimizerSettings(lr=1e-2, eps=1e-4, clip_grad=1.0),
        training_time,
        generator=torch.Generator().manual_seed(1),
        **options,
    )


def test_the_loss_is_by_hand_the_mean_over_the_robots_numbers_of_valid_actions():
    model, demos = network(), batch()
    noise, time = torch.randn(5, 1, 3, 32), torch.rand(5, 1)
    error = model.flow_matching_loss(demos.obs, demos.action, demos.valid, noise=noise, time=time)
    inputs, chunk = model.pipeline.encode_with_actions(demos.obs, demos.action)
    every = model.model.loss(inputs, chunk, noise=noise[:, 0], time=time[:, 0])
    assert torch.allclose(error[:, 0], every[..., :7].mean(-1) * demos.valid, atol=1e-6)
    padded = network(padding_weight=0.5).flow_matching_loss(
        demos.obs, demos.action, demos.valid, noise=noise, time=time
    )
    assert torch.allclose(
        padded[:, 0], (every[..., :7].mean(-1) + 0.5 * every[..., 7:].mean(-1)) * demos.valid, atol=1e-5
    )


def test_masked_numbers_and_actions_behind_the_end_are_no_targets():
    one = tuning()
    fresh = network().model.action_out_proj.weight
    one.update(batch())
    layer = one.network.model.action_out_proj
    assert torch.equal(layer.weight[7:], fresh[7:]) and not torch.equal(layer.weight[:7], fresh[:7])

    model, demos = network(padding_weight=0.5), batch()
    noise, time = torch.randn(5, 1, 3, 32), torch.rand(5, 1)
    error = model.flow_matching_loss(demos.obs, demos.action, demos.valid, noise=noise, time=time)
    assert (error[:, 0] > 0).equal(demos.valid)


def test_several_noises_of_an_example_are_as_many_examples():
    demos, twice = batch(2), batch(2)
    noise, time = torch.randn(2, 3, 3, 32), torch.rand(2, 3)
    error = network(noises_per_example=3).flow_matching_loss(
        demos.obs, demos.action, demos.valid, noise=noise, time=time
    )
    for r in range(3):
        alone = network().flow_matching_loss(
            twice.obs, twice.action, twice.valid, noise=noise[:, r : r + 1], time=time[:, r : r + 1]
        )
        assert torch.allclose(error[:, r], alone[:, 0], atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_uneven_micro_batches_change_nothing(size):
    whole, parts = tuning(), tuning(micro_batch_size=size)
    for step in range(2):
        groups = {"one": slice(0, 2), "other": slice(2, 5)}
        a, b = whole.update(batch(seed=step), groups), parts.update(batch(seed=step), groups)
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
        valid = batch().valid
        mean = (4 * a["sft_loss/one"] + 6 * a["sft_loss/other"]) / valid.sum()
        assert float(mean) == pytest.approx(float(a["sft_loss"]), rel=1e-5)
    assert torch.allclose(whole.state_dict()["weights"], parts.state_dict()["weights"], atol=1e-5)


def test_the_average_follows_in_float32_and_acts():
    one = tuning(ema_decay=0.9)
    before = one.state_dict()["weights"]
    one.update(batch())
    first = one.state_dict()["weights"]
    expected = before + (first - before) * (1 - 2 / 11)  # (1 + 1) / (10 + 1) in the first update
    assert torch.allclose(one.average, expected, atol=1e-7) and one.average.dtype is torch.float32
    average = one.average.clone()
    with one.averaged():
        assert torch.equal(torch.cat([p.detach().flatten() for p in one.trained]), average)
    assert torch.equal(one.average, average)
    assert torch.equal(one.state_dict()["weights"], first)


@pytest.mark.parametrize("train", [{"vision": False}, {"language": False}, {"vision": False, "language": False}])
def test_what_is_frozen_never_moves(train):
    model = network(TrainedParts(**train))
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    one = tuning(model, ema_decay=0.5)
    for step in range(2):
        one.update(batch(seed=step))
    moved = {name.split(".")[0] for name, p in model.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = set()
    if not train.get("vision", True):
        frozen |= {"vision", "projector"}
    if not train.get("language", True):
        frozen |= {"vlm"}
    assert not moved & frozen and "expert" in moved and "action_in_proj" in moved
    assert {"vision", "vlm"} - frozen <= moved


def test_vectors_are_swapped_in_parts():
    one, other = torch.arange(7.0), -torch.arange(7.0)
    swap_(one, other, size=3)
    assert torch.equal(other, torch.arange(7.0)) and torch.equal(one, -torch.arange(7.0))


def test_a_state_goes_on_exactly():
    straight, stopped = tuning(ema_decay=0.9), tuning(ema_decay=0.9)
    for step in range(4):
        straight.update(batch(seed=step))
    for step in range(2):
        stopped.update(batch(seed=step))
    resumed = tuning(ema_decay=0.9)
    resumed.load_state_dict(stopped.state_dict())
    for step in (2, 3):
        resumed.update(batch(seed=step))
    for name in ("weights", "average"):
        assert torch.equal(straight.state_dict()[name], resumed.state_dict()[name])
    with pytest.raises(CheckpointError, match="'weights' in the checkpoint does not fit"):
        tuning(network(TrainedParts(vision=False)), ema_decay=0.9).load_state_dict(stopped.state_dict())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_state_leaves_the_device_alone():
    one = tuning(ema_decay=0.9)
    with FakeTensorMode():  # a GPU without one
        one.trained = [torch.nn.Parameter(torch.empty(5, device="cuda"))]
        one.average = torch.empty(5, device="cuda")
        state = one.state_dict()
    assert {state[name].device.type for name in ("weights", "average")} == {"cpu"}
    two = tuning(ema_decay=0.9)
    kept = two.state_dict()
    two.update(batch())
    assert not torch.equal(kept["weights"], two.state_dict()["weights"]), "it is a copy"
    assert not torch.equal(kept["average"], two.state_dict()["average"])
