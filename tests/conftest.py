"""What must be set before anything is imported; and which tests `make test-quick` leaves out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Triton's interpreter runs the CUDA kernels without a GPU. Triton reads this once, on import.
# `make test-gpu` sets 0, because it runs them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes depends on the machine; each test has its own limit.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

ROOT = Path(__file__).parent
SLOW = (
    "benchmarks",
    "coordinator/stores/test_postgres_coordinators.py",
    "coordinator/stores/test_postgres_partition.py",
    "coordinator/stores/test_postgres_store.py",
    "core/zo/noise/test_cuda_code.py",
    "core/zo/test_devices.py",
    "demo",
    "deploy",
    "experiments",
    "faults",
    "fuzz",
    "gpu",
    "integration",
    "integrations",
    "sim",
)
"""Folders and modules whose tests take more than a second, but for those marked `quick`."""


def own_levels() -> dict[str, int]:
    """Level of the root logger and of each of ours that exists, by name."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("fedmezo")]
    return {name: logging.getLogger(name).level for name in [logging.root.name, *names]}


@pytest.fixture(autouse=True)
def logging_levels() -> Iterator[None]:
    """Give each test the same logging levels: a program that ran inside a test sets them."""
    before = own_levels()
    yield
    for name in own_levels():
        logging.getLogger(name).setLevel(before.get(name, logging.NOTSET))


class _SaysFailuresAtOnce:
    """Prints each failure as it happens: a run that is ended from outside prints no summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Say which test failed, after how long, and the first line of why."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why, *_ = (crash.message if crash else report.longreprtext).splitlines() or [""]
            self._terminal.write_line(
                f"\n{report.nodeid} failed in {report.when} after {report.duration:.1f} s: {why}"
            )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Print failures at once, in the one process that prints."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_SaysFailuresAtOnce(terminal))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow as a whole; single slow tests carry the mark themselves."""
    for item in items:
        path = item.path.relative_to(ROOT)
        is_slow = any(path.is_relative_to(slow) for slow in SLOW)
        if is_slow and item.get_closest_marker("quick") is None:
            item.add_marker(pytest.mark.slow)
