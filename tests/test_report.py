"""The report of a small real run: its parts, its figures against scikit-learn, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, f1_score
from test_road import SMALL, good, run

import cmi_pipeline as cmi
import cmi_simulator

HOSTILE = "SUBJ_<script>alert('x')</script>&amp;"
VOID = {"meta", "link", "br", "img", "use", "path", "image", "input"}
TARGET_NAMES = [
    "Above ear - pull hair",
    "Cheek - pinch skin",
    "Eyebrow - pull hair",
    "Eyelash - pull hair",
    "Forehead - pull hairline",
    "Forehead - scratch",
    "Neck - pinch skin",
    "Neck - scratch",
]


class Page(HTMLParser):
    """Sections, tables and cards of a report; every tag must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.cards: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.cards.append({"title": "", "about": "", "rows": [], "svgs": 0})
        if tag == "svg" and "article" in self.open:
            self.cards[-1]["svgs"] += 1
        if tag == "table":
            kind = str(dict(attributes)["class"])
            self.rows = self.cards[-1]["rows"] if kind == "opinions" else []
            self.tables.setdefault(kind, self.rows)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "br" and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text
        elif "h2" in self.open:
            self.titles[-1] += text
        elif "article" in self.open and "h3" in self.open:
            self.cards[-1]["title"] += text
        elif "article" in self.open and "p" in self.open:
            self.cards[-1]["about"] += text


def parsed(out: Path) -> Page:
    text = (out / "report" / "index.html").read_text()
    return Page(text.replace("<br>", "<br/>"))


