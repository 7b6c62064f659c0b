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
from typing import Any, NamedTuple
from xml.etree import ElementTree

import made
import numpy as np
import polars as pl
import pytest
from runs import Patch, Printed, Road, said
from sklearn.metrics import confusion_matrix, f1_score
from test_score import plain_score

import cmi_pipeline as cmi

HOSTILE = "SUBJ_<script>alert('x')</script>&amp;$x_1$"
TITLES = ["Result", "Subjects", "F1 and confusion", "Calibration", "Learning curves", "Features"]
TITLES += ["Gallery", "Time line", "Submission", "Set-up"]
COLUMNS = ("name", "begin", "secs", "peak_mb", "note")
VALUES = [("reading", 0.5, 2.5, 123.4, ""), ("lgbm", 3.0, 0.25, 200.0, "reused")]
STAGES = [dict(zip(COLUMNS, row, strict=True)) for row in VALUES]
CURVES = {"all/fold00": (0.3, 0.4), "all/fold01_seed1": (0.2, 0.5), "imu/fold00": (0.6,),
          "all/fold07": (0.9,)}  # fmt: skip
LENGTHS = np.random.default_rng(5).integers(9, 16, 72).tolist()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--virtual-time-budget=10000", "--dump-dom"]
MEASURE = """<script>onload = () => {
 document.querySelectorAll("details").forEach(part => part.open = true);
 const wide = [...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth);
 const cued = wide.filter(s => getComputedStyle(s).backgroundImage.includes("gradient"));
 const page = document.documentElement, [paper, ink] = [getComputedStyle(page).backgroundColor,
   getComputedStyle(document.querySelector("p")).color].map(c => c.match(/\\d+/)[0]);
 parent.postMessage([innerWidth, page.scrollWidth, cued.length, paper, ink].join(), "*");
}</script></body>"""
FRAME = '<iframe src="page.html" style="border:0;width:{}px;height:2000px"></iframe>'
HEAR = '<script>onmessage = e => document.body.append("MEASURED " + e.data + " END")</script>'


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
        head, *lines = self.table(title, number)
        return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def page_of(run: cmi.Outcome | None, cfg: cmi.Config) -> Page:
    cmi.write_report(run, cfg)
    return Page((cfg.out / "report" / "index.html").read_text())


def oof(out: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    proba = np.load(out / "oof" / f"oof_{part.replace('/', '_')}_proba.npy")
    return proba.argmax(axis=1), proba


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
    row = {"score": 0.61, "low": 0.5, "high": 0.7, "folds": [0.6, 0.62]}
    row |= dict.fromkeys(("log_loss", "ece", "secs", "difference"))
    kinds = [(k, m) for k in ("nested", "optimistic", "assigned") for m in ("all", "imu", "mixed")]
    rows = [{"name": "blend", "mode": mode, "kind": kind} | row for kind, mode in kinds]
    row |= {"difference": {"score": -0.0123, "low": -0.03, "high": 0.0042}, "log_loss": 1.2345}
    row |= {"ece": 0.0567, "secs": 12.3}
    rows.append({"name": "lgbm", "mode": "all", "kind": "member"} | row)
    (out / "oof" / "scores.json").write_text(json.dumps({"rows": rows}))
    pool = {"parts": ["lgbm/all", "lgbm/imu", "torch/all"], "weights": [0.5, 0.25, 0.75]}
    imu = {"parts": ["lgbm/imu", "torch/imu"], "weights": [1.5, 0]}
    content = {"modes": {"all": pool, "imu": imu}}
    (out / "ensemble" / "weights.json").write_text(json.dumps(content))
    columns = "mode,feature,gain_mean,gain_std,split_mean,split_std\n"
    gains = "all,b&b,1.5,,1,0\nimu,c,9,1,1,0\nall,a,22.25,2,1,0\n"
    (out / "feature_importance.csv").write_text(columns + gains)


def made_up(folder: Path) -> cmi.Outcome:
    """72 recordings of six subjects in three folds, with the files of their run."""
    out, data, rng = folder / "out", folder / "data <img src=x> [1]", np.random.default_rng(7)
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
    truth.reverse().write_parquet(out / "submission.parquet")
    cfg = cmi.Config(output_path=out, cmi_data_dir=data, n_folds=3, use_keras=False, strict=True)
    return cmi.Outcome(rec, labels, np.arange(72) % 3, cfg)


class Drawn(NamedTuple):
    """A made-up run, its page, and the axes of what is drawn by the text that stands for it."""

    run: cmi.Outcome
    page: Page
    axes: dict[str, Any]

    def axes_of(self, text: str) -> Any:
        return next(axes for alt, axes in self.axes.items() if text in alt)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """No time goes into pixels."""
    run, axes = made_up(tmp_path_factory.mktemp("run")), {}
    for place, scores in CURVES.items():
        rows = [f"{e},{2 * s},{3 * s if e > 1 else ''},0.001,{s}" for e, s in enumerate(scores, 1)]
        path = run.cfg.out / "torch_models" / f"{place}_train.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["epoch,train_loss,val_loss,lr,score", *rows, ""]))

    def keep(drawing: Any, alt: str) -> str:
        axes[alt.lower()] = drawing.axes
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmi, "STAGES", STAGES)
        patch.setattr(cmi, "image_html", keep)
        return Drawn(run, page_of(run, run.cfg), axes)


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


