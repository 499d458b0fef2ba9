"""What a test run may leave out: with `--may-skip REASON`, a test that is skipped for any other reason fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rlinf.runtime.interface import Runtime

LOOPBACK = "127.0.0.1"


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


@pytest.fixture(scope="module", params=["local", "ray"])
def make_runtime(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Runtime]]:
    """The runtime of a module with so many processes; once for each backend."""
    from rlinf.runtime.local import LocalRuntime

    made: dict[int, Runtime] = {}

    def make(processes: int) -> Runtime:
        if processes not in made:
            made[processes] = LocalRuntime() if request.param == "local" else start(processes)
        return made[processes]

    def start(processes: int) -> Runtime:
        from rlinf.runtime.ray_backend import RayRuntime, Seat

        machine = request.getfixturevalue("ray_machine")
        return RayRuntime([Seat(f"process {i}", machine.node_id, LOOPBACK) for i in range(processes)])

    yield make
    for runtime in made.values():
        runtime.close()


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
