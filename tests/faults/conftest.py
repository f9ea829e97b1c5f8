"""How many moments there are, the server that all tests share, and what is said at the end."""

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
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]  # /proc, tmpfs, handles of processes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", choices=("short", "long"), default="short", help="A sample of the faults, or all.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "moments(short, long): how often a test of faults runs in either length")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `moment` runs as often as its mark says."""
    if marker := metafunc.definition.get_closest_marker("moments"):
        count = marker.kwargs[metafunc.config.getoption("faults", "short")]
        metafunc.parametrize("moment", [Moment(index, count) for index in range(count)], ids=str)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All faults are slow. Of their kinds, tests/checkpoint/test_store.py and tests/cli have a quick one each."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for kind, counts in TALLY.items():
        found = ", ".join(f"{what} {count}" for what, count in counts.most_common())
        terminalreporter.write_line(f"{kind}: {found}")


@pytest.fixture(scope="session")
def length(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("faults", "short")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """In a folder that everybody may enter: some runs are another user's."""
    with tempfile.TemporaryDirectory(prefix="linfusion-faults-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with Server(folder) as server, ThreadPoolExecutor(WORKERS) as pool:
            lab = Lab(folder, server, pool, TALLY)
            warm = lab.trial("warming up", "phases")
            server.warm_up(REQUESTS["phases"].arguments, warm.folder)
            yield lab
            pool.shutdown(cancel_futures=True)


@pytest.fixture
def names(length: str) -> list[str]:
    """The requests of the trials: a short session has no time for all of them."""
    return ["png", "phases", "overwrite", "upscale"] if length == "long" else ["png", "phases"]
