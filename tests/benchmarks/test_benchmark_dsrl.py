"""The benchmark of DSRL's updates prints its tables, and compares the same sizes."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_dsrl_updates_prints_its_tables_and_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("dsrl_updates")
    monkeypatch.setattr("sys.argv", ["dsrl_updates.py", "--quick"])
    monkeypatch.setattr(bench, "print_setting", lambda threads: None)
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)  # both would outlast the test
    monkeypatch.setattr(bench, "choose_float32_products", lambda: None)
    bench.main()
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 100] == []
    assert "maniskill: state 42, noise 4, batch 16" in out and "libero: state 8, noise 32, batch 16" in out
    for line in ("dsrl costs", "dsrl-na costs", "dsrl and picture costs", "image encoders costs"):
        assert line in out


def test_the_peer_has_the_same_critics_but_for_their_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("dsrl_updates")
    free = ["actor.model.model_path=null", "actor.model.openpi.size=tiny", "actor.model.openpi.dsrl_camera=null"]
    spaces = bench.spaces_of(8, 7, camera=True)
    config, ours = bench.steered("libero_spatial_dsrl_openpi", spaces, 16, 64, *free)
    theirs = bench.plain(config, 8, 64)
    shapes = [[tuple(p.shape) for p in learner.critic.q.parameters()] for learner in (ours, theirs)]
    assert (shapes[0].pop(0), shapes[1].pop(0)) == ((10, 64 + 32, 128), (10, 8 + 32, 128))
    assert shapes[0] == shapes[1]
    for name in ("batch_size", "micro_batch_size", "agg_q", "actor_agg_q", "backup_entropy", "critic_actor_ratio"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.actor.noise_shape == theirs.actor.noise_shape == (32,)
