import pytest
import torch

from rlinf.workers.finite import non_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_place_is_found(value, dtype):
    bad = torch.zeros(3, 2, dtype=dtype)
    bad[1, 0] = value
    path, tensor = non_finite({"a": [torch.zeros(2), {"b": bad}], "c": bad})
    assert path == "a/1/b"
    assert tensor is bad


def test_only_tensors_of_floats_are_looked_at():
    assert non_finite({"a": [torch.tensor([1])], "b": float("nan"), "c": "text", 7: torch.empty(0)}) is None


def test_numbers_whose_sum_overflows_or_cancels_are_judged_one_by_one():
    assert non_finite(torch.full((4,), 3e38)) is None
    assert non_finite({"x": torch.tensor([float("inf"), float("-inf")])}) is not None
