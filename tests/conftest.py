"""Makes the repository's modules importable, and leaves out slow tests unless they are asked for."""

import fcntl
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("cmi_pipeline") is None:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of one full run of all members, for reading only, and what the run printed; the
    first process of pytest-xdist makes it. Keras is set up as somebody's other work may leave it."""
    from runs import good, run

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "road"
    folder.mkdir(exist_ok=True)
    printed = folder / "printed.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            (keras := folder / "keras").mkdir(exist_ok=True)
            other = {"backend": "jax", "floatx": "float16", "image_data_format": "channels_first"}
            (keras / "keras.json").write_text(json.dumps(other))
            ambient = {"KERAS_HOME": str(keras), "KERAS_BACKEND": "jax", "PYTHONPATH": ""}
            printed.write_text(good(run(folder / "out", STRICT="1", **ambient)))
    return folder / "out", printed.read_text()


@pytest.fixture(scope="session")
def plain(road: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of LightGBM alone, for reading only."""
    from runs import PLAIN, copied, run_here

    out = tmp_path_factory.mktemp("plain") / "out"
    copied(road[0], out, "torch_models", "keras_models", "report", "submission.parquet")
    assert run_here(out, **PLAIN) is None
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="minutes long; run with: python -m pytest -m slow")
    for item in items:
        if "slow" in item.keywords and not config.option.markexpr:
            item.add_marker(skip)
    # one process makes the road for the first file, the other meanwhile runs files without it
    of_road = {item.path for item in items if "road" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path, reverse=True)
    items.sort(key=lambda item: (item.path != max(of_road, default=None), item.path in of_road))
