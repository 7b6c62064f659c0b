"""Makes the repository's modules importable, and leaves out slow tests unless they are asked for."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("cmi_pipeline") is None:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one full run of all members, for reading only, and what the run printed."""
    from test_road import good, run

    out = tmp_path_factory.mktemp("road") / "out"
    return out, good(run(out))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="minutes long; run with: python -m pytest -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
