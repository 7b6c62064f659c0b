"""Every command on README's page is run, in its order, in a copy, with a stand-in for Kaggle."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import runs
from runs import QUICK, ROOT, SMALL, copied, good

import cmi_pipeline as cmi

README = (ROOT / "README.md").read_text()
SLUG = "cmi-detect-behavior-with-sensor-data"
KAGGLE = """#!{python}
import json, os, shutil, sys
words = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
for verb, source in {gives!r}.items():
    if " ".join(words[:2]) == verb:
        shutil.copytree(source, words[words.index("-p") + 1])
"""
OPTIONS = {  # of the kaggle command, release 2.2, that the page uses; and how many words follow
    "competitions download": {"-p": 1, "--unzip": 0},
    "competitions submit": {"-k": 1, "-v": 1, "-f": 1, "-m": 1},
    "kernels push": {"-p": 1},
    "kernels status": {},
    "kernels output": {"-p": 1},
    "datasets create": {"-p": 1, "--dir-mode": 1, "--keep-tabular": 0},
}
FROM_PYTHON = """
import polars as pl
import cmi_pipeline as cmi
cmi.SETTINGS |= {}
test = pl.read_csv("data/test.csv", infer_schema_length=None)
sequence = next(iter(test.partition_by("sequence_id")))
demographics = pl.read_csv("data/test_demographics.csv")
{}
proba = cmi.Predictor(cfg).predict_proba(sequence, demographics)
answer = cmi.predict(sequence, demographics)
print(len(proba), round(sum(proba.values()), 4), answer in cmi.GESTURES)
"""
SETTINGS = {**SMALL, **QUICK, "LGBM_ROUNDS": "3", "STRICT": "0"}


def page_commands() -> list[str]:
    """Those in its blocks; a block that is no command is the picture of the road."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    blocks = [block for language, block in found if not language and "─►" not in block]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [command for line in lines for command in line.split(" && ")]


def inline_commands() -> list[str]:
    return re.findall(r"`((?:python|jupytext) [^`]*)`", README)


class Copy:
    """What a push or a clone has, a stand-in for Kaggle, and `python` that is this one."""

    def __init__(self, folder: Path, plain: Path) -> None:
        self.folder, self.log = folder / "clone", folder / "kaggle.jsonl"
        ignored = (".git", "__pycache__", ".*_cache", "cmi_output", "shared")
        copied(ROOT, self.folder, *ignored)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        gives = {"competitions download": str(runs.data_of(plain)), "kernels output": str(plain)}
        text = KAGGLE.format(python=sys.executable, log=str(self.log), gives=gives)
        (bin_folder / "kaggle").write_text(text)
        (bin_folder / "kaggle").chmod(0o755)
        (bin_folder / "python").symlink_to(Path(sys.executable).absolute())
        hidden = str(self.folder / "tests" / "without_matplotlib")
        self.env = {**runs.clean_environment(), **SETTINGS, "PYTHONPATH": hidden}
        self.env["PATH"] = f"{bin_folder}:{os.environ['PATH']}"

    def run(self, command: str) -> str:
        return good(runs.call(*shlex.split(command), cwd=self.folder, env=self.env))

    def asked(self) -> Iterator[tuple[str, list[str]]]:
        for line in self.log.read_text().splitlines():
            words = json.loads(line)
            yield " ".join(words[:2]), words[2:]


def check_kaggle(verb: str, words: list[str]) -> None:
    """Only options that the command has, each with its word; then the names that must fit."""
    rest = list(words)
    for option, n_words in OPTIONS[verb].items():
        if option in rest:
            at = rest.index(option)
            assert not [word for word in rest[at + 1 : at + 1 + n_words] if word.startswith("-")]
            del rest[at : at + 1 + n_words]
    script = json.loads((ROOT / "kernel-metadata.json").read_text())["id"].split("/")[1]
    named = {"competitions": [SLUG], "kernels": [f"USER/{script}"], "datasets": []}
    assert rest == ([] if verb == "kernels push" else named[verb.split()[0]])
    if verb == "competitions submit":
        assert words[1:] == ["-k", f"USER/{script}", "-v", "VERSION", "-f", "submission.parquet",
                             "-m", "CMI pipeline"]  # fmt: skip


def stand_in(command: str) -> str:
    """What is run instead: packages are there already, tests are collected, a minute is saved."""
    if "-m pytest" in command:
        quiet = "--collect-only -q -p no:cacheprovider"
        return f"{command} {quiet}" + " -n 0" * ("-n 0" not in command)
    first = command.split()[0]
    if first == "pip" or (first in ("ruff", "mypy") and shutil.which(first) is None):
        return ""  # .ci/run has them
    return "mypy --version" if first == "mypy" else command  # .ci/run checks with it


def test_every_command_in_order(plain: Path, tmp_path: Path) -> None:
    copy, ran = Copy(tmp_path, plain), 0
    for command in filter(None, map(stand_in, page_commands())):
        printed = copy.run(command)
        ran += 1
        if command == "python cmi_pipeline.py":
            assert "simulated: no competition data" in printed
            shutil.rmtree(copy.folder / "cmi_output")  # the next run has other data
    runs.check_submission(copy.folder / "cmi_output", copy.folder / "data")
    asked = list(copy.asked())
    for verb, words in asked:
        check_kaggle(verb, words)
    assert {verb for verb, _ in asked} == set(OPTIONS)
    made = json.loads((copy.folder / "cmi_dataset" / "dataset-metadata.json").read_text())
    assert made["id"] == "USER/cmi-bundles"
    assert (copy.folder / "cmi_dataset" / "lgbm_models" / "bundle.json").is_file()
    assert ran >= 15
    (python,) = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    (copy.folder / "from_python.py").write_text(FROM_PYTHON.format(SETTINGS, python))
    told = copy.run("python from_python.py")
    assert re.search("^plan +|] plan +all", told, re.M)
    assert told.splitlines()[-1] == "18 1.0 True"


def test_commands_within_the_text_exist() -> None:
    """Their files, the options that they name, and the settings."""
    for command in inline_commands():
        words = command.split()
        files = [word for word in words if word.endswith(".py")]
        assert all((ROOT / name).is_file() for name in files), command
        for option in re.findall(r"--[a-z-]+", command):
            assert words[0] == "jupytext" or option in (ROOT / files[0]).read_text(), command
        for name in re.findall(r"\b([A-Z_]+)=", command):
            assert name in cmi.KNOWN_NAMES, command
    assert len(inline_commands()) >= 4


def test_it_has_twelve_settings_with_their_defaults() -> None:
    table = re.search(r"^## Twelve settings\n\n(.*?)\n\n", README, re.M | re.S)
    assert table
    names = re.findall(r"^\| ([A-Z_]+) \|", table[1], re.M)
    assert len(names) == 12
    assert set(names) <= set(cmi.KNOWN_NAMES)
    for _, name, default in re.findall(r"^(\| ([A-Z_]+) \| (\S+) \|)", table[1], re.M):
        assert cmi.shown(getattr(cmi.Config(), name.lower())) == default
