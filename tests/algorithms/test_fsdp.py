"""Weights that are shared out over two ranks end where those of one rank do."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from rlinf.algorithms.fsdp import FullySharded, local, rows_of
from rlinf.algorithms.optimize import OptimizerSettings
from rlinf.algorithms.parallel import Replicated
from rlinf.core.ranks import ONE_RANK
from tests.algorithms.learners import (
    LayeredActorCritic,
    LayeredCritic,
    LinearCritic,
    learn,
    make_ppo,
    make_sac,
    played,
    run_co_training,
    run_ppo,
    run_sac,
)
from tests.algorithms.vla_learner import run_vla
from tests.ranks import run_ranks


def shares(ranks, **settings):
    return FullySharded(ranks, "cpu", **settings)


kept = partial(shares, reshard_after_forward=False)
reduced_each = partial(shares, reduce_last_only=False)

SEEN = [[0, 1, 2], [3]]
DEALT = [[[0], []], [[1, 2], [3]]]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(64, 64), []

    def forward(self, x):
        self.seen.append((self.linear.weight.dtype, tuple(self.linear.weight.shape)))
        return torch.tanh(self.linear(x))


class Deep(nn.Module):
    """Three blocks of 64 rows, a head of one row, and a deviation that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head, self.log_std = nn.Linear(64, 1), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.blocks(x)).squeeze(-1)

    def shard_units(self):
        return list(self.blocks)


