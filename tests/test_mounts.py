"""Kaggle's folders, as they were in 2025 and are today: training, attaching its models, re-run.

A private mount namespace holds /kaggle/input, read only, /kaggle/working and the script where
Kaggle puts it, alone. It needs no rights beyond `unshare -rm` and leaves nothing behind.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from runs import ROOT, SCRIPT, clean_environment, good

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
LOCAL_RUN = """
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer
def predict(sequence, demographics):
    return "Text on phone"
CMIInferenceServer(predict).run_local_gateway()
"""
SETTINGS = {
    "USE_TORCH": "0", "USE_KERAS": "0", "N_FOLDS": "2", "LGBM_ROUNDS": "25", "LGBM_LR": "0.1",
    "CMI_WORKERS": "2",  # side by side, whatever the script is called
    "SUBJECT_ASSIGNMENT": "0",  # the answers do not depend on the order of the questions
}  # fmt: skip
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
        self.words = [str(word) for mount in mounts for word in mount]

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Python with these words, in the working folder; it draws no report."""
        hidden = {"PYTHONPATH": str(ROOT / "tests" / "without_matplotlib")}
        inside = ["sh", "-c", INSIDE, "sh", str(self.root), *self.words, "--", sys.executable]
        return subprocess.run(
            ["unshare", "-rm", *inside, *words], text=True, capture_output=True, timeout=300,
            env={**clean_environment(), **SETTINGS, **hidden, **settings},
        )  # fmt: skip

    def answers(self, name: str = "submission.parquet") -> Sequence[tuple[str, str]]:
        return sorted(pl.read_parquet(self.working / name).rows())


@pytest.fixture(scope="module")
def competition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated data and the package, as the competition's folder has them."""
    probe = Machine(tmp_path_factory.mktemp("probe"), {}).run("-c", "")
    if probe.returncode:
        pytest.skip(f"no private mount namespace here: {probe.stderr.strip()}")
    folder = tmp_path_factory.mktemp("mounts") / "competition"
    cmi_simulator.simulate(folder, subjects=6, test_subjects=1, recordings_per_subject=18, seed=3)
    (folder / "test_truth.csv").unlink()
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kaggle_evaluation", folder / "kaggle_evaluation", ignore=hidden)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_attaching_and_the_rerun(competition: Path, tmp_path: Path, layout: str) -> None:
    data, bundle = LAYOUTS[layout]
    trained = Machine(tmp_path / "first", {data: competition})
    good(trained.run("/kaggle/src/script.py"))
    assert not list(trained.working.glob("simulated-*"))
    assert (trained.working / "lgbm_models" / "bundle.json").is_file()
    assert len({gesture for _, gesture in trained.answers()}) > 3
    dataset = trained.working  # as New Dataset on the Output tab has it
    if layout == "today":
        dataset = tmp_path / "dataset"
        words = [str(trained.working), str(dataset), "--slug", "some-one/cmi-bundles"]
        make_kaggle_dataset.main(words)
    attached, before = {data: competition, bundle: dataset}, contents(dataset)

    plain = Machine(tmp_path / "plain", attached)
    good(plain.run("/kaggle/src/script.py"))
    assert not list(plain.working.glob("*_models"))  # nothing was trained
    assert plain.answers() == trained.answers()

    rerun = Machine(tmp_path / "rerun", attached)
    package = f"/kaggle/input/{data}"
    asked = good(rerun.run(
        "-m", "kaggle_evaluation.dry_run", "--test-dir", package, "--all-sensors",
        "--working-dir", ".", "--output-dir", "gateway", "/kaggle/src/script.py",
        PYTHONPATH=package, STRICT="1",
    ))  # fmt: skip
    assert "passed: 18 valid answers" in asked
    assert rerun.answers("gateway/submission.parquet") == trained.answers()
    assert not list(rerun.working.glob("*_models"))
    assert contents(dataset) == before

    good(rerun.run("-c", LOCAL_RUN, PYTHONPATH=package))  # the package finds the files by itself
    answers = dict(rerun.answers())
    assert answers.keys() == dict(trained.answers()).keys()
    assert set(answers.values()) == {"Text on phone"}
