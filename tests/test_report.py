"""The report of a made-up run, its figures against scikit-learn and slow loops; a real page."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import made
import numpy as np
import polars as pl
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, f1_score

import cmi_pipeline as cmi

HOSTILE = "SUBJ_<script>alert('x')</script>&amp;$x_1$"
TITLES = ["Result", "Subjects", "F1 and confusion", "Calibration", "Learning curves", "Features"]
TITLES += ["Gallery", "Time line", "Submission", "Set-up"]
LENGTHS = np.random.default_rng(5).integers(9, 16, 72).tolist()


class Page:
    """A page by its sections. Any tag that is not closed, any text that is not escaped, fails."""

    def __init__(self, text: str) -> None:
        self.tree = ElementTree.fromstring(text)
        self.parts = {str(p.findtext("h2")): p for p in self.tree.iter("section")}
        self.head = "".join(next(self.tree.iter("header")).itertext())

    def text(self, title: str) -> str:
        return "".join(self.parts[title].itertext())

    def table(self, title: str, number: int = 0) -> list[list[str]]:
        lines = list(self.parts[title].iter("table"))[number]
        return [["".join(cell.itertext()) for cell in line] for line in lines]

    def rows(self, title: str, number: int = 0) -> dict[str, dict[str, str]]:
        """By the first cell of each row and the name of each column."""
        head, *lines = self.table(title, number)
        return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def page_of(run: cmi.Outcome | None, cfg: cmi.Config) -> Page:
    cmi.write_report(run, cfg)
    return Page((cfg.out / "report" / "index.html").read_text())


def oof(out: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Answers and probabilities, from the files alone."""
    proba = np.load(out / "oof" / f"oof_{part.replace('/', '_')}_proba.npy")
    return proba.argmax(axis=1), proba


def competition_score(truth: np.ndarray, answer: np.ndarray) -> float:
    t, p = np.minimum(truth, 8), np.minimum(answer, 8)
    macro = f1_score(t, p, average="macro", zero_division=0)
    return float(f1_score(t < 8, p < 8, zero_division=0) + macro) / 2


def write_run_files(out: Path, gesture: np.ndarray) -> None:
    """Probabilities that lean to the truth, a result table, weights and gains."""
    rng = np.random.default_rng(6)
    for folder in ("oof", "ensemble", "logs"):
        (out / folder).mkdir(parents=True)
    for part in ("lgbm_all", "lgbm_imu", "torch_all", "torch_imu", "blend_all", "blend_imu"):
        proba = rng.dirichlet(np.full(18, 0.3), 72) + 0.4 * np.eye(18)[gesture]
        proba[:, 4] = 0
        proba /= proba.sum(axis=1, keepdims=True)
        np.save(out / "oof" / f"oof_{part}_proba.npy", proba.astype(np.float32))
    row = {"score": 0.61, "low": 0.5, "high": 0.7, "folds": [0.6, 0.62], "log_loss": None}
    row |= {"ece": None, "secs": None, "difference": None}
    kinds = [(k, m) for k in ("nested", "optimistic", "assigned") for m in ("all", "imu", "mixed")]
    rows = [{"name": "blend", "mode": mode, "kind": kind} | row for kind, mode in kinds]
    row |= {"difference": {"score": -0.0123, "low": -0.03, "high": 0.0042}, "log_loss": 1.2345}
    rows.append(
        {"name": "lgbm", "mode": "all", "kind": "member"} | row | {"ece": 0.0567, "secs": 12.3}
    )
    (out / "oof" / "scores.json").write_text(json.dumps({"rows": rows}))
    pool = {"parts": ["lgbm/all", "lgbm/imu", "torch/all"], "weights": [0.5, 0.25, 0.75]}
    imu = {"parts": ["lgbm/imu", "torch/imu"], "weights": [1.5, 0]}
    content = {"modes": {"all": pool, "imu": imu}}
    (out / "ensemble" / "weights.json").write_text(json.dumps(content))
    columns = "mode,feature,gain_mean,gain_std,split_mean,split_std\n"
    gains = "all,b&b,1.5,,1,0\nimu,c,9,1,1,0\nall,a,22.25,2,1,0\n"
    (out / "feature_importance.csv").write_text(columns + gains)


