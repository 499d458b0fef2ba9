"""What a test run may leave out: with `--may-skip REASON`, a test that is skipped for any other reason fails."""

import pytest


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