def column(page: Page, table: str, name: str) -> dict[str, str]:
    head, *rows = page.tables[table]
    return {row[0]: row[head.index(name)] for row in rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of LightGBM and Torch on data with a hostile subject: output, data, what it printed."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "data <img src=x onerror=alert(1)>"
    cmi_simulator.simulate(data, subjects=5, test_subjects=1, recordings_per_subject=16, seed=42)
    subjects = pl.read_csv(data / "train_demographics.csv")["subject"].to_list()
    for name in ("train.csv", "train_demographics.csv"):
        path = data / name
        path.write_text(path.read_text().replace(subjects[0], HOSTILE))
    out = folder / "out"
    return out, data, good(run(out, CMI_DATA_DIR=str(data), USE_KERAS="0", LGBM_ROUNDS="40"))


@pytest.fixture
def page(made: tuple[Path, Path, str]) -> Page:
    return parsed(made[0])


@pytest.fixture
def outcome(made: tuple[Path, Path, str], tmp_path: Path) -> cmi.Outcome:
    """The run again as the report sees it, on copies of its files, without its results."""
    for name in ("oof", "ensemble", "logs", "feature_importance.csv"):
        source = made[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    cfg = cmi.Config(output_path=tmp_path, cmi_data_dir=made[1], n_folds=2, use_keras=False)
    rec = cmi.read_train(made[1])
    assert rec.labels is not None
    figures = {"all": 0.5, "imu": 0.25}
    results = [cmi.Result(name, figures, 1.0) for name in ("optimistic", "nested", "assigned")]
    return cmi.Outcome(rec, rec.labels, results, cfg)


def answers(out: Path, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, answers and probabilities, from the files alone."""
    proba = np.load(out / "oof" / f"oof_{part.replace('/', '_')}_proba.npy")
    return np.load(out / "oof" / "y_true.npy"), proba.argmax(axis=1), proba


def competition_score(truth: np.ndarray, answer: np.ndarray) -> float:
    t, p = np.minimum(truth, 8), np.minimum(answer, 8)
    macro = f1_score(t, p, average="macro", zero_division=0)
    return float(f1_score(t < 8, p < 8, zero_division=0) + macro) / 2


def test_every_part_is_there(page: Page) -> None:
    assert page.titles == [
        "Result",
        "F1 by class",
        "Confusion",
        "Calibration",
        "Ensemble weights",
        "Learning curves",
        "Features",
        "Gallery",
        "Time and memory",
        "Set-up",
    ]
    assert set(page.tables) == {
        "scores", "f1", "confusion", "ece", "weights", "wide", "opinions", "stages",
        "changed", "settings", "machine", "",
    }  # fmt: skip


def test_the_result_table_agrees_with_scikit_learn(
    made: tuple[Path, Path, str], page: Page
) -> None:
    shown = {name: column(page, "scores", name) for name in ("all", "imu", "mixed")}
    for name, part in (("lgbm", "lgbm"), ("torch", "torch"), ("blend (nested)", "blend")):
        scores = [competition_score(*answers(made[0], f"{part}/{m}")[:2]) for m in ("all", "imu")]
        assert [float(shown[m][name]) for m in ("all", "imu")] == pytest.approx(scores, abs=6e-5)
        assert float(shown["mixed"][name]) == pytest.approx(np.mean(scores), abs=6e-5)
    figures = json.loads((made[0] / "ensemble" / "weights.json").read_text())["figures"]
    for mode in ("all", "imu"):
        mean, sd = shown[mode]["blend + assignment"].split("\n± ")
        assert float(mean) == pytest.approx(figures[mode]["assigned"], abs=6e-5)
        assert float(sd) == pytest.approx(figures[mode]["assigned_sd"], abs=6e-5)
        optimistic = float(shown[mode]["blend (optimistic)"])
        assert optimistic == pytest.approx(figures[mode]["optimistic"], abs=6e-5)


def test_confusion_and_f1_agree_with_scikit_learn(made: tuple[Path, Path, str], page: Page) -> None:
    truth, answer, _ = answers(made[0], "blend/all")
    head, *rows = page.tables["confusion"]
    assert [row[0].split(" ", 1)[1] for row in rows[:8]] == TARGET_NAMES
    assert head[1:] == [str(i) for i in range(1, 19)]
    counts = [[int(text or 0) for text in row[1:]] for row in rows]
    np.testing.assert_array_equal(counts, confusion_matrix(truth, answer, labels=range(18)))
    for mode in ("all", "imu"):
        truth, answer, _ = answers(made[0], f"blend/{mode}")
        t, p = np.minimum(truth, 8), np.minimum(answer, 8)
        f1 = f1_score(t, p, average=None, labels=range(9), zero_division=0)
        shown = column(page, "f1", f"{mode}, simulated")
        assert list(shown) == [*TARGET_NAMES, "non-target"]
        known = np.array([text != "–" for text in shown.values()])
        np.testing.assert_array_equal(known, np.isin(range(9), np.r_[t, p]))
        values = [float(text) for text in shown.values() if text != "–"]
        np.testing.assert_allclose(values, f1[known], atol=6e-4)
    n = column(page, "f1", "recordings")
    assert [int(k) for k in n.values()] == np.bincount(np.minimum(truth, 8), minlength=9).tolist()


def test_calibration_agrees_with_scikit_learn(made: tuple[Path, Path, str], page: Page) -> None:
    shown = column(page, "ece", "ECE")
    members = [f"{m}/{mode}" for m in ("lgbm", "torch") for mode in ("all", "imu")]
    assert set(shown) == {"blend/all", "blend/imu", *members}
    for part, text in shown.items():
        truth, answer, proba = answers(made[0], part)
        sure = proba.max(axis=1).astype(np.float64)
        right, mean = calibration_curve(answer == truth, sure, n_bins=10)
        n = np.histogram(sure, np.linspace(0, 1, 11))[0]
        error = np.sum(np.abs(right - mean) * n[n > 0]) / n.sum()
        assert float(text) == pytest.approx(error, abs=6e-4)


def test_weights_features_and_settings_are_those_of_the_run(
    made: tuple[Path, Path, str], page: Page
) -> None:
    modes = json.loads((made[0] / "ensemble" / "weights.json").read_text())["modes"]
    for mode, blend in modes.items():
        shown = column(page, "weights", f"{mode}, by {blend['kind']}")
        for part, weight in zip(blend["parts"], blend["weights"], strict=True):
            assert float(shown[part]) == pytest.approx(weight, abs=6e-4)
    gains = pl.read_csv(made[0] / "feature_importance.csv").filter(pl.col("mode") == "all")
    best = gains.sort("gain_mean", descending=True)["feature"].head(40).to_list()
    assert [row[1].split("\n")[0] for row in page.tables["wide"][1:]] == best
    changed = {row[0]: row[1:] for row in page.tables["changed"][1:]}
    settings = SMALL | {"USE_KERAS": "0", "LGBM_ROUNDS": "40"}
    assert {k: v for k, (v, _) in changed.items() if k in settings} == settings
    assert set(changed) - set(settings) == {"CMI_DATA_DIR", "OUTPUT_PATH"}
    assert changed["LGBM_ROUNDS"][1] == "1024"
    assert len(page.tables["settings"]) - 1 == len(cmi.dataclasses.fields(cmi.Config))
    machine = dict(page.tables["machine"])
    assert machine["numpy"] == np.__version__
    assert machine["polars"] == pl.__version__
    assert {"processor", "cores", "memory", "card"} <= set(machine)


def test_stages_are_shown_and_logged(made: tuple[Path, Path, str], page: Page) -> None:
    seconds, peak = column(page, "stages", "seconds"), column(page, "stages", "peak MB")
    names = [f"{m}/{mode}" for m in ("lgbm", "torch") for mode in ("all", "imu")]
    expected = {"reading", "wearer", "features", "blend", "serving"}
    expected |= {f"{name} {what}" for name in names for what in ("training", "out of fold")}
    assert expected <= set(seconds)
    lines = (made[0] / "logs" / "stages.jsonl").read_text().splitlines()
    logged = {line["name"]: line for line in map(json.loads, lines)}
    assert list(logged) == list(seconds)
    for name, line in logged.items():
        assert float(seconds[name]) == pytest.approx(line["secs"], abs=0.051)
        assert float(peak[name].replace(",", "")) == pytest.approx(line["peak_mb"], abs=0.51)
        assert 20 < line["peak_mb"] < 100_000
        assert f"stage        begins={name}\n" in made[2]
        assert f"stage        ends={name}  secs=" in made[2]


def test_the_gallery_begins_with_the_most_confident_mistakes(
    made: tuple[Path, Path, str], page: Page
) -> None:
    truth, answer, proba = answers(made[0], "blend/all")
    costly = [i for i in range(len(truth)) if min(truth[i], 8) != min(answer[i], 8)]
    costly = sorted(costly, key=lambda i: -proba[i].max())[:18]
    folds = pl.read_csv(made[0] / "folds.csv")
    ids = [card["about"].split(" · ")[0] for card in page.cards]
    assert ids[: len(costly)] == [folds["sequence_id"][i] for i in costly]
    assert len(costly) >= 6
    for card, i in zip(page.cards, costly, strict=False):
        assert card["title"] == f"{cmi.GESTURES[truth[i]]} → {cmi.GESTURES[answer[i]]}"
        assert card["about"].endswith(f"wrong with {proba[i].max():.2f}")
        assert [row[0] for row in card["rows"]] == ["blend/all", "lgbm/all", "torch/all"]
        for part, words in card["rows"]:
            p = answers(made[0], part)[2][i]
            best = sorted(range(18), key=lambda g: -p[g])[:3]
            assert words.split("\n") == [f"{cmi.GESTURES[g]} {p[g]:.2f}" for g in best]
    at = {name: i for i, name in enumerate(folds["sequence_id"])}
    right = [at[name] for name in ids[len(costly) :]]
    assert len(right) == min(6, (truth == answer).sum())
    assert all(truth[i] == answer[i] for i in right)
    assert all(card["svgs"] == 1 for card in page.cards)


def test_nothing_is_loaded_from_anywhere(made: tuple[Path, Path, str], page: Page) -> None:
    text = (made[0] / "report" / "index.html").read_text()
    assert len(text) < 4e6
    assert not re.search(r"https?:|@import", text)
    assert not re.findall(r"url\((?!#)", text)
    names = {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "img"}
        assert not [a for a in attributes if a.startswith("on")]
        for name in names & set(attributes):
            assert str(attributes[name]).startswith(("#", "data:")), (tag, attributes)


def test_hostile_names_are_text(made: tuple[Path, Path, str], outcome: cmi.Outcome) -> None:
    """The hostile folder stands in the heading, the hostile subject in the card of a recording."""
    text = (made[0] / "report" / "index.html").read_text()
    assert html.escape(made[1].name) in text
    theirs = int(np.flatnonzero(outcome.rec.subject == HOSTILE)[0])
    card = cmi.recording_html(theirs, {"blend/all": outcome.proba["blend/all"][theirs]}, outcome)
    assert "<script" not in card
    (parsed_card,) = Page(card.replace("<br>", "<br/>")).cards
    assert HOSTILE in parsed_card["about"]


def test_colours_can_be_told_apart_by_everyone(made: tuple[Path, Path, str]) -> None:
    """In the plots only Okabe and Ito's colours, greys and the page's ink."""
    text = (made[0] / "report" / "index.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(svgs) > 6
    colours = {c.lower() for svg in svgs for c in re.findall(r"(?:fill|stroke): (#\w+)", svg)}
    assert colours - {"#0072b2", "#e69f00", "#009e73"} <= {"#808080", "#b0b0b0", "#ffffff"}
    assert {"#0072b2", "#e69f00", "#009e73"} <= colours


def test_a_reuse_run_without_a_member_reports_the_rest(
    made: tuple[Path, Path, str], page: Page, tmp_path: Path
) -> None:
    """Torch's files still lie there, but it took no part."""
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    settings = {"USE_KERAS": "0", "USE_TORCH": "0", "LGBM_ROUNDS": "40", "SAVE_JSONL": "0"}
    good(run(out, CMI_DATA_DIR=str(made[1]), **settings))
    again = parsed(out)
    assert again.titles == page.titles
    assert column(again, "scores", "all")["lgbm"] == column(page, "scores", "all")["lgbm"]
    assert "torch" not in column(again, "scores", "all")
    assert [row[0] for row in again.tables["weights"][1:]] == ["lgbm/all", "lgbm/imu", "lgbm/norot"]
    assert "lgbm/all training" not in column(again, "stages", "seconds")
    assert "lgbm/all out of fold" in column(again, "stages", "seconds")


def test_real_data_are_marked_as_real(outcome: cmi.Outcome, tmp_path: Path) -> None:
    assert "Simulated data." in cmi.top_part(outcome, outcome.cfg)
    real = cmi.dataclasses.replace(outcome.cfg, cmi_data_dir=tmp_path)
    assert "imulated" not in cmi.top_part(outcome, real)
    table = cmi.f1_part(cmi.dataclasses.replace(outcome, cfg=real))
    assert "all, real" in table
    assert "imulated" not in table


def test_a_run_that_only_served_is_reported_too(tmp_path: Path) -> None:
    cmi.write_report(None, cmi.Config(output_path=tmp_path, cmi_data_dir=tmp_path, strict=True))
    assert parsed(tmp_path).titles == ["Time and memory", "Set-up"]
    assert "No train.csv in" in (tmp_path / "report" / "index.html").read_text()


def test_without_matplotlib_the_report_says_so(
    outcome: cmi.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = cmi.package_version
    monkeypatch.setattr(cmi, "package_version", lambda p: "" if p == "matplotlib" else version(p))
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    body = cmi.report_html(outcome, outcome.cfg)
    assert "matplotlib is not installed" in body
    assert "<svg" not in body
    assert len(Page(body.replace("<br>", "<br/>")).tables["confusion"]) == 19


def test_curves_of_boosters_that_watched_the_score_alone(outcome: cmi.Outcome) -> None:
    """With LGBM_ES_METRIC=score the log has no loss; the page is written all the same."""
    lines = [{"mode": "all", "fold": 0, "round": n, "score": 0.5} for n in (10, 20)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (outcome.cfg.out / "logs" / "lgbm_progress.jsonl").write_text(text)
    strict = cmi.dataclasses.replace(outcome.cfg, strict=True)
    cmi.write_report(cmi.dataclasses.replace(outcome, cfg=strict), strict)
    assert (outcome.cfg.out / "report" / "index.html").is_file()


@pytest.mark.parametrize("broken", ["weights", "oof", "features", "log"])
def test_a_failure_is_an_error_in_strict_mode_only(
    outcome: cmi.Outcome, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    cfg = outcome.cfg
    if broken == "weights":
        (cfg.out / "ensemble" / "weights.json").write_text("{")
    elif broken == "oof":
        (cfg.out / "oof" / "oof_blend_all_proba.npy").unlink()
    elif broken == "features":
        (cfg.out / "feature_importance.csv").write_text("feature\nx\n")
    else:
        line = {"mode": "all", "fold": 0, "epoch": "first"}
        with (cfg.out / "logs" / "torch_progress.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    cmi.write_report(outcome, cfg)
    assert re.search(r"warning +not_written=.*index.html  error=", capsys.readouterr().out)
    assert not (cfg.out / "report").exists()
    strict = cmi.dataclasses.replace(cfg, strict=True)
    with pytest.raises((ValueError, OSError, TypeError, pl.exceptions.PolarsError)):
        cmi.write_report(cmi.dataclasses.replace(outcome, cfg=strict), strict)


def test_in_a_notebook_the_report_is_shown(
    outcome: cmi.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    displayed: list[str] = []
    display = types.SimpleNamespace(HTML=str, display=displayed.append)
    shell = types.SimpleNamespace(get_ipython=lambda: None, display=display)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setattr(cmi, "TRAINED", cmi.TRAINED[:-1])  # the gallery takes its time
    cmi.write_report(outcome, outcome.cfg)
    assert displayed == []  # IPython was imported, but no notebook runs
    shell.get_ipython = object
    cmi.write_report(outcome, outcome.cfg)
    (body,) = displayed
    assert "<h2>Result</h2>" in body
    assert "<svg" in body
    assert "body{" not in body, "the notebook's own page keeps its style"


def test_a_log_of_several_runs_gives_the_latest_of_each_fold(tmp_path: Path) -> None:
    path = tmp_path / "torch_progress.jsonl"

    def line(fold: int, epoch: int, score: float, mode: str = "all") -> str:
        return json.dumps({"mode": mode, "fold": fold, "epoch": epoch, "score": score})

    lines = [line(0, e, 0.1) for e in (1, 2, 3, 4)]
    lines += [line(1, 1, 0.2), line(0, 1, 0.3), line(1, 2, 0.2), line(0, 2, 0.3), line(0, 3, 0.3)]
    lines += [line(0, 3, 0.4), line(0, 4, 0.4)]  # resumed after epoch 2
    lines += [line(7, 1, 0.5), line(0, 1, 0.6, "imu"), '{"mode": "all", "fold": 0, "ep']
    path.write_text("\n".join(lines))
    curves = {
        key: [(entry["x"], entry["score"]) for entry in curve]
        for key, curve in cmi.learning_curves(path, n_folds=5).items()
    }
    assert curves == {
        ("all", 0, 0): [(1, 0.3), (2, 0.3), (3, 0.4), (4, 0.4)],
        ("all", 0, 1): [(1, 0.2), (2, 0.2)],
        ("imu", 0, 0): [(1, 0.6)],
    }
    assert cmi.learning_curves(tmp_path / "absent.jsonl", 5) == {}


def test_the_mosaic_shows_distance_nothing_and_missing() -> None:
    tof = np.full((3, 5, 8, 8), 254, np.uint8)
    tof[0, 0], tof[1, 4], tof[2, 1] = 0, 249, 255
    picture = cmi.tof_mosaic(tof)
    assert picture.shape == (45, 27, 4)
    dark, light = picture[2, 3], picture[36 + 2, 9 + 3]
    assert dark[3] == light[3] == 1
    assert dark[:3].sum() + 1 < light[:3].sum()
    assert picture[9 + 2, 18 + 3, 3] == 0  # missing
    assert 0 < picture[2, 9 + 3, 3] < 1  # nothing in range
    assert (picture[8::9, :, 3] == 0).all()  # gaps between images


def test_cards_are_named_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dict(cmi.machine())["card"] == "none"
    driver.write_text("#!/bin/sh\necho 'Tesla T4, 15360 MiB'\necho 'Tesla T4, 15360 MiB'\n")
    driver.chmod(0o755)
    assert dict(cmi.machine())["card"] == "Tesla T4, 15360 MiB; Tesla T4, 15360 MiB"
    driver.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert dict(cmi.machine())["card"] == "none"


def test_a_stage_that_fails_is_not_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = cmi.Config(output_path=tmp_path)
    before = list(cmi.STAGES)
    with cmi.stage("quiet", None):
        pass
    with pytest.raises(KeyError), cmi.stage("broken", cfg):
        raise KeyError
    assert before == cmi.STAGES
    assert not (tmp_path / "logs").exists()
    assert "ends=" not in capsys.readouterr().out


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=10000",
)  # fmt: skip
MEASURE = """<script>onload = () => {
 document.querySelectorAll("details").forEach(d => d.open = true);
 const letters = [...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
 const scrolls = [...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth);
 parent.postMessage(JSON.stringify({page: document.documentElement.scrollWidth, seen: innerWidth,
  letters: Math.min(...letters), scrolls: scrolls.length}), "*"); }</script></body>"""
FRAME = """<body style="margin:0;background:#fff"><iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>
<script>onmessage = e => document.body.append("MEASURED" + e.data + "END")</script></body>"""


@pytest.fixture(params=[390, 1280], ids=["phone", "desktop"])
def shown(
    request: pytest.FixtureRequest, made: tuple[Path, Path, str], tmp_path: Path
) -> tuple[int, dict[str, float], Any]:
    """Width, measures and picture of the report in a frame of that width, as Chromium shows it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    image = pytest.importorskip("PIL.Image")
    text = (made[0] / "report" / "index.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=request.param))
    picture = tmp_path / "picture.png"
    size = f"--window-size={max(request.param, 600)},3000"  # narrower windows do not exist
    told = [
        subprocess.run(
            [CHROMIUM, *FLAGS, size, f"--user-data-dir={tmp_path / what}", f"--{what}", frame.as_uri()],
            capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path,
        ).stdout
        for what in ("dump-dom", f"screenshot={picture}")
    ]  # fmt: skip
    (measured,) = re.findall(r"MEASURED(.*?)END", told[0].rsplit("</script>", 1)[1])
    return request.param, json.loads(measured), np.asarray(image.open(picture).convert("RGB"))


def test_a_browser_shows_it_at_any_width(shown: tuple[int, dict[str, float], Any]) -> None:
    width, measured, picture = shown
    assert measured["seen"] == width
    assert measured["page"] <= width, "the page scrolls sideways"
    assert measured["letters"] >= 9, "letters of a plot that nobody can read"
    if width == 390:
        assert measured["scrolls"] >= 1, "the confusion matrix scrolls by itself"
    seen = picture[:, :width].reshape(-1, 3)
    assert len(np.unique(seen[::7], axis=0)) > 100
    for ink in ((0, 114, 178), (230, 159, 0)):  # bars and anchors
        assert (seen == ink).all(axis=1).sum() > 200
    thirds = np.array_split(picture[:, :width], 3)
    assert all(part.std() > 5 for part in thirds), "a third of the picture is blank"