def deep(parallel, steps=4, autocast=False):
    """A network after some steps on two micro-batches of this rank's half of the rows, and its stepper."""
    torch.manual_seed(0)
    net = Deep()
    if not isinstance(parallel, Replicated):
        parallel.shard(net)
    stepper = parallel.stepper(net.parameters(), OptimizerSettings(lr=0.01, clip_grad=0.05, weight_decay=0.1))
    draw = torch.Generator().manual_seed(1)

    def loss_of(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (net(x).float() - x.mean(-1)).square().mean()
        return loss, {"loss": loss.detach()}

    norms = []
    for _ in range(steps):
        rows = torch.randn(16, 64, generator=draw)[parallel.ranks.rank :: parallel.ranks.size]
        norms.append(stepper.descend(loss_of, rows.chunk(2))["grad_norm"].item())
    return net, stepper, norms


def run_deep(parallel, **settings):
    net, stepper, norms = deep(parallel, **settings)
    return {"weights": parallel.copy_of(net), "stepper": stepper.state_dict(), "norms": norms}


def run_sizes(ranks):
    """Bytes of weights and moments that a rank holds, and what a forward pass brings together, and when."""
    found = {}
    for name, make in (("forgotten", shares), ("kept", kept)):
        parallel = make(ranks)
        net, stepper, _ = deep(parallel, steps=1)
        moments = parallel.held_of(stepper)["state"].values()
        found["weights"] = sum(local(p).untyped_storage().nbytes() for p in net.parameters())
        found["moments"] = sum(state[moment].nbytes for state in moments for moment in ("exp_avg", "exp_avg_sq"))
        found["gathered"] = sum(parallel.whole_parameter(p)[0].untyped_storage().nbytes() for p in net.parameters())
        found["computed with"] = {shape for block in net.blocks for _, shape in block.seen}
        weight = parallel.whole_parameter(net.blocks[0].linear.weight)[0]
        net(torch.zeros(1, 64))
        found[name] = weight.untyped_storage().nbytes()
    return found


def run_exchanges(ranks):
    """How often gradients are shared out in two steps of two micro-batches."""
    counts = []
    for make in (shares, reduced_each):
        with torch.autograd.profiler.profile() as seen:
            deep(make(ranks), steps=2)
        counts.append(sum(event.name.startswith("FSDP::post_backward_reduce") for event in seen.function_events))
    return counts


def run_bf16(ranks):
    parallel = shares(ranks, unit_dtype=torch.bfloat16)
    found = run_deep(parallel, autocast=True)
    net, _, _ = deep(parallel, steps=1, autocast=True)
    return found | {
        "units": {seen[0] for block in net.blocks for seen in block.seen},
        "masters": {p.dtype for p in net.parameters()},
    }


def run_bad_steps(ranks):
    """A gradient of norm 10 on rank 0 and none on rank 1; then one that is not finite on rank 1 alone."""
    parallel = shares(ranks)
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    parallel.shard(net)
    stepper = parallel.stepper(net.parameters(), OptimizerSettings(clip_grad=1.0))
    one = torch.eye(2)
    first = 1.0 if ranks.rank == 0 else 0.0
    norm = stepper.descend(lambda _: (first * net(one).square().sum(), {}), [None])["grad_norm"].item()
    moments = stepper.state_dict()
    bad = math.nan if ranks.rank == 1 else 1.0
    norm_of_bad = stepper.descend(lambda _: (bad * net(one).sum(), {}), [None])["grad_norm"].item()
    return norm, moments, norm_of_bad, stepper.state_dict(), parallel.copy_of(net)


def run_frozen(parallel):
    """Only the last block is trained, through the others; the first is used by nobody."""
    torch.manual_seed(0)
    net = Deep()
    net.requires_grad_(False)
    net.blocks[2].requires_grad_(True)
    if not isinstance(parallel, Replicated):
        parallel.shard(net)
    stepper = parallel.stepper(net.blocks[2].parameters(), OptimizerSettings(lr=0.01))
    x = torch.full((4, 64), 1.0 + parallel.ranks.rank)
    for _ in range(3):
        stepper.descend(lambda x: (net(x).mean(), {}), [x])
    return parallel.copy_of(net)


def run_unlike_segments(ranks, share):
    """Rank 0 has two segments, of which episodes ended; rank 1 has one, in which none did."""
    ppo = make_ppo(ranks, share, LayeredActorCritic, batch_size=8)
    for seed in range(2 - ranks.rank):
        segment = played(seed, slice(2 * ranks.rank, 2 * ranks.rank + 2))
        ppo.observe(segment)
    return learn(ppo)


def run_recomputed(ranks, share):
    """Before the first step rank 0 computes the densities of 24 decisions in six passes, rank 1 of 12 in three."""
    ppo = make_ppo(ranks, share, LayeredActorCritic, batch_size=8, micro_batch_size=4, recompute_log_prob=True)
    for seed in range(2 - ranks.rank):
        ppo.observe(played(seed, slice(2 * ranks.rank, 2 * ranks.rank + 2)))
    return learn(ppo)


def everything(ranks):
    return {
        "sac": run_sac(ranks, DEALT[ranks.rank], shares),
        "sac in units": run_sac(ranks, DEALT[ranks.rank], shares, LayeredCritic),
        "sac kept": run_sac(ranks, DEALT[ranks.rank], kept, LayeredCritic),
        "sac reduced each": run_sac(ranks, DEALT[ranks.rank], reduced_each, LayeredCritic),
        "ppo": run_ppo(ranks, shares),
        "ppo in units": run_ppo(ranks, shares, LayeredActorCritic),
        "ppo kept": run_ppo(ranks, kept, LayeredActorCritic),
        "unlike": run_unlike_segments(ranks, shares),
        "unlike, whole": run_unlike_segments(ranks, None),
        "recomputed": run_recomputed(ranks, shares),
        "recomputed, whole": run_recomputed(ranks, None),
        "co-training": run_co_training(ranks, shares),
        "vla": run_vla(ranks, shares),
        "vla, whole": run_vla(ranks),
        "deep": run_deep(shares(ranks)),
        "deep, whole": run_deep(Replicated(ranks)),
        "bf16": run_bf16(ranks),
        "bf16, whole": run_deep(Replicated(ranks), autocast=True),
        "bad steps": run_bad_steps(ranks),
        "frozen": run_frozen(shares(ranks)),
        "frozen, whole": run_frozen(Replicated(ranks)),
        "sizes": run_sizes(ranks),
        "exchanges": run_exchanges(ranks),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(everything, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return {
        "sac": run_sac(ONE_RANK, SEEN),
        "sac in units": run_sac(ONE_RANK, SEEN, critic=LayeredCritic),
        "ppo": run_ppo(ONE_RANK),
        "co-training": run_co_training(ONE_RANK),
        "deep": run_deep(Replicated(ONE_RANK)),
    }


def moments(found):
    """exp_avg and exp_avg_sq of all parameters, as a `Stepper` has them."""
    return found["optimizer"]["state"][0]


def test_rows_are_dealt_out_in_order():
    for length in (0, 1, 2, 5, 6, 7):
        for size in (1, 2, 3, 4):
            parts = [list(range(length))[rows_of(length, rank, size)] for rank in range(size)]
            assert [row for part in parts for row in part] == list(range(length))
            assert [len(part) for part in parts] == [len(x) for x in _chunks(length, size)]


def _chunks(length, size):
    """As FSDP deals out rows."""
    chunks = torch.arange(length).chunk(size) if length else []
    return [*chunks, *[torch.empty(0)] * (size - len(chunks))]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("sac", "sac"),
        ("sac in units", "sac in units"),
        ("sac kept", "sac in units"),
        ("sac reduced each", "sac in units"),
    ],
)
def test_sac_ends_where_one_rank_does(two, alone, case, expected):
    found, expected = [rank[case] for rank in two], alone[expected]
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-6, atol=1e-9)
    start = make_sac(ONE_RANK, critic=LayeredCritic if case != "sac" else LinearCritic)
    assert not torch.allclose(start.actor.net.weight, found[0]["weights"]["actor"]["net.weight"], atol=1e-3)
    own = found[1]["weights"]
    assert own["actor"].keys() == {"norm.mean", "norm.var", "norm.count"} and not own["critic"], "rank 0 has the rest"
    for one, other, whole in zip(found[0]["metrics"], found[1]["metrics"], expected["metrics"], strict=True):
        assert one.keys() == other.keys() == whole.keys()
        for tag, value in whole.items():
            assert float(one[tag] + other[tag]) / 2 == pytest.approx(float(value), rel=1e-6), tag
            if tag.endswith("grad_norm"):
                assert one[tag] == other[tag]


