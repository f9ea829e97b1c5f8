"""Number of moments per test, the shared fork server, and the summary at the end."""

import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.faults.harness.trials")

from tests.faults.harness.moments import Moment  # noqa: E402
from tests.faults.harness.requests import REQUESTS  # noqa: E402
from tests.faults.harness.runs import Server  # noqa: E402
from tests.faults.harness.trials import Lab  # noqa: E402

WORKERS = 2
TALLY: dict[str, Counter[str]] = defaultdict(Counter)
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]  # needs /proc, tmpfs and pidfds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=("short", "long"), default="short", help="Test a sample, or all faults.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "moments(short, long): number of runs with --faults=short or long")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that take a `moment`, by their mark."""
    if marker := metafunc.definition.get_closest_marker("moments"):
        count = marker.kwargs[metafunc.config.getoption("faults", "short")]
        metafunc.parametrize("moment", [Moment(index, count) for index in range(count)], ids=str)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all fault tests as slow; tests/checkpoint/test_store.py and tests/cli have a quick test of each kind."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for kind, counts in TALLY.items():
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common())
        terminalreporter.write_line(f"{kind}: {outcomes}")


@pytest.fixture(scope="session")
def length(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("faults", "short")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Return the lab, in a folder that all users can access: some runs belong to another user."""
    with tempfile.TemporaryDirectory(prefix="linfusion-faults-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with Server(folder) as server, ThreadPoolExecutor(WORKERS) as pool:
            lab = Lab(folder, server, pool, TALLY)
            warm = lab.create_trial("warming up", "phases")
            server.warm_up(REQUESTS["phases"].arguments, warm.folder)
            yield lab
            pool.shutdown(cancel_futures=True)


@pytest.fixture
def names(length: str) -> list[str]:
    """Return the names of the requests; a short session uses only some of them."""
    return ["png", "phases", "overwrite", "upscale"] if length == "long" else ["png", "phases"]
