"""Flow matching: the loss by hand, and what it learns."""

import copy

import pytest
import torch
from torch import nn

from rlinf.algorithms.bc import FlowCloning, flow_matching_loss
from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.data.chunks import ChunkBatch
from rlinf.functional.flow import straight_path
from rlinf.models.embodiment.flow_decoder import FlowDecoder, FlowDecoderSpec


class Constant:
    """v = 1 everywhere; remembers where it was asked."""

    def velocity(self, obs, x, t):
        self.x, self.t = x, t
        return torch.ones_like(x)


def test_straight_path_by_hand():
    noise, action = torch.tensor([[[1.0, -1.0]], [[0.0, 2.0]]]), torch.tensor([[[3.0, 1.0]], [[1.0, 0.0]]])
    x, velocity = straight_path(noise, action, torch.tensor([0.0, 0.25]))
    assert x.tolist() == [[[1.0, -1.0]], [[0.25, 1.5]]]
    assert velocity.tolist() == [[[2.0, 2.0]], [[1.0, -2.0]]]


def test_loss_by_hand():
    noise = torch.zeros(2, 2, 2)
    action = torch.tensor([[[1.0, 1.0], [3.0, 1.0]], [[0.0, 0.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    model, t = Constant(), torch.tensor([0.5, 1.0])
    loss, stats = flow_matching_loss(model, {}, action, valid, noise, t)
    # Errors per valid action: 0, (4 + 0)/2, 1; the action behind the end of the episode counts nothing.
    assert loss.item() == pytest.approx((0 + 2 + 1) / 3)
    assert stats["flow_loss"].item() == loss.item()
    torch.testing.assert_close(model.x, action * t[:, None, None])


SPEC = FlowDecoderSpec(1, 1, 2, (64, 64), 10)


def two_ways(n, generator):
    """Half of the demonstrations go left all the way, half right; the middle leads nowhere."""
    side = torch.randint(0, 2, (n, 1, 1), generator=generator) * 1.2 - 0.6
    return ChunkBatch(
        {"state": torch.zeros(n, 1)}, side.expand(n, 2, 1).contiguous(), torch.ones(n, 2, dtype=torch.bool)
    )


def cloning(seed=0, steps=1500):
    torch.manual_seed(seed)
    settings = OptimizerSettings(lr=3e-3, lr_scheduler="cosine", total_training_steps=steps)
    return FlowCloning(FlowDecoder(SPEC), settings, generator=torch.Generator().manual_seed(seed))


def test_a_clone_keeps_both_of_two_ways():
    learner, generator = cloning(), torch.Generator().manual_seed(1)
    for _ in range(1500):
        metrics = learner.update(two_ways(128, generator))
    assert {"bc/flow_loss", "bc/grad_norm", "bc/lr"} <= metrics.keys()
    noise = torch.randn(1000, 2, 1, generator=generator)
    action = learner.model.decode({"state": torch.zeros(1000, 1)}, noise)
    near = (action.abs() - 0.6).abs() < 0.2
    assert near.float().mean() > 0.8, "demonstrated actions, nothing in between"
    assert 0.4 < (action[:, 0] > 0).float().mean() < 0.6
    assert (action[:, 0].sign() == action[:, 1].sign()).float().mean() > 0.95, "a chunk is one way, not two"


def test_cloning_resumes_bit_for_bit():
    straight, data = cloning(), [two_ways(16, torch.Generator().manual_seed(step)) for step in range(6)]
    for batch in data[:3]:
        straight.update(batch)
    saved = copy.deepcopy(straight.state_dict())
    resumed = cloning(seed=9)
    resumed.load_state_dict(saved)
    for batch in data[3:]:
        straight.update(batch)
        resumed.update(batch)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_statistics_of_the_states_are_not_trained():
    learner = cloning()
    learner.model.state_mean.fill_(3.0)
    learner.update(two_ways(8, torch.Generator().manual_seed(0)))
    assert learner.model.state_mean.item() == 3.0
    assert len(learner.stepper.parameters) == sum(1 for _ in learner.model.parameters())
    assert isinstance(learner.model, nn.Module)
