import math

import numpy as np
import pytest
import torch

from rlinf.metrics.aggregate import MetricMean, mean_of_ranks, whole_buffer


def test_mean_over_tensors_and_numbers():
    mean = MetricMean()
    mean.add({"loss": torch.tensor(1.0), "lr": 0.5})
    mean.add({"loss": torch.tensor(4.0), "lr": 1.5})
    assert mean.mean() == {"loss": 2.5, "lr": 1.0}


def test_absent_tags_do_not_count():
    mean = MetricMean()
    mean.add({"critic": torch.tensor(2.0), "actor": torch.tensor(6.0)})
    mean.add({"critic": torch.tensor(4.0)})
    assert mean.mean() == {"critic": 3.0, "actor": 6.0}


def test_tag_may_change_between_tensor_and_number():
    mean = MetricMean()
    mean.add({"alpha": 1.0})
    mean.add({"alpha": torch.tensor(3.0)})
    assert mean.mean() == {"alpha": 2.0}


def test_first_value_is_copied():
    mean, buffer = MetricMean(), torch.tensor(1.0)
    mean.add({"loss": buffer})
    buffer.fill_(100.0)
    assert mean.mean() == {"loss": 1.0}


def test_graph_is_not_kept_alive():
    weight = torch.ones((), requires_grad=True)
    mean = MetricMean()
    mean.add({"loss": weight * 2})
    mean.add({"loss": weight * 4})
    assert mean.mean() == {"loss": 3.0}
    assert weight.grad is None


def test_many_small_numbers_beside_a_large_one_are_not_lost():
    mean = MetricMean()
    mean.add({"size": torch.tensor(2.0**24)})
    for _ in range(1000):
        mean.add({"size": torch.tensor(1.0)})
    assert mean.mean()["size"] == pytest.approx((2**24 + 1000) / 1001, rel=1e-12)


def test_nan_stays_visible():
    mean = MetricMean()
    mean.add({"loss": torch.tensor(math.nan)})
    mean.add({"loss": torch.tensor(1.0)})
    assert math.isnan(mean.mean()["loss"])


def test_empty_mean_is_empty():
    assert MetricMean().mean() == {}


def test_more_than_one_element_is_refused():
    with pytest.raises(RuntimeError):
        MetricMean().add({"loss": torch.zeros(2)})


def test_ranks_count_alike_where_they_have_a_tag():
    assert mean_of_ranks([{"a": 1.0, "b": 2.0}, {"b": 4.0}]) == {"a": 1.0, "b": 3.0}
    assert mean_of_ranks([{"a": 0.1}]) == {"a": 0.1}


def statistics(rewards):
    return {
        "size": float(len(rewards)),
        "utilization": len(rewards) / 10,
        "max_reward": float(max(rewards, default=0)),
        "min_reward": float(min(rewards, default=0)),
        "mean_reward": float(np.mean(rewards)) if rewards else 0.0,
        "std_reward": float(np.std(rewards)) if rewards else 0.0,
    }


@pytest.mark.parametrize("parts", [([1.0, 4.0], [2.0, 2.0, -7.0], [3.0]), ([-1.0, -2.0], []), ([], [])])
def test_a_buffer_in_parts_has_the_statistics_of_the_whole(parts):
    whole = statistics([reward for part in parts for reward in part])
    whole["utilization"] /= len(parts)
    assert whole_buffer([statistics(part) for part in parts]) == pytest.approx(whole)


def test_the_statistics_of_a_buffer_in_one_part_are_its_own():
    assert whole_buffer([{"size": 3.0, "other": 0.1}]) == {"size": 3.0, "other": 0.1}