@pytest.fixture
def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cmi.Outcome:
    """72 recordings of six subjects in three folds, with the files of their run."""
    out, data, rng = tmp_path / "out", tmp_path / "data <img src=x> [1]", np.random.default_rng(7)
    subject = np.array([HOSTILE, *"ABCDE"])[np.arange(72) % 6]
    rec = made.changed(made.recordings(LENGTHS), subject=subject)
    gesture = np.delete(np.arange(18), 4)[rng.integers(0, 17, 72)]  # one target never occurs
    phase = np.concatenate([np.arange(n) >= n // 2 for n in LENGTHS]).astype(np.uint8)
    labels = cmi.Labels.of(gesture, rng.integers(0, 4, 72), rng.integers(0, 2, 72), phase)
    write_run_files(out, gesture)
    data.mkdir()
    names, answers = [f"SEQ_{i}" for i in range(5)], [cmi.GESTURES[i] for i in (0, 1, 2, 9, 9)]
    truth = pl.DataFrame({"sequence_id": names, "gesture": answers})
    (data / "test_truth.csv").write_text(truth.write_csv())
    given = {"sequence_id": names[::-1], "gesture": [answers[i] for i in (4, 4, 2, 1, 0)]}
    pl.DataFrame(given).write_parquet(out / "submission.parquet")
    columns = ("name", "begin", "secs", "peak_mb", "note")
    values = [("reading", 0.5, 2.5, 123.4, ""), ("lgbm", 3.0, 0.25, 200.0, "reused")]
    stages = [dict(zip(columns, row, strict=True)) for row in values]
    monkeypatch.setattr(cmi, "STAGES", stages)
    cfg = cmi.Config(output_path=out, cmi_data_dir=data, n_folds=3, use_keras=False, strict=True)
    return cmi.Outcome(rec, labels, np.arange(72) % 3, cfg)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Axes of what is drawn, by the text that stands for the picture; no time goes into pixels."""
    axes: dict[str, Any] = {}

    def keep(drawing: Any, alt: str) -> str:
        axes[alt.lower()] = drawing.axes
        return ""

    monkeypatch.setattr(cmi, "image_html", keep)
    return axes


def axes_of(drawn: dict[str, Any], text: str) -> Any:
    return next(axes for alt, axes in drawn.items() if text in alt)


def check_page(page: Page, text: str) -> None:
    """Every part is there, every link leads to one, every picture is inside and has words."""
    assert list(page.parts) == TITLES
    assert not re.search(r"https?:|@import|url\(|<script|<[^>]*\son\w+=", text)
    links = [str(a.get("href")) for a in page.tree.iter("a")]
    assert links == [f"#{part.get('id')}" for part in page.parts.values()]
    for image in page.tree.iter("img"):
        kind, _, content = str(image.get("src")).partition(";base64,")
        assert kind == "data:image/png"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
        assert image.get("alt")
    loads = [e for e in page.tree.iter() if {"src", "srcset", "data"} & set(e.keys())]
    assert {e.tag for e in loads} == {"img"}
    assert all(card.find("img") is not None for card in page.tree.iter("article"))


def test_one_file_that_loads_nothing(outcome: cmi.Outcome) -> None:
    page = page_of(outcome, outcome.cfg)
    check_page(page, (outcome.cfg.out / "report" / "index.html").read_text())
    assert "Simulated data" in page.head
    assert f"{outcome.cfg.data_dir} · 72 recordings, 6 subjects, 3 folds" in page.head
    assert "SERVE_ONLY" not in page.head
    assert "trained elsewhere" in page.text("Learning curves")


def shares(page: Page, title: str) -> list[list[float]]:
    """Where the bars in a table begin and end, in percent."""
    bars = [str(box.get("style")) for box in page.parts[title].iter("div") if box.get("style")]
    return [[float(p) for p in re.findall(r"([\d.]+)%", bar)] for bar in bars]


@pytest.mark.usefixtures("drawn")
def test_tables_of_scores_weights_gains_and_settings(outcome: cmi.Outcome) -> None:
    page = page_of(outcome, outcome.cfg)
    tiles = [
        f"0.6100{kind}, {m}" for kind in ("nested", "assigned") for m in ("all", "imu", "mixed")
    ]
    assert all(tile in page.head for tile in tiles)
    member = page.rows("Result")["lgbm"]
    shown = [member[n] for n in ("score", "low", "high", "log loss", "ece", "secs", "difference")]
    assert shown[:6] == ["0.6100", "0.5000", "0.7000", "1.2345", "0.0567", "12.3"]
    assert shown[6].split() == ["-0.0123", "-0.0300", "0.0042"]
    assert member["folds"].split() == ["0.6000", "0.6200"]
    weights = page.table("Result", 1)[1:]
    assert ["all", "lgbm/imu", "0.2500"] in weights
    assert ["imu", "lgbm/imu", "1.5000"] in weights
    assert len(weights) == 5
    gains = [(row[0], *row[2:]) for row in page.table("Features")[1:]]
    assert gains == [("a", "22.2", "2.0000"), ("b&b", "1.5000", "0.0000")]
    assert shares(page, "Features") == [[0, 100], [0, 6.7]]
    changed = page.rows("Set-up")
    assert set(changed) == {"CMI_DATA_DIR", "OUTPUT_PATH", "N_FOLDS", "USE_KERAS", "STRICT"}
    assert (changed["N_FOLDS"]["value"], changed["N_FOLDS"]["default"]) == ("3", "5")
    assert len(page.table("Set-up", 1)) - 1 == len(cmi.dataclasses.fields(cmi.Config))
    assert page.rows("Set-up", 1)["N_FOLDS"]["meaning"]
    here = {name: row["here"] for name, row in page.rows("Set-up", 2).items()}
    assert (here["numpy"], here["python"]) == (np.__version__, sys.version.split()[0])
    assert re.search(r"\d+ cores, \d+\.\d GB$", here["machine"])


@pytest.mark.usefixtures("drawn")
def test_f1_and_confusion_are_scikit_learns(outcome: cmi.Outcome) -> None:
    page, truth = page_of(outcome, outcome.cfg), outcome.labels.gesture
    for number, mode in enumerate(("all", "imu")):
        answer, _ = oof(outcome.cfg.out, f"blend/{mode}")
        columns = zip(*page.table("F1 and confusion", number)[1:], strict=True)
        names, recordings, f1, gold, *counts = columns
        assert [name.split(" ", 1)[1] for name in names] == list(cmi.GESTURES)
        own = np.array([[int(n or 0) for n in column] for column in counts]).T
        np.testing.assert_array_equal(own, confusion_matrix(truth, answer, labels=range(18)))
        assert [int(n) for n in recordings] == np.bincount(truth, minlength=18).tolist()
        t, p = np.minimum(truth, 8), np.minimum(answer, 8)
        expected = f1_score(t, p, average=None, labels=range(9), zero_division=0)
        shown = list(f1)
        assert shown.pop(4) == "–", "a gesture that neither occurs nor is answered"
        classes = np.delete(np.minimum(np.arange(18), 8), 4)
        np.testing.assert_allclose(np.float64(shown), expected[classes], atol=6e-5)
        assert len(set(gold[8:])) == 1


def test_subjects_and_orientations(outcome: cmi.Outcome, drawn: dict[str, Any]) -> None:
    page, truth = page_of(outcome, outcome.cfg), outcome.labels.gesture
    answer, _ = oof(outcome.cfg.out, "blend/all")
    groups = (np.array(cmi.ORIENTATIONS)[outcome.labels.orientation], outcome.rec.subject)
    for number, group in enumerate(groups):
        rows = page.rows("Subjects", number)
        assert set(rows) == set(group)
        for name, row in rows.items():
            t, a = truth[group == name], answer[group == name]
            expected = (len(t), (t == a).mean(), competition_score(t, a))
            shown = [float(row[key]) for key in ("recordings", "accuracy", "score")]
            assert shown == pytest.approx(expected, abs=6e-5)
    scores = [float(row["score"]) for row in rows.values()]
    assert scores == sorted(scores)
    dots = axes_of(drawn, "subject")[0].collections[0].get_offsets()
    folds = [[HOSTILE, *"ABCDE"].index(name) % 3 for name in rows]
    np.testing.assert_allclose(
        sorted(map(tuple, dots)), list(zip(scores, folds, strict=True)), atol=6e-5
    )


def test_reliability_is_scikit_learns(outcome: cmi.Outcome, drawn: dict[str, Any]) -> None:
    page_of(outcome, outcome.cfg)
    lines = axes_of(drawn, "confidence")[0].lines[1:]
    for mode, line in zip(("all", "imu"), lines, strict=True):
        answer, proba = oof(outcome.cfg.out, f"blend/{mode}")
        sure = proba.max(axis=1).astype(np.float64)
        right, mean = calibration_curve(answer == outcome.labels.gesture, sure, n_bins=10)
        np.testing.assert_allclose(line.get_xydata(), np.stack([mean, right], axis=1), atol=1e-6)


def test_curves_of_each_fold(outcome: cmi.Outcome, drawn: dict[str, Any]) -> None:
    for place, scores in (("all/fold00", (0.3, 0.4)), ("all/fold01_seed1", (0.2, 0.5)),
                          ("imu/fold00", (0.6,)), ("all/fold07", (0.9,))):  # of other folds  # fmt: skip
        rows = [f"{e},{2 * s},{3 * s if e > 1 else ''},0.001,{s}" for e, s in enumerate(scores, 1)]
        path = outcome.cfg.out / "torch_models" / f"{place}_train.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["epoch,train_loss,val_loss,lr,score", *rows, ""]))
    assert "lgbm" not in page_of(outcome, outcome.cfg).text("Learning curves")
    upper, lower = axes_of(drawn, "torch")
    assert [curve.get_xydata().tolist() for curve in upper.lines] == [
        [[1, 0.3], [2, 0.4]], [[1, 0.2], [2, 0.5]], [[1, 0.6]],
    ]  # fmt: skip
    losses = [curve.get_ydata() for curve in lower.lines]
    expected = [[np.nan, 1.2], [0.6, 0.8], [np.nan, 1.5], [0.4, 1.0], [np.nan], [1.2]]
    for curve, values in zip(losses, expected, strict=True):
        np.testing.assert_allclose(curve, values)
    assert [curve.get_linestyle() for curve in lower.lines] == ["-", ":"] * 3


@pytest.mark.usefixtures("drawn")
def test_the_gallery_begins_with_confident_mistakes(outcome: cmi.Outcome) -> None:
    page, truth = page_of(outcome, outcome.cfg), outcome.labels.gesture
    answer, proba = oof(outcome.cfg.out, "blend/all")
    costly = [i for i in range(72) if min(truth[i], 8) != min(answer[i], 8)]
    costly = sorted(costly, key=lambda i: -proba[i].max())[:18]
    shown = [int(name) for name in re.findall(r"SEQ_(\d+)", page.text("Gallery"))]
    assert shown[: len(costly)] == costly
    assert all(truth[i] == answer[i] for i in shown[len(costly) :])
    for number, i in enumerate(shown):
        for part, words in page.table("Gallery", number)[1:]:
            p = oof(outcome.cfg.out, part)[1][i]
            best = sorted(range(18), key=lambda g: -p[g])[:3]
            texts = [f"{cmi.GESTURES[g]} {p[g]:.2f}{' ✓' if g == truth[i] else ''}" for g in best]
            assert words.split("\n") == texts


def test_a_recording_is_drawn_as_measured(outcome: cmi.Outcome, drawn: dict[str, Any]) -> None:
    page_of(outcome, outcome.cfg)
    alt, (above, _, below) = next((a, axes) for a, axes in drawn.items() if "seq_" in a)
    i = int(alt.split("seq_")[1])
    first, last = outcome.rec.start[i], outcome.rec.start[i + 1] - 1
    for curve, values in zip(above.lines, outcome.rec.acc[first : last + 1].T, strict=False):
        np.testing.assert_array_equal(curve.get_ydata(), values)
    begin = first + LENGTHS[i] // 2
    moments = [begin + round((last - begin) * k / 6) for k in range(7)]
    (image,) = below.images
    seen = np.ma.filled(image.get_array().astype(float), np.nan)
    for k, row in enumerate(moments, 1):
        for sensor in range(5):
            tile = seen[9 * sensor : 9 * sensor + 8, 9 * k : 9 * k + 8]
            codes = outcome.rec.tof[row, sensor].astype(float)
            np.testing.assert_array_equal(tile, np.where(codes == 255, np.nan, codes))
    assert image.get_clim() == (0, 249)
    assert 0 < image.cmap(1.5)[3] < 1, "nothing in range is grey"
    assert image.cmap(np.nan)[3] == 0, "missing is blank"


@pytest.mark.usefixtures("drawn")
def test_time_line_and_submission(outcome: cmi.Outcome) -> None:
    page = page_of(outcome, outcome.cfg)
    bars = page.parts["Time line"].findall(".//div[@style]")
    np.testing.assert_allclose(shares(page, "Time line"), [[15.4, 92.3], [92.3, 100]])
    colours = [re.findall("#[0-9a-fA-F]{6}", str(bar.get("style"))) for bar in bars]
    assert colours[0] != colours[1], "what was reused looks another way"
    line = [cell.strip() for cell in page.table("Time line")[2]]
    assert line == ["lgbm", "", "3.0000", "0.2500", "200.0", "reused"]
    counts = [int(row[1]) for row in page.table("Submission")[1:]]
    assert counts == [1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert [end for _, end in shares(page, "Submission")] == [50] * 3 + [0.5] * 6 + [100] + [
        0.5
    ] * 8
    first = page.table("Submission", 1)[1]
    assert first == ["SEQ_4", cmi.GESTURES[9]]
    assert "5 rows, score 1.0000" in page.text("Submission")
    (outcome.cfg.data_dir / "test_truth.csv").unlink()
    page = page_of(outcome, outcome.cfg)
    assert "Simulated" not in page.head
    assert "score" not in page.text("Submission")


def test_a_run_that_only_served_is_reported_too(tmp_path: Path) -> None:
    page = page_of(None, cmi.Config(output_path=tmp_path, cmi_data_dir=tmp_path, strict=True))
    assert list(page.parts) == TITLES[-3:]
    assert "Nothing was trained" in page.head
    assert "nothing was served" in page.text("Submission")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, its long lines as one."""
    return " ".join(capsys.readouterr().out.split())


def test_without_matplotlib_the_log_says_so(
    outcome: cmi.Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cmi.sys.modules, "matplotlib", None)
    cmi.write_report(outcome, cmi.dataclasses.replace(outcome.cfg, strict=False))
    assert re.search("warning .*not_written=.*index.html .*matplotlib", said(capsys))


@pytest.mark.parametrize(
    "broken", ["ensemble/weights.json", "oof/oof_blend_all_proba.npy", "feature_importance.csv"]
)
@pytest.mark.usefixtures("drawn")
def test_a_failure_costs_no_run(
    outcome: cmi.Outcome, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    (outcome.cfg.out / broken).write_text("{")
    cmi.write_report(outcome, cmi.dataclasses.replace(outcome.cfg, strict=False))
    assert re.search(r"warning .*not_written=.*index.html +error=", said(capsys))
    assert not (outcome.cfg.out / "report").exists()
    with pytest.raises((ValueError, OSError, pl.exceptions.PolarsError)):
        cmi.write_report(outcome, outcome.cfg)


def test_in_a_notebook_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    displayed: list[str] = []
    shown = {"IFrame": lambda *_, extras: extras[0], "display": displayed.append}
    display = types.SimpleNamespace(**shown)
    shell = types.SimpleNamespace(get_ipython=lambda: None, display=display)
    monkeypatch.setitem(cmi.sys.modules, "IPython", shell)
    cfg = cmi.Config(output_path=tmp_path, cmi_data_dir=tmp_path, strict=True)
    cmi.write_report(None, cfg)
    assert displayed == []  # IPython was imported, but no notebook runs
    shell.get_ipython = object
    cmi.write_report(None, cfg)
    (frame,) = re.findall(r'^srcdoc="([^"]*)"$', displayed[0])
    page = (tmp_path / "report" / "index.html").read_text()
    assert html.unescape(frame) == page, "in a frame the notebook's own page keeps its style"


def test_a_real_run_has_every_part(road: tuple[Path, str]) -> None:
    out, _ = road
    text = (out / "report" / "index.html").read_text()
    page, truth = Page(text), np.load(out / "oof" / "y_true.npy")
    check_page(page, text)
    head, *lines = page.table("Result")
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    members = [row for row in rows if row["kind"] == "member" and row["mode"] in ("all", "imu")]
    folders = {path.name for path in out.glob("*_models")}
    assert {f"{row['name']}_models" for row in members} == folders
    for row in members:
        answer, proba = oof(out, f"{row['name']}/{row['mode']}")
        assert float(row["score"]) == pytest.approx(competition_score(truth, answer), abs=6e-5)
        proba = proba.astype(np.float64) / proba.sum(axis=1, keepdims=True, dtype=np.float64)
        expected = -np.log(np.maximum(proba[np.arange(len(truth)), truth], 1e-7)).mean()
        assert float(row["log loss"]) == pytest.approx(expected, abs=2e-3)
        assert float(row["low"]) <= float(row["score"]) <= float(row["high"])
    curves = [image.get("alt") for image in page.parts["Learning curves"].iter("img")]
    assert curves == [f"Training of {name}" for name in dict.fromkeys(r["name"] for r in members)]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--virtual-time-budget=10000"]
MEASURE = """<script>onload = () => {
 document.querySelectorAll("details").forEach(part => part.open = true);
 const wide = [...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth);
 const cued = wide.filter(s => getComputedStyle(s).backgroundImage.includes("gradient"));
 parent.postMessage([innerWidth, document.documentElement.scrollWidth, cued.length].join(), "*");
}</script></body>"""
FRAMES = """<body style="margin:0">
<iframe src="page.html" style="border:0;width:390px;height:2000px"></iframe>
<iframe src="page.html" style="border:0;width:1280px;height:2000px"></iframe>
<script>onmessage = e => document.body.append("MEASURED " + e.data + " END")</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_at_any_width_and_light(road: tuple[Path, str], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    text = (road[0] / "report" / "index.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE))
    frames, paper = tmp_path / "frames.html", {}
    frames.write_text(FRAMES)
    flags = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(*more: str) -> str:
        command = [*flags, "--window-size=1700,2000", *more, frames.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=500).stdout

    measured = re.findall(r"MEASURED (\d+),(\d+),(\d+) END", browse("--dump-dom"))
    assert sorted(int(width) for width, *_ in measured) == [390, 1280]
    for width, page_width, wide_tables in measured:
        assert int(page_width) <= int(width), "the page scrolls sideways"
        assert int(wide_tables) >= 2 or width == "1280", (
            "wide tables scroll by themselves and show it"
        )
    for scheme in (0, 1):  # dark, light
        file = tmp_path / f"{scheme}.png"
        browse(f"--screenshot={file}", f"--blink-settings=preferredColorScheme={scheme}")
        pixels = np.asarray(image.open(file).convert("L"), np.int64)[:, :390]
        paper[scheme] = np.median(pixels)
        assert np.abs(pixels - paper[scheme]).max() > 150, "nothing can be read on the paper"
    assert paper[0] < 60 < 200 < paper[1]
