"""Settings: read once, as the right type, with errors that say what is wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import cmi_pipeline as cmi

README = Path(cmi.__file__).with_name("README.md")


def test_environment_overrides_defaults() -> None:
    cfg = cmi.Config.from_env(
        {"N_FOLDS": "3", "STRICT": "true", "USE_TORCH": "0", "TORCH_LR": "2e-4", "HOME": "/",
         "OUTPUT_PATH": "~/out", "ENSEMBLE_W_LGBM": "0.25", "ENSEMBLE_WEIGHTS": "lgbm:1"}
    )  # fmt: skip
    assert (cfg.n_folds, cfg.strict, cfg.use_torch, cfg.torch_lr) == (3, True, False, 2e-4)
    assert cfg.output_path == Path.home() / "out"
    assert (cfg.ensemble_w_lgbm, cfg.ensemble_w_torch) == (0.25, None)
    assert cfg.ensemble_weights == "lgbm:1"
    assert cmi.Config.from_env({}) == cmi.Config()


def test_an_empty_variable_is_the_default() -> None:
    cfg = cmi.Config.from_env({"N_FOLDS": "", "ENSEMBLE_W_LGBM": " ", "CMI_DATA_DIR": ""})
    assert cfg == cmi.Config()


def test_the_old_name_of_the_lightgbm_bundle_is_known() -> None:
    assert cmi.Config.from_env({"MODEL_PATH": "/x"}).lgbm_bundle_path == Path("/x")
    both = cmi.Config.from_env({"MODEL_PATH": "/x", "LGBM_BUNDLE_PATH": "/y"})
    assert both.lgbm_bundle_path == Path("/y")


def test_paths_are_of_the_folder_where_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker, or a notebook that changes folder, must find them too."""
    (tmp_path / "data").mkdir()
    for name in ("train", "train_demographics", "test", "test_demographics"):
        (tmp_path / "data" / f"{name}.csv").touch()
    named = ("LGBM_BUNDLE_PATH", "TORCH_BUNDLE_PATH", "KERAS_BUNDLE_PATH", "OUTPUT_PATH")
    env = {name: name.lower() for name in named} | {"CMI_DATA_DIR": "data"}
    monkeypatch.chdir(tmp_path)
    cfg = cmi.settle(cmi.Config.from_env(env), env)
    for name in named:
        assert getattr(cfg, name.lower()) == tmp_path / name.lower()
    assert cfg.cmi_data_dir == tmp_path / "data"
    assert cfg.ckpt_base_dir is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("KERAS_BATCH_SIZE", "51x", "KERAS_BATCH_SIZE='51x' cannot be read as int (default 512)."),
        ("TORCH_LR", "fast", "TORCH_LR='fast' cannot be read as float (default 0.001)."),
        ("STRICT", "yes please", "STRICT='yes please' cannot be read as bool (default False)."),
        (
            "ENSEMBLE_W_KERAS",
            "a third",
            "ENSEMBLE_W_KERAS='a third' cannot be read as float (default None).",
        ),
    ],
)
def test_a_value_that_cannot_be_read_stops_the_run(name: str, text: str, message: str) -> None:
    with pytest.raises(cmi.ConfigError) as error:
        cmi.Config.from_env({name: text})
    assert str(error.value) == message


@pytest.mark.parametrize(("bad", "why"), [
    ({"N_FOLDS": "1"}, "N_FOLDS"), ({"LGBM_ES_METRIC": "auc"}, "LGBM_ES_METRIC"),
    ({"MODALITY_DROPOUT_PROB": "1.5"}, "MODALITY_DROPOUT_PROB"), ({"CMI_BACKEND": "spark"}, "CMI_BACKEND"),
    ({"SEED": "-1"}, "SEED"), ({"LGBM_TOP_FEATURES": "-2"}, "LGBM_TOP_FEATURES"), ({"LGBM_LR": "0"}, "LGBM_LR"),
    ({"KERAS_BATCH_SIZE": "0"}, "KERAS_BATCH_SIZE"), ({"KERAS_MAX_EPOCHS": "0"}, "KERAS_MAX_EPOCHS"),
    ({"KERAS_LR": "nan"}, "KERAS_LR"), ({"TORCH_ES_MIN_DELTA": "nan"}, "TORCH_ES_MIN_DELTA"),
    ({"ENSEMBLE_W_LGBM": "-1"}, "ENSEMBLE_W_LGBM"),
])  # fmt: skip
def test_a_value_out_of_range_stops_the_run(bad: dict[str, str], why: str) -> None:
    with pytest.raises(cmi.ConfigError, match=why):
        cmi.Config.from_env(bad)


