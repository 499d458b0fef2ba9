"""What all tests share: processes on Ray, the order of a run, and what a run may leave out.

With `--may-skip REASON`, a test that is skipped for any other reason fails.
"""

from __future__ import annotations

import ctypes.util
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rlinf.runtime.interface import Runtime
    from rlinf.runtime.ray_backend import RayRuntime

# ManiSkill imports MuJoCo too, which then draws through what is chosen by now.
if ctypes.util.find_library("EGL") is not None:
    os.environ.setdefault("MUJOCO_GL", "egl")

TESTS = Path(__file__).parent
LOOPBACK = "127.0.0.1"

RAY_FILES = (
    "loops/test_whole_runs.py",
    "runtime/test_backends.py",
    "launch/test_processes.py",
    "envs/test_egl_devices.py",
    "launch/test_cell_run.py",
)
"""They wait more than they work. They share one cluster and its processes."""
CONTRACT_FILES = ("contracts/test_envs.py",)
"""They share the environments, which take long to make."""
RANKS_FILES = (
    "algorithms/test_fsdp.py",
    "launch/test_build_ranks.py",
    "workers/test_learner_fsdp.py",
    "algorithms/test_dsrl_na.py",
    "algorithms/test_ranks.py",
    "workers/test_learner_ranks.py",
)
"""They share the process that their ranks are forked from (`ranks.py`)."""
MANISKILL_FILES = (
    "envs/test_maniskill.py",
    "envs/test_maniskill_twin.py",
    "envs/test_maniskill_fast.py",
    "benchmarks/test_benchmark_co_training.py",
)
"""They share ManiSkill, which takes seconds to be imported."""
GROUPS = {
    "ray": RAY_FILES,
    "contracts": CONTRACT_FILES,
    "ranks": RANKS_FILES,
    "maniskill": MANISKILL_FILES,
    "machines": ("runtime/test_cluster.py",),
    "house": ("test_house.py",),
}
"""Files whose tests run in one process (`--dist loadgroup`), with what they share."""
LONGEST_FIRST = (
    *RAY_FILES,
    *CONTRACT_FILES,
    "benchmarks/test_benchmarks.py",
    "learning/test_policies_learn.py",
    "test_fresh_clone.py",
    *MANISKILL_FILES,
    *RANKS_FILES,
    "launch/test_recipes.py",
    "launch/test_run.py",
    "envs/realworld/test_safety_properties.py",
    "runtime/test_cluster.py",
    "envs/test_libero.py",
    "envs/test_subproc.py",
    "data/test_lerobot_faults.py",
    "launch/test_co_training_openpi.py",
    "examples/test_tutorial.py",
    "test_conftest.py",
    "runners/test_interrupt.py",
    "test_house.py",
)
"""Files that take long begin early, so that at the end of a run no process is left alone with one."""


@pytest.fixture
def fewer_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing curves would take more time than training does in tests."""
    from rlinf.metrics.report import LearningCurve

    if "picture" not in request.node.name:
        monkeypatch.setattr(LearningCurve, "_draw", lambda self: None)


@pytest.fixture(scope="session")
def ray_machine() -> Iterator[Any]:
    """The machine of a Ray cluster of one, with four GPUs that are not there."""
    ray = pytest.importorskip("ray")
    from rlinf.runtime.cluster import joined

    os.environ.setdefault("RAY_worker_niceness", "0")  # as `cluster` has it, or other tests come first
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init("local", num_cpus=2, num_gpus=4, _node_ip_address="127.0.0.1", object_store_memory=300 << 20, **quiet)
    with joined() as [machine]:
        yield machine
    ray.shutdown()


@pytest.fixture(scope="session")
def processes_on_ray(ray_machine: Any) -> Iterator[RayRuntime]:
    """Four processes for all tests, which take seconds to start; see `on_ray`."""
    from rlinf.runtime.ray_backend import RayRuntime, Seat

    runtime = RayRuntime([Seat(f"process {i}", ray_machine.node_id, LOOPBACK) for i in range(4)])
    yield runtime
    runtime.close()


@pytest.fixture
def on_ray(processes_on_ray: RayRuntime) -> RayRuntime:
    """A runtime with four processes, which a test may kill. It names its channels and weights as no other test does."""
    from tests.revival import all_alive

    return all_alive(processes_on_ray)


@pytest.fixture(params=["local", "ray"])
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """The runtime of each backend; with up to four processes."""
    from rlinf.runtime.local import LocalRuntime

    if request.param == "ray":
        yield request.getfixturevalue("on_ray")
        return
    local = LocalRuntime()
    yield local
    local.close()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the test files import stays until the end: looking through it for garbage takes a quarter of the time that
    importing takes, and again each time that an environment is closed.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    names = {item: item.path.relative_to(TESTS).as_posix() for item in items if item.path.is_relative_to(TESTS)}
    items.sort(key=lambda item: ranks.get(names.get(item, ""), len(ranks)))


def group_of(nodeid: str) -> str:
    """The group of a test's file; a test of no group is one by itself."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, files in GROUPS.items() if file in files), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups by file: since pytest 9.2, xdist 3.8 does not see its own marks and scatters what belongs together."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--may-skip",
        action="append",
        metavar="REASON",
        help="fail what is skipped, unless its reason holds this text; may be given several times",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    return judged((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return judged((yield), collector.config)


def judged(report, config: pytest.Config):
    """The report itself, or as a failure when it was skipped for a reason that this run does not accept."""
    allowed = config.getoption("--may-skip")
    if allowed is None or not report.skipped or hasattr(report, "wasxfail"):
        return report
    _, _, reason = report.longrepr
    if not any(text in reason for text in allowed):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} must not be skipped in this run. {reason}"
    return report