def test_one_file_that_loads_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    run = made_up(tmp_path)
    page = page_of(run, run.cfg)
    check_page(page, (run.cfg.out / "report" / "index.html").read_text())
    assert "Simulated data" in page.head
    assert f"{run.cfg.data_dir} · 72 recordings, 6 subjects, 3 folds" in page.head
    assert "trained elsewhere" in page.text("Learning curves")
    (run.cfg.data_dir / "test_truth.csv").unlink()
    monkeypatch.setattr(cmi, "image_html", lambda *_: "")
    page = page_of(run, run.cfg)
    assert "Simulated" not in page.head
    assert "score" not in page.text("Submission")


def shares(page: Page, title: str) -> list[list[float]]:
    """Where the bars in a table begin and end, in percent."""
    bars = [str(box.get("style")) for box in page.parts[title].iter("div") if box.get("style")]
    return [[float(p) for p in re.findall(r"([\d.]+)%", bar)] for bar in bars]


def test_tables_of_scores_weights_gains_and_settings(drawn: Drawn) -> None:
    page, kinds, modes = drawn.page, ("nested", "assigned"), ("all", "imu", "mixed")
    assert all(f"0.6100{kind}, {mode}" in page.head for kind in kinds for mode in modes)
    member = page.rows("Result")["lgbm"]
    shown = [member[n] for n in ("score", "low", "high", "log loss", "ece", "secs", "difference")]
    assert shown[:6] == ["0.6100", "0.5000", "0.7000", "1.2345", "0.0567", "12.3"]
    assert shown[6].split() == ["-0.0123", "-0.0300", "0.0042"]
    assert member["folds"].split() == ["0.6000", "0.6200"]
    weights = page.table("Result", 1)[1:]
    assert weights[1] == ["all", "lgbm/imu", "0.2500"]
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


def test_f1_and_confusion_are_scikit_learns(drawn: Drawn) -> None:
    truth = drawn.run.labels.gesture
    for number, mode in enumerate(("all", "imu")):
        answer, _ = oof(drawn.run.cfg.out, f"blend/{mode}")
        columns = zip(*drawn.page.table("F1 and confusion", number)[1:], strict=True)
        names, recordings, f1, _, *counts = columns
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