def test_likely_typing_mistakes_are_told() -> None:
    env = [
        "N_FOLD",
        "KERAS_BATCHSIZE",
        "PATH",
        "HOME",
        "LANG",
        "USER",
        "SHELL",
        "SEED",
        "MODEL_PATH",
    ]
    assert dict(cmi.likely_typos(env)) == {
        "N_FOLD": "N_FOLDS",
        "KERAS_BATCHSIZE": "KERAS_BATCH_SIZE",
    }


def test_every_setting_the_user_knows_exists() -> None:
    known = """
    CMI_DATA_DIR OUTPUT_PATH CKPT_BASE_DIR SEED N_FOLDS USE_LGBM USE_TORCH USE_KERAS
    FORCE_TRAIN_LGBM FORCE_TRAIN_TORCH FORCE_TRAIN_KERAS RESUME RESUME_TORCH RESUME_KERAS
    LGBM_BUNDLE_PATH TORCH_BUNDLE_PATH KERAS_BUNDLE_PATH FAIL_IF_TORCH_MISSING
    FAIL_IF_KERAS_MISSING PLAN_ONLY STRICT FIXED_PAD_LEN PAD_LEN_PERCENTILE MODALITY_DROPOUT_PROB
    FRAME_CACHE FRAME_CACHE_MAX_MB FRAME_CACHE_MAX_ITEMS LGBM_ROUNDS LGBM_LR LGBM_LEAVES
    LGBM_ES_ROUNDS LGBM_TOP_FEATURES TORCH_MAX_EPOCHS TORCH_BATCH_SIZE TORCH_ACCUM_STEPS TORCH_LR
    TORCH_WEIGHT_DECAY TORCH_DROPOUT TORCH_LABEL_SMOOTHING TORCH_ES_PATIENCE TORCH_ES_MIN_DELTA
    TORCH_AMP TORCH_SEEDS TORCH_DATA_PARALLEL USE_FOCAL_LOSS DL_NUM_WORKERS KERAS_MAX_EPOCHS
    KERAS_BATCH_SIZE KERAS_LR KERAS_DROPOUT KERAS_LABEL_SMOOTHING KERAS_ES_PATIENCE
    KERAS_RLR_PATIENCE KERAS_MP KERAS_JIT ENSEMBLE_WEIGHTS ENSEMBLE_W_LGBM ENSEMBLE_W_TORCH
    ENSEMBLE_W_KERAS ENSEMBLE_TRIALS ENSEMBLE_TEMPERATURE SUBJECT_ASSIGNMENT UPSIDE_DOWN
    LOG_EVERY_STEPS PRINT_EVERY_STEPS FEATURE_LOG_EVERY SAVE_JSONL USE_TQDM CMI_WORKERS
    CMI_BACKEND DASK_SCHEDULER RAY_ADDRESS KAGGLE_IS_COMPETITION_RERUN
    """
    fields = {f.name.upper() for f in dataclasses.fields(cmi.Config)}
    assert set(known.split()) <= fields


def test_readme_has_the_table_that_help_prints() -> None:
    text = README.read_text()
    for line in cmi.settings_table():
        assert line in text, f"README's settings table lacks: {line}"


def test_random_numbers_have_an_address_not_an_order() -> None:
    cfg = cmi.Config(seed=7)
    first = cmi.rng_for(cfg, "torch", 3).random(4)
    cmi.rng_for(cfg, "torch", 2).random(100)
    assert (cmi.rng_for(cfg, "torch", 3).random(4) == first).all()
    others = [
        cmi.rng_for(cfg, "torch", 4),
        cmi.rng_for(cfg, "keras", 3),
        cmi.rng_for(cmi.Config(seed=8), "torch", 3),
    ]
    assert all((rng.random(4) != first).any() for rng in others)


def test_a_setting_shapes_only_the_members_it_says() -> None:
    base, changed = cmi.Config(), cmi.Config(torch_lr=0.5, print_every_steps=3)
    assert base.shaping("torch") != changed.shaping("torch")
    assert base.shaping("lgbm") == changed.shaping("lgbm")
    assert base.shaping("keras") == changed.shaping("keras")


@pytest.mark.parametrize("word", sorted(cmi.HELP))
def test_help_may_be_read_in_part(word: str) -> None:
    """As `python cmi_pipeline.py --help | head` does: no traceback, no other status."""
    command = [sys.executable, cmi.__file__, word]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
