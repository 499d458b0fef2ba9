"""The scaling model: by hand, in its limits, and as the document shows it."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("saturation", ROOT / "benchmarks/saturation.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_document_shows_what_the_script_computes(model):
    text = (ROOT / "docs/scaling.md").read_text()
    assert all(line in text.splitlines() for line in model.table())


def test_a_recipe_by_hand(model):
    """32 environments on two GPUs: 16 to each, on 16 cores."""
    recipe = model.Recipe(
        step_s=1e-3, draw_s=2e-3, answer_flops=0, answer_kernels=1000, update_flops=0, update_kernels=500,
        gradients=0, weights=100e6,
    )  # fmt: skip
    sizes = model.Sizes(32, chunk=5, decisions=10, updates=4, batch=64, in_turns=True, asynchronous=False)
    found = model.expect(recipe, sizes, 2)
    parts = {"env stepping": 0.05, "rendering": 0.02, "policy": 0.0622, "learner": 0.012, "weight sync": 0.126}
    parts["interconnect"] = 4 * 2 * 6e-6
    assert found.parts == pytest.approx(parts)
    assert found.rate == pytest.approx(32 * 5 * 10 / sum(parts.values()))
    assert found.narrow().startswith("weight sync 47%")
    overlapped = model.expect(recipe, model.replace(sizes, in_turns=False), 2)
    assert set(overlapped.parts) == {"env stepping", "rendering", "policy", "weight sync"}, "learning is hidden"
    alone = model.expect(recipe, model.replace(sizes, asynchronous=True, in_turns=False), 2)
    assert "weight sync" not in alone.parts
    one = model.expect(recipe, sizes, 1)
    assert one.parts["env stepping"] == pytest.approx(0.1), "two environments to a core"
    assert one.parts["interconnect"] == 0


def test_work_that_is_computed_is_shared_and_what_a_robot_does_is_not(model):
    sizes = model.Sizes(64, chunk=1, decisions=1, updates=1, batch=64, in_turns=True, asynchronous=False)
    computing = model.Recipe(
        step_s=0, draw_s=0, answer_flops=1e12, answer_kernels=0, update_flops=2e12, update_kernels=0,
        gradients=1e9, weights=0, large=True,
    )  # fmt: skip
    one, many = (model.expect(computing, sizes, count).parts for count in (1, 64))
    assert one["learner"] == pytest.approx(64 * many["learner"]) == pytest.approx(64 * 2e12 / (989e12 * 0.4))
    assert one["policy"] - model.OVERHEAD_S == pytest.approx(64 * (many["policy"] - model.OVERHEAD_S))
    assert many["interconnect"] == pytest.approx(2 * 63 / 64 * 1e9 / 40e9 + 12e-6 * 6)
    assert model.expect(computing, sizes, 128).used == 64, "no more processes than environments"
    robot = model.replace(computing, control_hz=10.0, update_flops=0, gradients=0)
    assert model.expect(robot, model.replace(sizes, envs=1), 8).rate == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize(("rate", "text"), [(328.7, "330"), (2_860_123, "2,900,000"), (1.26, "1.3")])
def test_rates_have_two_digits(model, rate, text):
    assert model.rounded(rate) == text
