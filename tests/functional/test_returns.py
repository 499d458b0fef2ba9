import pytest
import torch

from rlinf.functional.returns import fold_chunk


def test_fold_chunk_by_hand():
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    terminated = torch.tensor([[False, False, False], [False, True, False], [True, False, False]])
    folded, discount = fold_chunk(reward, terminated, 0.5)
    # 1 + ½·2 + ¼·4 = 3; the second episode ends with its second action, the third with its first.
    torch.testing.assert_close(folded, torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(discount, torch.tensor([0.125, 0.0, 0.0]))


def test_always_bootstraps_from_terminal_states_but_still_stops_counting_rewards():
    reward, terminated = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    folded, discount = fold_chunk(reward, terminated, 0.5, "always")
    assert folded.item() == 1.0
    assert discount.item() == 0.25


def test_single_actions_are_a_chunk_of_one():
    folded, discount = fold_chunk(torch.tensor([[[0.7]]]), torch.tensor([[[False]]]), 0.9)
    assert folded.shape == discount.shape == (1, 1)
    assert folded.item() == pytest.approx(0.7)
    assert discount.item() == pytest.approx(0.9)
