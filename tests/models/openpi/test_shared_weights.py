"""What is frozen lies in memory once, wherever the policies of a process go."""

import gc

import pytest
import torch
from torch import nn

from rlinf.models.embodiment.openpi import shared_weights
from rlinf.models.embodiment.openpi.config import PI05
from rlinf.models.embodiment.openpi.model import empty_pi0, stays_float32
from rlinf.models.embodiment.openpi.shared_weights import SharedWeights


class Net(nn.Module):
    """A frozen layer under a trained one, as `Pi0ActorCritic` shares them."""

    def __init__(self, key="one", shift=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trained = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)
        with torch.no_grad():
            self.frozen.bias.add_(shift)
        self.shared = SharedWeights(key, self.frozen.named_parameters())

    def _apply(self, fn, recurse=True):
        return super()._apply(self.shared.moving(fn), recurse)

    def places(self):
        return [p.data_ptr() for p in self.frozen.parameters()]


def held():
    gc.collect()
    return {place for place in shared_weights._in_use if place[0] in ("one", "other")}


def test_policies_of_one_model_have_its_frozen_part_once():
    first, second, other = Net(), Net(), Net("other")
    assert first.places() == second.places() != other.places()
    assert first.trained.weight.data_ptr() != second.trained.weight.data_ptr()
    assert len(held()) == 4
    del first
    assert len(held()) == 4 and torch.equal(second.frozen.weight, other.frozen.weight)
    del second, other
    assert not held(), "nobody keeps it alive who does not need it"


def test_it_is_moved_once():
    """To another type here, as to another device elsewhere."""
    first, second = Net(), Net()
    expected = first.frozen.weight.double()
    parameter = first.frozen.weight
    first.double()
    assert first.frozen.weight is parameter and not parameter.requires_grad
    assert first.places() != second.places() and second.frozen.weight.dtype == torch.float32
    second.double()
    assert first.places() == second.places() and torch.equal(second.frozen.weight, expected)
    assert {dtype for _, _, dtype, _ in held()} == {torch.float64}
    third = Net()
    assert third.frozen.weight.dtype == torch.float32
    third.double()
    assert third.places() == first.places()


def test_other_numbers_are_not_shared_whatever_the_key_says():
    first, second = Net(), Net(shift=1.0)
    assert first.places()[0] == second.places()[0] and first.places()[1] != second.places()[1]
    assert torch.equal(second.frozen.bias, first.frozen.bias + 1)


def test_how_much_it_is_at_full_size():
    """By the tensors of π0.5 without memory: what docs/algorithms/rl_co.md says, in GB."""
    model = empty_pi0(PI05)
    expert = {id(p) for p in model.expert_parameters()}
    size = {True: 0, False: 0}
    for name, p in model.named_parameters():
        size[id(p) in expert] += p.numel() * (4 if stays_float32(name) else 2)
    acting, frozen = size[True] / 1e9, size[False] / 1e9
    assert frozen == pytest.approx(5.85, abs=0.01) and acting == pytest.approx(1.10, abs=0.01)