@pytest.mark.parametrize("case", ["ppo", "ppo in units", "ppo kept"])
def test_ppo_ends_where_one_rank_does(two, alone, case):
    for first, second, expected in zip(two[0][case], two[1][case], alone["ppo"], strict=True):
        torch.testing.assert_close(first["weights"], expected["weights"], rtol=1e-5, atol=2e-6)
        assert len(first["metrics"]) == len(second["metrics"]) == len(expected["metrics"]) == 3
        for one, other, whole in zip(first["metrics"], second["metrics"], expected["metrics"], strict=True):
            assert one.keys() == other.keys() == whole.keys()
            for tag, value in whole.items():
                assert (one[tag] + other[tag]) / 2 == pytest.approx(value, rel=2e-4, abs=2e-6), tag


def test_demonstrations_beside_ppo_end_where_one_rank_does(two, alone):
    """Weights are gathered for both losses and one backward pass."""
    found, expected = [rank["co-training"] for rank in two], alone["co-training"]
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-5, atol=2e-6)
    assert [rank["batches"] for rank in found] == [expected["batches"]] * 2 == [9, 9]
    for one, other, whole in zip(*(run["metrics"] for run in found), expected["metrics"], strict=True):
        assert one.keys() == other.keys() == whole.keys() >= {"sft_loss", "ppo_loss", "actor/total_loss"}
        for tag in whole.keys() - {"loss_ratio"}:  # a quotient: its mean is not that of the means
            assert (one[tag] + other[tag]) / 2 == pytest.approx(whole[tag], rel=2e-4, abs=2e-6), tag


