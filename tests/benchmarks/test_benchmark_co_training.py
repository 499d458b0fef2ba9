"""The benchmark of RL-Co's costs prints its tables; its updates are PPO's with and without demonstrations."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("co_training")
    monkeypatch.setattr(module, "print_setting", lambda threads: None)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # both would outlast the test
    monkeypatch.setattr(module, "choose_float32_products", lambda: None)
    return module


def test_it_prints_its_tables_and_the_cost(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["co_training.py", "--quick"])
    bench.main()
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 100] == []
    for line in ("ppo alone  ", "co-training  ", "co-training costs", "bare  ", "rlinf  "):
        assert line in out


def test_a_row_learns_from_demonstrations_and_the_other_does_not(bench: ModuleType) -> None:
    small = ["algorithm.update_epoch=3", "algorithm.critic_warmup_steps=0"]
    config = bench.configuration(*small, "actor.global_batch_size=4", "actor.micro_batch_size=2")
    for beside in (False, True):
        ppo = bench.learner(config, num_envs=2, decisions=2, beside=beside)
        assert ("sft_loss" in ppo.update()) == beside
        assert (ppo.demonstrations is not None and ppo.demonstrations.batches == 4) == beside
