"""Failures on a GPU: told at once, since a run may be stopped, and kept from spreading."""

import os
import sys

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--tell-at-once",
        action="store_true",
        help="print failures when they happen",
    )


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist
    if config.getoption("tell_at_once") and not is_worker:
        config.pluginmanager.register(FailuresAtOnce(config))
    if is_worker or config.getoption("dist", "no") == "no":
        config.pluginmanager.register(EndWithoutGPU(is_worker))


class FailuresAtOnce:
    def __init__(self, config):
        self._config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


class EndWithoutGPU:
    """Ends a process whose GPU refuses all work, as after an access outside of memory.

    Every later test would fail in it. pytest-xdist starts a new one for those. It blames the test
    that was about to begin; if the process ended before that, the failed one would be run again.
    """

    def __init__(self, is_worker):
        self._is_worker, self._failed = is_worker, None

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._failed = report.nodeid

    def pytest_runtest_logstart(self, nodeid):
        failed, self._failed = self._failed, None
        if failed is None or not gpu_is_lost():
            return
        told = f"the GPU refuses all work after {failed}"
        if not self._is_worker:
            pytest.exit(f"{told}: run the other tests by themselves")
        print(f"{told}: the next test is not to blame", file=sys.__stderr__, flush=True)
        os._exit(1)


def gpu_is_lost():
    """Whether a fault of earlier work stays for as long as this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    from measure import is_lost  # which conftest.py lets tests import

    return is_lost(torch.device("cuda"))