def test_a_vla_in_shares_learns_what_whole_ones_do(two):
    """With a frozen part, which is shared out as well, recomputed densities, and prefixes for both losses."""
    for found, whole in ((rank["vla"], rank["vla, whole"]) for rank in two):
        assert len(found["metrics"]) == len(whole["metrics"]) == 2
        for ours, theirs in zip(found["metrics"], whole["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    found, whole = two[0]["vla"]["weights"], two[0]["vla, whole"]["weights"]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert not [name for name in found if name.startswith(("model.vlm", "model.vision"))]


@pytest.mark.parametrize("case", ["unlike", "recomputed"])
def test_ranks_with_unlike_experience_make_equally_many_passes(two, case):
    for found, whole in ((rank[case], rank[f"{case}, whole"]) for rank in two):
        assert len(found["metrics"]) == len(whole["metrics"]) > 1
        assert found["metrics"][-1]["critic/value_loss"] == pytest.approx(
            whole["metrics"][-1]["critic/value_loss"], rel=1e-4
        )
    torch.testing.assert_close(two[0][case]["weights"], two[0][f"{case}, whole"]["weights"], rtol=1e-5, atol=2e-6)


def test_steps_on_micro_batches_are_those_of_one_rank(two, alone):
    """Also of parameters that no loss reaches: they decay. And what is saved of the optimizer is a `Stepper`'s."""
    found, expected = two[0]["deep"], alone["deep"]
    assert expected["weights"]["log_std"][0] < 0.998
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments(found["stepper"]), moments(expected["stepper"]), rtol=1e-4, atol=1e-8)
    assert found["stepper"]["optimizer"]["param_groups"] == expected["stepper"]["optimizer"]["param_groups"]
    assert found["norms"] == two[1]["deep"]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert two[1]["deep"]["weights"] == {} and two[1]["deep"]["stepper"] == {"steps": 4}


def test_each_rank_holds_half(two):
    whole = sum(p.numel() for p in Deep().parameters()) * 4
    weights = [rank["sizes"]["weights"] for rank in two]
    assert whole <= sum(weights) < 1.02 * whole, "rows that do not come out even are filled up"
    assert max(weights) < 0.51 * whole
    assert sum(rank["sizes"]["moments"] for rank in two) == 2 * whole
    for found in (rank["sizes"] for rank in two):
        assert found["gathered"] == 0, "nothing stays together after a step"
        assert found["computed with"] == {(64, 64)}


def test_a_unit_is_forgotten_or_kept_after_its_forward_pass(two):
    for found in (rank["sizes"] for rank in two):
        assert found["forgotten"] == 0
        assert found["kept"] == 64 * 64 * 4


def test_gradients_are_exchanged_once_for_all_micro_batches_or_for_each(two):
    """Deep has four units: three blocks and what is outside of them."""
    assert [rank["exchanges"] for rank in two] == [[2 * 4, 2 * 2 * 4]] * 2


def test_units_are_gathered_in_bfloat16_and_learned_in_float32(two, alone):
    for found in (rank["bf16"] for rank in two):
        assert found["units"] == {torch.bfloat16}
        assert found["masters"] == {torch.float32}
    found, whole = two[0]["bf16"], two[0]["bf16, whole"]
    torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-3, atol=1e-4)
    assert found["norms"] == pytest.approx(whole["norms"], rel=1e-3)
    assert found["norms"] != pytest.approx(alone["deep"]["norms"], rel=1e-5), "it was not float32"


def test_the_norm_that_is_clipped_is_that_of_the_whole_gradient(two):
    for norm, *_ in (rank["bad steps"] for rank in two):
        assert norm == pytest.approx(5.0)
    first = moments(two[0]["bad steps"][1])["exp_avg"]
    torch.testing.assert_close(first, 0.1 * torch.tensor([0.6, 0, 0, 0.8]), atol=1e-6, rtol=1e-5)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_the_step_of_all(two):
    for rank in two:
        assert math.isnan(rank["bad steps"][2])
    _, before, _, after, weights = two[0]["bad steps"]
    torch.testing.assert_close(moments(after), moments(before), rtol=0, atol=0)
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]]) - 3e-4 * torch.eye(2)
    torch.testing.assert_close(weights["weight"], expected, rtol=0, atol=1e-6)


def test_parts_that_are_not_trained_stay_as_they_are(two):
    found, whole = two[0]["frozen"], two[0]["frozen, whole"]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    start = Deep().state_dict()
    changed = {name for name, value in start.items() if not torch.equal(value, found[name])}
    assert changed == {"blocks.2.linear.weight", "blocks.2.linear.bias"}
