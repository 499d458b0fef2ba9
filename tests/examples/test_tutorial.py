import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "tutorial" / "sac_in_one_file.py"


@pytest.fixture
def tutorial() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sac_in_one_file", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arguments", [[], ["--flow"]])
def test_both_policies_run(tutorial: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(tutorial, "SEGMENTS", 10)
    monkeypatch.setattr(tutorial, "UPDATES", 2)
    assert 0 <= tutorial.main(arguments) <= 1


@pytest.mark.slow
def test_the_gaussian_policy_learns(tutorial: ModuleType) -> None:
    assert tutorial.main([]) > 0.95


def test_it_needs_no_worker_runner_or_configuration() -> None:
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlinf.")
    }
    assert imported <= {"functional", "algorithms", "models", "envs", "data", "core"}
