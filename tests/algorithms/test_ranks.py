"""Two ranks with half of a batch each end where one rank with the whole batch does."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlinf.algorithms.optimize import OptimizerSettings, Stepper, load_generator
from rlinf.core.errors import ConfigError
from rlinf.core.ranks import ONE_RANK
from tests.algorithms.learners import ENVS, STEPS, learn, make_ppo, make_sac, played, run_ppo, run_sac, segments
from tests.ranks import run_ranks


def run_saved_sac(ranks):
    """How many states the running statistics of a checkpoint cover that is written right after `observe`."""
    learner = make_sac(ranks)
    learner.observe(segments()[ranks.rank])
    learner.state_dict()
    return learner.normalizer.count.item()


def run_uneven_ppo(ranks):
    """Rank 0 has 12 samples, rank 1 only 7, so a pass is 7 of each in minibatches of 4 and 3."""
    valid = torch.ones(STEPS, 2, dtype=torch.bool)
    valid[1:, 1] = not ranks.rank
    ppo = make_ppo(ranks, batch_size=8)
    ppo.observe(played(0, slice(2 * ranks.rank, 2 * ranks.rank + 2), valid))
    return learn(ppo)


def run_stopped_ppo(ranks):
    """The divergence on the own samples differs between the ranks, and with it when each would stop alone."""
    ppo = make_ppo(ranks, update_epoch=50, target_kl=1e-3, policy_optim=OptimizerSettings(lr=0.03))
    ppo.observe(played(0, slice(2 * ranks.rank, 2 * ranks.rank + 2)))
    return learn(ppo)


def run_half_ready_ppo(ranks):
    ppo = make_ppo(ranks)
    if ranks.rank == 0:
        ppo.observe(played())
    return ppo.ready()


def run_collectives(ranks):
    rank = ranks.rank
    return {
        "sum": ranks.sum_(torch.tensor([1.0, rank])),
        "mean": ranks.mean_(torch.tensor([1.0, rank])),
        "broadcast": ranks.broadcast_(torch.tensor([5 + rank])),
        "cat": ranks.cat(torch.full((rank + 1, 2), float(rank))),
        "cat_of_none": ranks.cat(torch.zeros(rank * 3)),
        "gather": ranks.gather({"rank": rank}),
        "any": [ranks.any(False), ranks.any(rank == 1), ranks.any(True)],
        "all": [ranks.all(False), ranks.all(rank == 1), ranks.all(True)],
    }


def run_stepper(ranks):
    """A gradient of norm 10 on rank 0 and none on rank 1: the clip has to see 5."""
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    stepper = Stepper([p], OptimizerSettings(clip_grad=1.0), ranks)
    factor = 1.0 if ranks.rank == 0 else 0.0
    metrics = stepper.descend(lambda _: (factor * p.square().sum(), {}), [None])
    nan = torch.nan if ranks.rank == 1 else 1.0
    before = p.detach().clone()
    bad = stepper.descend(lambda _: (nan * p.sum(), {}), [None])["grad_norm"]
    moment = stepper.optimizer.state[stepper.flat]["exp_avg"]
    return metrics["grad_norm"].item(), moment, torch.equal(p, before), bad.item()


def everything(ranks):
    return {
        "collectives": run_collectives(ranks),
        "stepper": run_stepper(ranks),
        # One segment against two, then none against one.
        "sac": run_sac(ranks, [[[0], []], [[1, 2], [3]]][ranks.rank]),
        "saved sac": run_saved_sac(ranks),
        "ppo": run_ppo(ranks),
        "uneven": run_uneven_ppo(ranks),
        "stopped": run_stopped_ppo(ranks),
        "half ready": run_half_ready_ppo(ranks),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(everything, tmp_path_factory.mktemp("ranks"))


def assert_same(one, other):
    """Bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_collectives(two):
    for found in (rank["collectives"] for rank in two):
        assert found["sum"].tolist() == [2, 1]
        assert found["mean"].tolist() == [1, 0.5]
        assert found["broadcast"].tolist() == [5]
        assert found["cat"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["cat_of_none"].tolist() == [0, 0, 0]
        assert found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["any"] == [False, True, True]
        assert found["all"] == [False, False, True]


def test_the_norm_that_is_clipped_is_that_of_the_mean_gradient(two):
    for norm, moment, unmoved, bad in (rank["stepper"] for rank in two):
        assert norm == pytest.approx(5.0)
        torch.testing.assert_close(moment, 0.1 * torch.tensor([0.6, 0.8]), atol=1e-6, rtol=1e-5)
        assert unmoved and bad != bad, "a gradient that is not finite on one rank stops the step of all"


def test_sac_ends_where_one_rank_does(two):
    ranks = [rank["sac"] for rank in two]
    alone = run_sac(ONE_RANK, [[0, 1, 2], [3]])
    assert_same(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], alone["weights"], rtol=1e-6, atol=1e-9)
    start = make_sac(ONE_RANK)
    assert not torch.allclose(start.actor.net.weight, alone["weights"]["actor"]["net.weight"], atol=1e-3)
    assert alone["weights"]["actor"]["norm.count"] == ranks[0]["weights"]["actor"]["norm.count"] == 4 * STEPS * ENVS
    for one, other, expected in zip(ranks[0]["metrics"], ranks[1]["metrics"], alone["metrics"], strict=True):
        assert one.keys() == other.keys() == expected.keys()
        for tag, value in expected.items():
            mean = (one[tag] + other[tag]) / 2
            assert float(mean) == pytest.approx(float(value), rel=1e-6), tag
            if tag.endswith("grad_norm"):
                assert one[tag] == other[tag]


