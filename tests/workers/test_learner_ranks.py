"""Learner workers on two ranks: they report, stop, fail and save together, and are loaded by any number of ranks."""

import math
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rlinf.algorithms.optimize import OptimizerSettings, Stepper, load_generator
from rlinf.core.errors import CheckpointError, NonFiniteError, WorkerDied
from rlinf.core.ranks import ONE_RANK
from rlinf.data.replay import ReplayBuffer
from rlinf.runtime.local import Channel, Flag, Weights
from rlinf.runtime.ranks import join_ranks
from rlinf.workers.learner_worker import LearnerWorker, Progress
from rlinf.workers.state_files import load_state
from tests.data.counting import CountingSource, add, stored
from tests.ranks import run_ranks


class Estimator:
    """Learns the mean of the states that all ranks have seen."""

    def __init__(self, ranks):
        torch.manual_seed(0)
        self.ranks, self.layer, self.updates = ranks, nn.Linear(4, 1), 0
        self.stepper = Stepper(self.layer.parameters(), OptimizerSettings(lr=0.01), ranks)
        self.generator = torch.Generator().manual_seed(ranks.rank)
        self.buffer = ReplayBuffer(400 // ranks.size, generator=np.random.default_rng(ranks.rank))
        self.before_update = lambda: 1.0

    def observe(self, trajectory):
        add(self.buffer, trajectory)

    def ready(self):
        return self.ranks.all(len(self.buffer) > 0)

    def update(self):
        factor = self.before_update()
        state = self.buffer.sample(8).obs["state"]
        noise = torch.randn(8, 1, generator=self.generator)

        def loss_of(state):
            loss = (factor * self.layer(state) + noise).square().mean()
            return loss, {"fake/loss": loss.detach(), "fake/rank": float(self.ranks.rank)}

        self.updates += 1
        return self.stepper.descend(loss_of, [state])

    def acting_weights(self):
        return self.updates, {name: value.detach().clone() for name, value in self.layer.state_dict().items()}

    def state_dict(self):
        generators = self.ranks.gather(self.generator.get_state())
        return {"layer": self.layer.state_dict(), "stepper": self.stepper.state_dict(), "generators": generators}

    def load_state_dict(self, state):
        self.layer.load_state_dict(state["layer"])
        self.stepper.load_state_dict(state["stepper"])
        load_generator(self.generator, state, self.ranks)

    def buffers(self):
        return {"replay_buffer": self.buffer}


def make(ranks):
    return LearnerWorker(Estimator(ranks), Channel("experience"), Weights(), Flag(), ranks=ranks)


def feed(learner, source, segments):
    for i in range(segments):
        learner.experience.put(source.segment(4, continues=i > 0), key=learner.ranks.rank)


def weights(learner):
    return torch.cat([p.detach().flatten().clone() for p in learner.algorithm.layer.parameters()])


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing"


def learning(ranks, directory):
    """Rank 1 sees twice as much, and more of it is new."""
    learner, source = make(ranks), CountingSource(ranks.rank, 3, np.random.default_rng(ranks.rank))
    found = {"too early": learner.update(5)}
    feed(learner, source, 2 + 2 * ranks.rank)
    found["own"] = {"played": 3 * 4 * (2 + 2 * ranks.rank)}
    found["ingested"] = learner.ingest()
    found["own"] |= learner.algorithm.buffer.statistics()
    found["metrics"] = learner.update(4)
    found["published"] = learner.publish()
    found["weights"] = learner.weights.newer_than(-1)
    learner.save(directory)
    found["saved"] = weights(learner)
    found["transitions"] = stored(learner.algorithm.buffer)

    # What follows the save is the same in a learner that has loaded it.
    learner.algorithm.buffer.load(str(directory / "buffers" / "replay_buffer" / f"rank_{ranks.rank}"))
    again = make(ranks)
    found["loaded"] = again.load(directory)
    found["metrics afterwards"] = [
        {tag: value for tag, value in each.update(3).items() if not tag.startswith("staleness")}
        for each in (learner, again)
    ]
    found["weights afterwards"] = [weights(each) for each in (learner, again)]
    return found


def stopping(ranks):
    """Only rank 1 is told to stop, during its second update."""
    learner = make(ranks)
    feed(learner, CountingSource(0, 3, np.random.default_rng()), 1)
    learner.ingest()

    def tell():
        if ranks.rank == 1 and learner.algorithm.updates == 1:
            learner.stop.set("test")
        return 1.0

    learner.algorithm.before_update = tell
    learner.update(100)
    return learner.report()


def failing(ranks, directory):
    """The loss of rank 1 is not finite in its third update; later a weight is not."""
    learner = make(ranks)
    feed(learner, CountingSource(0, 3, np.random.default_rng()), 1)
    learner.ingest()
    learner.algorithm.before_update = lambda: math.nan if (ranks.rank, learner.algorithm.updates) == (1, 2) else 1.0
    found = {"loss": raised(NonFiniteError, lambda: learner.update(5))}
    found["published after"] = learner.publish()
    if ranks.rank == 1:
        with torch.no_grad():
            learner.algorithm.layer.bias[0] = math.nan
    found["publish"] = raised(NonFiniteError, learner.publish)
    found["save"] = raised(CheckpointError, lambda: learner.save(directory / "never"))
    return found


def hanging(ranks, directory):
    """Rank 1 does not come to where rank 0 waits for it. They meet over TCP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = ranks.gather(free.getsockname()[1])[0]
    ranks.leave()
    ranks = join_ranks(ranks.rank, ranks.size, f"127.0.0.1:{port}", timeout_s=1)
    over = directory / "waited"
    found = None
    if ranks.rank == 0:
        started = time.monotonic()
        found = raised(WorkerDied, make(ranks).ready), time.monotonic() - started
        over.touch()
    while not over.exists():
        time.sleep(0.01)
    ranks.leave()
    return found


def dying(ranks, directory):
    ranks = join_ranks(ranks.rank, ranks.size, f"file://{directory}/dying", timeout_s=100)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    return raised(WorkerDied, make(ranks).ready), time.monotonic() - started


def everything(ranks, directory, of_one):
    directory = Path(directory)
    resumed = make(ranks)
    found = {
        "learning": learning(ranks, directory / "of_two"),
        "stopping": stopping(ranks),
        "failing": failing(ranks, directory),
        "of one": (resumed.load(Path(of_one)), weights(resumed), stored(resumed.algorithm.buffer)),
        "after that": (resumed.update(2)["fake/loss"], weights(resumed)),
    }
    both = ranks.gather(found)
    return both, hanging(ranks, directory), dying(ranks, directory)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(results of both ranks, what a rank says of one that hangs, and of one that died, the directory)."""
    directory = tmp_path_factory.mktemp("ranks")
    for name in ("of_one", "of_two"):
        (directory / name).mkdir()
    alone = make(ONE_RANK)
    feed(alone, CountingSource(0, 3, np.random.default_rng(3)), 6)
    alone.ingest()
    alone.update(3)
    alone.save(directory / "of_one")
    results = run_ranks(everything, directory, str(directory), str(directory / "of_one"), dying=[1])
    return *results[0], directory, alone


def test_ranks_report_the_same_of_all_experience(run):
    both = [found["learning"] for found in run[0]]
    assert [found["too early"] for found in both] == [{f"replay_buffer/{tag}": 0.0 for tag in STATISTICS}] * 2
    assert [found["ingested"] for found in both] == [Progress(env_steps=sum(f["own"]["played"] for f in both))] * 2
    metrics, own = both[0]["metrics"], [found["own"] for found in both]
    assert metrics == both[1]["metrics"]
    assert metrics["fake/rank"] == 0.5
    assert metrics["replay_buffer/size"] == own[0]["size"] + own[1]["size"]
    assert metrics["replay_buffer/utilization"] == (own[0]["utilization"] + own[1]["utilization"]) / 2
    assert metrics["replay_buffer/max_reward"] == max(part["max_reward"] for part in own)
    assert metrics["replay_buffer/min_reward"] == min(part["min_reward"] for part in own)
    assert metrics["staleness/max"] <= 0


STATISTICS = ("size", "utilization", "max_reward", "min_reward", "mean_reward", "std_reward")


def test_only_rank_0_publishes(run):
    both = [found["learning"] for found in run[0]]
    assert [found["published"] for found in both] == [4, 4]
    assert both[0]["weights"][0] == 4
    assert both[1]["weights"] is None


def test_ranks_keep_the_same_weights_and_resume_where_they_were(run):
    both = [found["learning"] for found in run[0]]
    assert torch.equal(both[0]["saved"], both[1]["saved"])
    assert [found["loaded"] for found in both] == [Progress(both[0]["ingested"].env_steps, 4)] * 2
    for found in both:
        straight, resumed = found["weights afterwards"]
        assert torch.equal(straight, resumed) and not torch.equal(straight, found["saved"])
        assert found["metrics afterwards"][0] == found["metrics afterwards"][1]


def test_a_checkpoint_of_two_ranks_has_one_learner_and_two_parts_of_the_buffer(run):
    directory = run[3] / "of_two"
    assert sorted(path.name for path in directory.iterdir()) == ["buffers", "learner.pt", "model.safetensors"]
    assert sorted(path.name for path in (directory / "buffers/replay_buffer").iterdir()) == ["rank_0", "rank_1"]
    assert load_state(directory / "learner.pt")["ranks"] == 2


def test_one_rank_goes_on_where_two_were(run):
    both, directory = [found["learning"] for found in run[0]], run[3]
    learner = make(ONE_RANK)
    assert learner.load(directory / "of_two") == both[0]["loaded"]
    assert torch.equal(weights(learner), both[0]["saved"])
    assert stored(learner.algorithm.buffer) == both[0]["transitions"] | both[1]["transitions"]
    assert math.isfinite(learner.update(2)["fake/loss"])


def test_two_ranks_go_on_where_one_was(run):
    alone = run[4]
    shares = []
    for progress, loaded, share in (found["of one"] for found in run[0]):
        assert progress == alone.report()
        assert torch.equal(loaded, weights(alone))
        shares.append(share)
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == stored(alone.algorithm.buffer)
    (loss, one), (other_loss, other) = (found["after that"] for found in run[0])
    assert loss == other_loss
    assert torch.equal(one, other) and not torch.equal(one, weights(alone))


def test_ranks_stop_after_the_same_update(run):
    assert [found["stopping"].updates for found in run[0]] == [2, 2]


def test_what_is_not_finite_on_one_rank_fails_on_all(run):
    for found in (found["failing"] for found in run[0]):
        assert "train/fake/loss is nan at update 3" in found["loss"]
        assert found["published after"] == 5, "the weights were spared"
        assert "weights 'bias' of the policy are not finite" in found["publish"]
        assert "'layer/bias' of the learner is not finite" in found["save"]


def test_a_rank_that_hangs_or_dies_makes_the_others_fail_in_time(run):
    _, hanging, dying, _, _ = run
    for (message, seconds), limit_s in ((hanging, 20), (dying, 60)):
        assert message.startswith("rank 0 of 2 waited in vain for the other ranks of the learner")
        assert seconds < limit_s