def test_subjects_and_orientations(drawn: Drawn) -> None:
    truth, (answer, _) = drawn.run.labels.gesture, oof(drawn.run.cfg.out, "blend/all")
    groups = (np.array(cmi.ORIENTATIONS)[drawn.run.labels.orientation], drawn.run.rec.subject)
    for number, group in enumerate(groups):
        rows = drawn.page.rows("Subjects", number)
        assert set(rows) == set(group)
        for name, row in rows.items():
            t, a = truth[group == name], answer[group == name]
            expected = (len(t), (t == a).mean(), plain_score(t, a))
            shown = [float(row[key]) for key in ("recordings", "accuracy", "score")]
            assert shown == pytest.approx(expected, abs=6e-5)
    scores = [float(row["score"]) for row in rows.values()]
    assert scores == sorted(scores)
    dots = drawn.axes_of("subject")[0].collections[0].get_offsets()
    folds = [[HOSTILE, *"ABCDE"].index(name) % 3 for name in rows]
    places = [*zip(scores, folds, strict=True)]
    np.testing.assert_allclose(sorted(map(tuple, dots)), places, atol=6e-5)


def test_curves_of_each_fold(drawn: Drawn) -> None:
    """Those of other folds, which an earlier run left, are none."""
    upper, lower = drawn.axes_of("torch")
    scores = [curve.get_xydata().tolist() for curve in upper.lines]
    assert scores == [[[1, 0.3], [2, 0.4]], [[1, 0.2], [2, 0.5]], [[1, 0.6]]]
    losses = [curve.get_ydata() for curve in lower.lines]
    expected = [[np.nan, 1.2], [0.6, 0.8], [np.nan, 1.5], [0.4, 1.0], [np.nan], [1.2]]
    for curve, values in zip(losses, expected, strict=True):
        np.testing.assert_allclose(curve, values)
    assert [curve.get_linestyle() for curve in lower.lines] == ["-", ":"] * 3


def test_the_gallery_begins_with_confident_mistakes(drawn: Drawn) -> None:
    page, out, truth = drawn.page, drawn.run.cfg.out, drawn.run.labels.gesture
    answer, proba = oof(out, "blend/all")
    costly = [i for i in range(72) if min(truth[i], 8) != min(answer[i], 8)]
    costly = sorted(costly, key=lambda i: -proba[i].max())[:18]
    shown = [int(name) for name in re.findall(r"SEQ_(\d+)", page.text("Gallery"))]
    assert shown[: len(costly)] == costly
    assert all(truth[i] == answer[i] for i in shown[len(costly) :])
    for number, i in enumerate(shown):
        for part, words in page.table("Gallery", number)[1:]:
            p = oof(out, part)[1][i]
            best = sorted(range(18), key=lambda g: -p[g])[:3]
            texts = [f"{cmi.GESTURES[g]} {p[g]:.2f}{' ✓' if g == truth[i] else ''}" for g in best]
            assert words.split("\n") == texts


def test_a_recording_is_drawn_as_measured(drawn: Drawn) -> None:
    alt, (above, _, below) = next((a, axes) for a, axes in drawn.axes.items() if "seq_" in a)
    i, rec = int(alt.split("seq_")[1]), drawn.run.rec
    first, last = rec.start[i], rec.start[i + 1] - 1
    for curve, values in zip(above.lines, rec.acc[first : last + 1].T, strict=False):
        np.testing.assert_array_equal(curve.get_ydata(), values)
    begin = first + LENGTHS[i] // 2
    moments = [begin + round((last - begin) * k / 6) for k in range(7)]
    (image,) = below.images
    seen = np.ma.filled(image.get_array().astype(float), np.nan)
    for k, row in enumerate(moments, 1):
        for sensor in range(5):
            tile = seen[9 * sensor : 9 * sensor + 8, 9 * k : 9 * k + 8]
            codes = rec.tof[row, sensor].astype(float)
            np.testing.assert_array_equal(tile, np.where(codes == 255, np.nan, codes))
    assert image.get_clim() == (0, 249)
    assert 0 < image.cmap(1.5)[3] < 1, "nothing in range is grey"
    assert image.cmap(np.nan)[3] == 0, "missing is blank"


