"""Settings, arguments and help; when a line of progress is due and what it says."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Patch, Printed

import cmi_pipeline as cmi

UNUSABLE = {
    "KERAS_BATCH_SIZE='51x'": " cannot be read as int (default 64).",
    "STRICT='maybe'": " cannot be read as bool (default False).",
    "N_FOLDS=1": " must be from 2 to",
    "SUBJECT_ASSIGNMENT=2": " must be one of auto, 0, 1.",
    "MODALITY_DROPOUT_PROB=1.5": " must be from 0 to 1",
    "KERAS_LR=nan": "",
    "OUTPUT_PATH='~nobody-of-that-name/x'": " cannot be read as Path",
}


def test_environment_overrides_defaults() -> None:
    env = {"N_FOLDS": "3", "STRICT": "true", "USE_TORCH": "off", "TORCH_LR": " 2e-4 ", "HOME": "/"}
    env |= {"OUTPUT_PATH": "~/out", "ENSEMBLE_W_LGBM": "0.25", "MODEL_PATH": "/x"}
    cfg = cmi.Config.from_env(env)
    assert (cfg.n_folds, cfg.strict, cfg.use_torch, cfg.torch_lr) == (3, True, False, 2e-4)
    assert cfg.output_path == Path.home() / "out"
    assert (cfg.ensemble_w_lgbm, cfg.ensemble_w_torch) == (0.25, None)
    newer = cmi.Config.from_env(env | {"LGBM_BUNDLE_PATH": "/y"})
    assert (cfg.lgbm_bundle_path, newer.lgbm_bundle_path) == (Path("/x"), Path("/y"))
    empty = {"N_FOLDS": "", "ENSEMBLE_W_LGBM": " ", "CMI_DATA_DIR": ""}
    assert cmi.Config.from_env({}) == cmi.Config.from_env(empty) == cmi.Config()
    learnt = cmi.Config().training_settings("keras")
    assert {"KERAS_LR", "TORCH_LR", "SEED", "STRICT"} & set(learnt) == {"KERAS_LR", "SEED"}
    words = [cmi.Config.from_env({"STRICT": w}).strict for w in ("yes", "On", "1", "No", "off")]
    assert words == [True, True, True, False, False]


def test_a_value_that_cannot_be_used_stops_the_run() -> None:
    for given, message in UNUSABLE.items():
        name, text = given.replace("'", "").split("=")
        with pytest.raises(cmi.ConfigError, match=re.escape(given + message)):
            cmi.Config.from_env({name: text})
    with pytest.raises(cmi.ConfigError, match="TORCH_WIDTH"):
        cmi.Config.from_env({"TORCH_WIDTH": "20"})


def test_help_shows_every_setting_with_the_value_that_arguments_give_it() -> None:
    command = [sys.executable, cmi.__file__, "--help", "N_FOLDS=7", "LGBM_LR=0.5"]
    shown = subprocess.check_output(command, text=True)
    assert re.search(r"N_FOLDS\b.* 7 \(default 5\).* folds", shown)
    assert re.search(r"LGBM_LR\b.* 0\.5 \(default 0\.07\)", shown)
    names = {name.upper() for name in cmi.Config.__dataclass_fields__}
    assert names <= set(re.findall(r"^\W*([A-Z_]+) ", shown, re.M))


def test_an_unknown_argument_is_refused_with_the_nearest_name() -> None:
    hints = {"--plan": "--help lists", "--n-folds": "N_FOLDS", "EPOCHS=3": "TORCH_MAX_EPOCHS"}
    for word, hint in hints.items():
        with pytest.raises(cmi.ConfigError, match=f"is no argument.*{hint}"):
            cmi.main({}, [word])


def test_likely_slips_in_the_environment_are_told(tmp_path: Path, capsys: Printed) -> None:
    meant = {"N_FOLD": "N_FOLDS", "TORCH_EPOCHS": "TORCH_MAX_EPOCHS", "lgbm_rounds": "LGBM_ROUNDS"}
    innocent = {"PATH": "/bin", "HOME": "/", "USER": "me", "SEED": "1", "MODEL_PATH": "/x"}
    paths = {"CMI_DATA_DIR": "/nowhere", "OUTPUT_PATH": str(tmp_path / "out")}
    with pytest.raises(cmi.ConfigError, match="looked for test"):
        cmi.main(dict.fromkeys(meant, "1") | innocent | paths)
    told = re.findall(r"variable=(\w+)  did_you_mean=(\w+)", capsys.readouterr().out)
    assert dict(told) == meant


def test_random_numbers_have_an_address_not_an_order() -> None:
    cfg, address = cmi.Config(seed=7), ("torch", 3)
    first = cmi.rng_for(cfg, *address).random()
    cmi.rng_for(cfg, "torch", 2).random(100)
    assert cmi.rng_for(cfg, *address).random() == first
    others = [(cfg, "torch", 4), (cfg, "keras", 3), (cmi.Config(seed=8), *address)]
    assert all(cmi.rng_for(*other).random() != first for other in others)


def test_progress_is_told_now_and_then_and_at_the_end(monkeypatch: Patch, capsys: Printed) -> None:
    now, asked = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = cmi.Progress("steps", 90, 40, 60, job="a\nb")  # resumed at the 60th
    for _ in range(30):
        now[0] += 3
        progress.step(1, lambda: asked.append(1) or {"loss": 1.5})
    lines = capsys.readouterr().out.splitlines()
    found = [re.search(r"steps +job=a b  done=(.*)/90  loss=1.5  left=(.*) s", x) for x in lines]
    told = [tuple(map(int, line.groups())) for line in found if line]
    assert told == [(80, 30), (90, 0)], "by the rate since it was resumed"
    assert len(asked) == len(lines), "reading a loss from a card waits for the card"


def test_a_terminal_may_lack_characters(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii"))
    cmi.say("LR 1 → 2 …")
    assert raw.getvalue().endswith(b"LR 1 ? 2 ?\n")


def test_details_go_to_a_file(tmp_path: Path, capsys: Printed) -> None:
    """No line of the screen is longer than 140 characters; a long stage says that it still runs."""
    log = tmp_path / "run.log"
    cmi.RUN_LOG.update(began=time.time() - 100, file=log)
    try:
        cmi.log("detail", x=1.23456, y="a\nb")
        cmi.log("warning", text=" ".join(["word"] * 60))
        cmi.say("the board")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cmi, "SILENCE", 0.5)
            with cmi.stage("nap", cmi.Config(output_path=tmp_path), state=lambda: "half"):
                time.sleep(2.5)
    finally:
        cmi.RUN_LOG.update(file=None)
    screen, details = capsys.readouterr().out, log.read_text()
    assert re.search(r"^\[  100\.\ds\] detail +x=1\.235  y=a b$", details, re.M)
    assert "detail" not in screen
    assert screen.count("word") == details.count("word") == 60
    assert max(map(len, screen.splitlines())) <= 140
    assert re.search(r"^\[ .*\] the board$", screen, re.M)
    assert re.search(r"^\[ .*\] … nap, \d s so far  half$", screen, re.M)
    assert re.search(r"stage +name=nap  secs=2\.\d", details)
