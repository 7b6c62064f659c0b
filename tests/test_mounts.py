"""Kaggle's folders, as they were in 2025 and are today: training, attaching its models, re-run, in
a private mount namespace by `unshare -rm`."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from runs import ALIKE, QUICK, ROOT, SCRIPT, call, clean_environment, copied, good
from test_dataset import contents

import cmi_simulator
import make_kaggle_dataset

SLUG = "cmi-detect-behavior-with-sensor-data"
INSIDE = """
set -e
new=$1; shift
mount -t tmpfs none "$new"
for path in /*; do
    if [ -L "$path" ]; then cp -P "$path" "$new$path"
    elif [ -d "$path" ] && [ "$path" != /kaggle ]; then
        mkdir "$new$path"; mount --rbind "$path" "$new$path"
    fi
done
while [ "$1" != -- ]; do
    mkdir -p "$new$3"; mount --bind -o "$1" "$2" "$new$3"; shift 3
done
shift
exec chroot "$new" sh -c 'cd /kaggle/working; exec "$@"' sh "$@"
"""
SETTINGS = {**QUICK, **ALIKE, "N_FOLDS": "2", "LGBM_ROUNDS": "25", "LGBM_LR": "0.1"}
SETTINGS |= {"CMI_WORKERS": "2"}  # side by side, whatever the script is called
LAYOUTS = {  # where the competition and the data set "cmi-bundles" of "some-one" are mounted
    "2025": (SLUG, "cmi-bundles"),
    "today": (f"competitions/{SLUG}", "datasets/some-one/cmi-bundles"),
}


class Machine:
    """A notebook's machine: what is attached, by its place below /kaggle/input, and its output."""

    def __init__(self, folder: Path, attached: dict[str, Path]) -> None:
        self.working, self.root = folder / "working", folder / "root"
        script = folder / "src" / "script.py"
        for own in (self.working, self.root, script.parent):
            own.mkdir(parents=True)
        shutil.copy(SCRIPT, script)
        mounts = [("rw", self.working, "/kaggle/working"), ("ro", script.parent, "/kaggle/src")]
        mounts += [("ro", source, f"/kaggle/input/{place}") for place, source in attached.items()]
        self.mounts = sum(mounts, ())

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Python with these words, in the working folder; it draws no report."""
        hidden = {"PYTHONPATH": str(ROOT / "tests" / "without_matplotlib")}
        inside = ["sh", "-c", INSIDE, "sh", self.root, *self.mounts, "--", "python", *words]
        env = {**clean_environment(), **SETTINGS, **hidden, **settings}
        return call("unshare", "-rm", *inside, env=env)

    def answers(self, name: str = "submission.parquet") -> Sequence[tuple[str, str]]:
        return sorted(pl.read_parquet(self.working / name).rows())


@pytest.fixture(scope="module")
def competition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = Machine(tmp_path_factory.mktemp("probe"), {}).run("-c", "")
    if probe.returncode:
        pytest.skip(f"no private mount namespace here: {probe.stderr.strip()}")
    folder = tmp_path_factory.mktemp("mounts") / "competition"
    cmi_simulator.simulate(folder, subjects=6, test_subjects=1, recordings_per_subject=18, seed=3)
    (folder / "test_truth.csv").unlink()
    copied(ROOT / "kaggle_evaluation", folder / "kaggle_evaluation", "__pycache__")
    return folder


@pytest.fixture(scope="module")
def trained(competition: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = Machine(tmp_path_factory.mktemp("trained"), {SLUG: competition})
    good(machine.run("/kaggle/src/script.py"))
    assert not list(machine.working.glob("simulated-*"))
    assert (machine.working / "lgbm_models" / "bundle.json").is_file()
    assert len({gesture for _, gesture in machine.answers()}) > 3
    return machine


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(competition: Path, trained: Machine, tmp_path: Path, layout: str) -> None:
    (data, bundle), dataset = LAYOUTS[layout], trained.working  # as New Dataset on the Output tab
    if layout == "today":
        dataset = tmp_path / "dataset"
        words = [str(trained.working), str(dataset), "--slug", "some-one/cmi-bundles"]
        make_kaggle_dataset.main(words)
    attached, before = {data: competition, bundle: dataset}, contents(dataset)

    machine = Machine(tmp_path / "plain", attached)
    good(machine.run("/kaggle/src/script.py"))
    assert not list(machine.working.glob("*_models"))  # nothing was trained
    assert machine.answers() == trained.answers()

    package = f"/kaggle/input/{data}"
    words = "-m", "kaggle_evaluation.dry_run", "--test-dir", package, "--all-sensors"
    words += "--working-dir", ".", "--output-dir", "gateway", "/kaggle/src/script.py"
    asked = good(machine.run(*words, PYTHONPATH=package, STRICT="1"))
    assert "passed: 18 valid answers" in asked
    assert machine.answers("gateway/submission.parquet") == trained.answers()
    assert not list(machine.working.glob("*_models"))
    assert contents(dataset) == before