def test_time_line_and_submission(drawn: Drawn) -> None:
    page = drawn.page
    bars = page.parts["Time line"].findall(".//div[@style]")
    np.testing.assert_allclose(shares(page, "Time line"), [[15.4, 92.3], [92.3, 100]])
    colours = [re.findall("#[0-9a-fA-F]{6}", str(bar.get("style"))) for bar in bars]
    assert colours[0] != colours[1], "what was reused looks another way"
    line = [cell.strip() for cell in page.table("Time line")[2]]
    assert line == ["lgbm", "", "3.0000", "0.2500", "200.0", "reused"]
    counts = [int(row[1]) for row in page.table("Submission")[1:]]
    assert counts == [1, 1, 1, *[0] * 6, 2, *[0] * 8]
    assert [end for _, end in shares(page, "Submission")] == [50 * n or 0.5 for n in counts]
    assert page.table("Submission", 1)[1] == ["SEQ_4", cmi.GESTURES[9]]
    assert "5 rows, score 1.0000" in page.text("Submission")


def test_a_failure_costs_no_run(tmp_path: Path, capsys: Printed, monkeypatch: Patch) -> None:
    run = made_up(tmp_path)
    lenient = cmi.dataclasses.replace(run.cfg, strict=False)
    (run.cfg.out / "oof" / "oof_blend_all_proba.npy").write_text("{")
    cmi.write_report(run, lenient)
    assert re.search(r"warning .*left_out=.*index.html +why=", said(capsys))
    assert not (run.cfg.out / "report").exists()
    with pytest.raises(ValueError, match="pickle"):
        cmi.write_report(run, run.cfg)
    monkeypatch.setitem(cmi.sys.modules, "matplotlib", None)
    cmi.write_report(run, lenient)
    assert re.search("warning .*left_out=.*index.html .*matplotlib", said(capsys))


def test_a_run_that_only_served_is_reported_and_shown(tmp_path: Path, monkeypatch: Patch) -> None:
    displayed: list[str] = []
    shown = {"IFrame": lambda *_, extras: extras[0], "display": displayed.append}
    display = types.SimpleNamespace(**shown)
    shell = types.SimpleNamespace(get_ipython=lambda: None, display=display)
    monkeypatch.setitem(cmi.sys.modules, "IPython", shell)
    cfg = cmi.Config(output_path=tmp_path, cmi_data_dir=tmp_path, strict=True)
    page = page_of(None, cfg)
    assert list(page.parts) == TITLES[-3:]
    assert "Nothing was trained" in page.head
    assert "nothing was served" in page.text("Submission")
    assert displayed == []  # IPython was imported, but no notebook runs
    shell.get_ipython = object
    cmi.write_report(None, cfg)
    (frame,) = re.findall(r'^srcdoc="([^"]*)"$', displayed[0])
    text = (tmp_path / "report" / "index.html").read_text()
    assert html.unescape(frame) == text, "in a frame the notebook's own page keeps its style"


def test_a_real_run_has_every_part(road: Road) -> None:
    out, _ = road
    text = (out / "report" / "index.html").read_text()
    check_page(page := Page(text), text)
    curves = [image.get("alt") for image in page.parts["Learning curves"].iter("img")]
    assert sorted(curves) == [f"Training of {name}" for name in ("keras", "lgbm", "torch")]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_at_any_width_and_light(road: Road, tmp_path: Path) -> None:
    """It does not scroll sideways, but wide tables do and show it; ink and paper differ."""
    text = (road[0] / "report" / "index.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE))
    frames = tmp_path / "frames.html"
    frames.write_text(f"<body>{FRAME.format(390)}{FRAME.format(1280)}{HEAR}</body>")
    flags = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    for scheme in (0, 1):  # dark, light
        command = [*flags, f"--blink-settings=preferredColorScheme={scheme}", frames.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=500).stdout
        measured = re.findall(r"MEASURED (\d+),(\d+),(\d+),(\d+),(\d+) END", shown)
        assert sorted(int(width) for width, *_ in measured) == [390, 1280]
        for width, page_width, cued, paper, ink in (map(int, found) for found in measured):
            assert page_width <= width
            assert cued >= 2 or width == 1280
            assert (paper > 200 and ink < 60) if scheme else (paper < 60 and ink > 200)