def test_sac_is_ready_when_every_rank_has_its_share(two):
    """60 transitions are asked for: 24 and 48 are too unevenly dealt, though they are more."""
    assert [rank["sac"]["ready"] for rank in two] == [[False, False]] * 2
    assert run_sac(ONE_RANK, [[0, 1], [2]])["ready"] == [False, True]


def test_the_state_holds_the_generators_of_all_ranks(two):
    states = [rank["sac"]["generators"] for rank in two]
    assert_same(states[0], states[1])
    assert not torch.equal(states[0][0], states[0][1])
    fresh, other = (torch.Generator().manual_seed(seed).get_state() for seed in (0, 7))
    generator = torch.Generator()
    for size, state, expected in (
        (2, {"generators": states[0]}, states[0][0]),
        (1, {"generators": states[0]}, fresh),
        (1, {"generators": [other]}, other),
        (1, {"generator": other}, other),
        (2, {"generator": other}, fresh),
    ):
        load_generator(generator.manual_seed(0), state, replace(ONE_RANK, size=size))
        assert_same(generator.get_state(), expected)


def test_a_checkpoint_holds_the_statistics_of_all_that_was_observed(two):
    one = run_saved_sac(ONE_RANK)
    assert [rank["saved sac"] for rank in two] == [2 * one, 2 * one]
    assert one > 0


def test_ppo_ends_where_one_rank_does(two):
    alone = run_ppo(ONE_RANK)
    for first, second, expected in zip(two[0]["ppo"], two[1]["ppo"], alone, strict=True):
        assert_same(first["weights"], second["weights"])
        torch.testing.assert_close(first["weights"], expected["weights"], rtol=1e-5, atol=2e-6)
        assert len(first["metrics"]) == len(second["metrics"]) == len(expected["metrics"]) == 3
        for one, other, whole in zip(first["metrics"], second["metrics"], expected["metrics"], strict=True):
            assert one.keys() == other.keys() == whole.keys()
            for tag, value in whole.items():
                assert (one[tag] + other[tag]) / 2 == pytest.approx(value, rel=2e-4, abs=2e-6), tag
                if tag.startswith("rollout/") or tag.endswith(("grad_norm", "explained_variance")):
                    assert one[tag] == other[tag], tag
    assert alone[1]["weights"]["normalizer.count"] == 2 * STEPS * ENVS


def test_ranks_with_unequal_numbers_of_samples_make_equally_many_updates(two):
    one, other = (rank["uneven"] for rank in two)
    assert len(one["metrics"]) == len(other["metrics"]) == 3 * 2
    assert_same(one["weights"], other["weights"])


def test_ranks_stop_together_on_the_mean_divergence(two):
    one, other = ([step["actor/approx_kl"] for step in rank["stopped"]["metrics"]] for rank in two)
    assert 1 < len(one) == len(other) < 50
    assert one == other, "the divergence that is reported is the one that was decided on"
    assert one[-1] > 1e-3 >= max(one[:-1])
    assert_same(two[0]["stopped"]["weights"], two[1]["stopped"]["weights"])


def test_ppo_waits_for_the_collection_of_every_rank(two):
    assert [rank["half ready"] for rank in two] == [False, False]


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    for make in (lambda ranks: make_ppo(ranks, batch_size=8), make_sac):
        with pytest.raises(ConfigError, match=r"actor\.global_batch_size=\d+ cannot be dealt out evenly over 3 ranks"):
            make(replace(ONE_RANK, size=3))
