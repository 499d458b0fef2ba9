import json

import numpy as np
import pytest
import torch

from rlinf.core.errors import DataError
from rlinf.models.embodiment.openpi.norm_stats import (
    NormStats,
    compute_norm_stats,
    mixed_norm_stats,
    read_norm_stats,
    write_norm_stats,
)

CONTENT = {
    "norm_stats": {
        "state": {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": [-1.0, 0.0], "q99": [1.0, 4.0]},
        "actions": {"mean": [0.5], "std": [0.25], "q01": None, "q99": None},
    }
}


def put(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("place", ["", "physical-intelligence/libero/", "assets/physical-intelligence/libero/"])
def test_openpis_file_is_found_and_read(tmp_path, place):
    file = put(tmp_path / f"{place}norm_stats.json")
    for path in (tmp_path, file):
        stats = read_norm_stats(path, "physical-intelligence/libero")
        assert stats.keys() == {"state", "actions"}
        assert stats["state"].q99.tolist() == [1, 4] and stats["state"].std.dtype is torch.float64
        assert stats["actions"].q01 is None and stats["actions"].size == 1


def test_round_trip(tmp_path):
    written = {"state": compute_norm_stats(torch.randn(50, 3)), "actions": NormStats(torch.ones(1), torch.ones(1))}
    file = write_norm_stats(written, tmp_path / "a" / "b")
    assert file == tmp_path / "a/b/norm_stats.json" and not list(file.parent.glob("*.part"))
    assert json.loads(file.read_text())["norm_stats"].keys() == {"state", "actions"}
    for name, stats in read_norm_stats(file).items():
        for key, vector in vars(stats).items():
            expected = getattr(written[name], key)
            assert (vector is None and expected is None) or torch.equal(vector, expected.double())


def test_statistics_are_numpys():
    x = np.random.default_rng(0).normal(size=(7, 211, 3)).astype(np.float32) * [1, 5, 0.1] + [0, 2, -1]
    stats = compute_norm_stats(torch.from_numpy(x))
    rows = x.reshape(-1, 3)
    for found, expected in (
        (stats.mean, rows.mean(0)),
        (stats.std, rows.std(0)),
        (stats.q01, np.quantile(rows, 0.01, axis=0)),
        (stats.q99, np.quantile(rows, 0.99, axis=0)),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_affine_by_hand():
    stats = NormStats(*(torch.tensor([x], dtype=torch.float64) for x in (3.0, 2.0, -1.0, 5.0)))
    offset, scale = stats.affine(quantiles=False)
    assert (offset.item(), scale.item()) == (3.0, 2.0 + 1e-6)
    offset, scale = stats.affine(quantiles=True)
    for x, y in ((-1.0, -1.0), (5.0 + 1e-6, 1.0), (2.0 + 5e-7, 0.0), (8.0, 2.0)):
        assert ((x - offset) / scale).item() == pytest.approx(y, abs=1e-6)


def test_missing_quantiles_are_named():
    with pytest.raises(DataError, match="no q01 and q99"):
        NormStats(torch.zeros(1), torch.ones(1)).affine(quantiles=True)


def test_places_that_were_tried_are_named(tmp_path):
    with pytest.raises(DataError, match=r"/norm_stats.json or .*/robot/norm_stats.json or .*/assets/robot/norm_stats"):
        read_norm_stats(tmp_path, "robot")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not openpi's norm_stats.json"),
        ({"state": {}}, "is not openpi's norm_stats.json"),
        ({"norm_stats": {"state": 3}}, "is not openpi's norm_stats.json"),
        ({"norm_stats": {"state": {"mean": [0.0]}}}, "state lacks mean or std"),
        ({"norm_stats": {"state": {"mean": [0.0], "std": [1.0, 2.0]}}}, "state.std is not a list of 1 finite"),
        ({"norm_stats": {"state": {"mean": ["a"], "std": [1.0]}}}, "is not openpi's norm_stats.json"),
        ('{"norm_stats": {"state": {"mean": [NaN], "std": [1.0]}}}', "state.mean is not a list of 1 finite"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, content, said):
    put(tmp_path / "norm_stats.json", content)
    with pytest.raises(DataError, match=said):
        read_norm_stats(tmp_path)


@pytest.mark.parametrize("x", [torch.zeros(1, 3), torch.full((4, 2), torch.nan)])
def test_statistics_of_too_little_are_refused(x):
    with pytest.raises(DataError, match="two rows or more"):
        compute_norm_stats(x)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match="could not be written"):
        write_norm_stats({}, tmp_path / "taken")


def test_statistics_of_a_mixture_are_those_of_what_is_drawn():
    generator = torch.Generator().manual_seed(3)
    many, few = torch.randn(900, 2, generator=generator), 5 + 2 * torch.randn(30, 2, generator=generator)
    found = mixed_norm_stats([many, few], [1, 3])
    drawn = compute_norm_stats(torch.cat([many] + [few] * 90))  # 900 of one, 2700 of the other
    assert torch.allclose(found.mean, drawn.mean) and torch.allclose(found.std, drawn.std)
    assert torch.allclose(found.q01, drawn.q01, atol=0.03) and torch.allclose(found.q99, drawn.q99, atol=0.15)
    assert float(found.mean[0]) > 3.5, "not the 0.16 of the rows together"


def test_a_mixture_by_rows_is_all_rows_and_equal_weights_change_nothing():
    parts = [torch.arange(20.0).view(10, 2), -torch.arange(20.0).view(10, 2)]
    expected = compute_norm_stats(torch.cat(parts))
    for found in (mixed_norm_stats(parts), mixed_norm_stats(parts, [2, 2])):
        for name, value in vars(expected).items():
            assert torch.allclose(vars(found)[name], value, atol=1e-12), name
    alone = mixed_norm_stats(parts[:1], [7])
    assert torch.equal(alone.q01, compute_norm_stats(parts[0]).q01)
    with pytest.raises(DataError, match="vectors of 2 and 3 numbers"):
        mixed_norm_stats([torch.zeros(4, 2), torch.zeros(4, 3)], [1, 1])
