"""Nothing let in: hostile bundles are refused unexecuted, hostile recordings answered all the same."""

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from runs import Printed, Road, copied, data_of, questions, run_here

import cmi_pipeline as cmi

NAN, INF = float("nan"), float("inf")
Spoil = Callable[[str, bytes | str], Path]
Change = Callable[[pl.DataFrame], pl.DataFrame]
LABELS = ([[0, 0, 10**30]], [[0, 0, -1]], [[0, 0]], [], 7, [[0.5, 0, 1]], [["a", 0, 0]],
          [[1, 2], [1]])  # fmt: skip
STEMS = (["../../secret"], ["/etc/passwd"], ["fold00/../fold01"], ["fold00\n"], ["fold0٣"],
         ["fold0"], "fold00", [0], 7)  # fmt: skip
FILES = {"/../../../folds.csv": "x"}, {".txt": "", "/../x.txt": ""}, ["x"], {}, None
SIX = {"parts": ["lgbm/all", "torch/all", "keras/all", "lgbm/imu", "torch/imu", "keras/imu"]}
WEIGHTS = [NAN] * 6, [INF, 0, 0, 0, 0, 0], [2, -1, 0, 0, 0, 0], [1], [[1] * 6], [10**400] * 6, None
MODES = {}, [1], {"all": None}, {"other": SIX | {"weights": [1] * 6}}
WEARERS = {"prior": 1, "coefficients": [1.0]}, {"prior": NAN, "coefficients": [1.0] * 30}, "x"
SPECS: tuple[dict[str, Any], ...] = (
    {"width": 10**9}, {"width": "os.system('x')"}, {"pad_len": 10**12}, {"groups": None},
    {"groups": [["imu", ["x"]]]}, {"table": [[0, 0, 10**12]]}, {"table": 7}, {"sd": None},
    {"mean": [0.0]},
)  # fmt: skip
SCALES = (("mean", NAN), ("mean", INF), ("sd", 0.0), ("sd", NAN), ("sd", INF))
BROKEN: dict[str, list[dict[str, Any]]] = {
    "lgbm_models/bundle.json": [
        *({"labels": labels} for labels in LABELS),
        *({"modes": {"all": stems}} for stems in STEMS),
    ],
    "lgbm_models/all/fold00.json": [{"files": files} for files in FILES],
    "ensemble/weights.json": [
        *({"labels": labels} for labels in LABELS),
        *({"modes": {"all": SIX | {"weights": weights}}} for weights in WEIGHTS),
        *({"modes": modes} for modes in MODES),
        *({"wearer": wearer} for wearer in WEARERS),
        *({"capacity": capacity} for capacity in ([1], [0] * 56, [10**7] * 56, "x")),
        *({"digests": [1]}, {"assignment": [1]}),
    ],
    "torch_models/imu/fold01_spec.json": [*SPECS],
}
Answered = Callable[[str, Change, Change], bool]


@pytest.fixture(scope="module")
def bundles(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and weights of the full run, to be spoilt; each test puts back what it spoils."""
    return copied(road[0], tmp_path_factory.mktemp("bundles") / "out", "report", "logs")


@pytest.fixture
def spoil(bundles: Path) -> Iterator[Spoil]:
    """Write other content into a file of the bundles, and its digest into the note beside it."""
    before: dict[Path, bytes] = {}

    def write(name: str, content: bytes | str) -> Path:
        path = bundles / name
        note = path.with_name(f"{path.name[:6]}.json")
        for touched in {path, note if note.is_file() else path}:
            before.setdefault(touched, touched.read_bytes())
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if note.is_file() and note != path:
            noted = json.loads(before[note])
            noted["files"][path.name[6:]] = cmi.digest(path.read_bytes())
            note.write_text(json.dumps(noted))
        return path

    yield write
    for path, content in before.items():
        path.write_bytes(content)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from a bundle was executed"


def asked(bundles: Path, *members: str, strict: bool = True) -> dict[str, float]:
    uses: dict[str, Any] = {f"use_{m}": m in members for m in cmi.MEMBERS}
    predictor = cmi.Predictor(cmi.Config(output_path=bundles, strict=strict, **uses))
    return predictor.predict_proba(*questions(data_of(bundles))[0])


def load(bundles: Path, member: str, mode: str) -> Any:
    bundle = json.loads((bundles / f"{member}_models" / "bundle.json").read_text())
    folder, table = bundles / f"{member}_models" / mode, np.array(bundle["labels"])
    return cmi.MEMBERS[member].load(folder, bundle["modes"][mode], table, cmi.Config())


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def proven(marker: Path, run: Callable[[], Any]) -> None:
    """Code that is to be refused does what it is there for, if it is run."""
    run()
    assert marker.exists()
    marker.unlink()


def live_pickle(marker: Path, protocol: int = 4) -> bytes:
    raw = pickle.dumps(Payload(marker), protocol)
    proven(marker, lambda: pickle.loads(raw).close())
    return raw


@pytest.mark.parametrize("name", BROKEN)
def test_json_is_refused(bundles: Path, spoil: Spoil, marker: Path, name: str, capsys: Any) -> None:
    """Of another shape, with names that lead elsewhere. Unless strict, the rest answers without it."""
    whole, member = json.loads((bundles / name).read_text()), "torch" if "spec" in name else "lgbm"
    raw = [live_pickle(marker, 0), live_pickle(marker), "[" * 200_000, "", "{", "[]", "7", "null"]
    scales = [{k: [v] * len(whole["sd"])} for k, v in SCALES if "sd" in whole]
    for content in raw + [json.dumps(whole | entries) for entries in BROKEN[name] + scales]:
        path = spoil(name, content)
        with pytest.raises(cmi.DataError, match=str(path)):
            print(content[-300:], asked(bundles, member))
    if name.startswith("ensemble"):
        assert sum(asked(bundles, "lgbm", strict=False).values()) == pytest.approx(1, abs=1e-5)
        assert f"left_out={path}" in capsys.readouterr().out


def torch_files(whole: bytes, marker: Path) -> dict[str, bytes]:
    """Files that pose as a network."""
    import torch

    def saved(content: Any, **how: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **how)
        return file.getvalue()

    state = torch.load(io.BytesIO(whole), weights_only=True)
    first = next(iter(state))
    evil = saved(state | {"x": Payload(marker)})
    proven(marker, lambda: torch.load(io.BytesIO(evil), weights_only=False)["x"].close())
    return {
        "code beside weights": evil,
        "code for a tensor": saved(state | {first: Payload(marker)}),
        "code, old format": saved(Payload(marker), _use_new_zipfile_serialization=False),
        "a whole module": saved(torch.nn.Linear(2, 2)),
        "half": whole[: len(whole) // 2],
        "nothing": b"",
        "a tensor short": saved({k: v for k, v in state.items() if k != first}),
        "a tensor of another shape": saved(state | {first: torch.zeros(3)}),
    }


def test_hostile_torch_files(
    bundles: Path, spoil: Spoil, marker: Path, tmp_path: Path, capsys: Printed
) -> None:
    """In serving the others answer; the command, whose plan takes them for good, stops with a line."""
    name = "torch_models/all/fold01.pt"
    files = torch_files((bundles / name).read_bytes(), marker)
    for case, raw in files.items():
        path = spoil(name, raw)
        with pytest.raises(cmi.DataError, match=str(path)):
            print(case, load(bundles, "torch", "all"))
    assert asked(bundles, "lgbm", "torch", strict=False)
    printed = capsys.readouterr().out
    assert "left_out=torch/all" in printed
    assert "models=lgbm/all,lgbm/imu,lgbm/norot,torch/imu " in printed
    spoil(name, files["code beside weights"])
    settings = {"TORCH_BUNDLE_PATH": str(path.parents[1]), "CMI_DATA_DIR": str(data_of(bundles))}
    (tmp_path / "out").mkdir()
    shutil.copy(bundles / "folds.csv", tmp_path / "out")
    line = run_here(tmp_path / "out", USE_LGBM="0", USE_KERAS="0", **settings) or ""
    assert line.startswith(f"cmi_pipeline: {path} ")


def test_hostile_keras_files(bundles: Path, spoil: Spoil, marker: Path, tmp_path: Path) -> None:
    name = "keras_models/imu/fold01.keras"
    load(bundles, "keras", "imu")  # it imports what TensorFlow makes impossible later
    import keras

    def saved(*layers: Any) -> bytes:
        keras.Sequential([keras.Input((2,)), *layers]).save(tmp_path / "x.keras")
        return (tmp_path / "x.keras").read_bytes()

    source = f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]"
    evil, whole = saved(keras.layers.Lambda(eval(source))), (bundles / name).read_bytes()
    marker.unlink(missing_ok=True)
    read = keras.models.load_model
    proven(marker, lambda: read(tmp_path / "x.keras", safe_mode=False)(np.zeros((1, 2))))
    other = saved(keras.layers.Dense(2))
    for raw in (evil, live_pickle(marker), whole[: len(whole) // 2], b"", other):
        spoil(name, raw)
        with pytest.raises(cmi.DataError, match="keras_models"):
            load(bundles, "keras", "imu")


def test_lightgbm_texts_that_are_not_whole_are_refused(bundles: Path, spoil: Spoil) -> None:
    """LightGBM itself would end the process with some of them."""
    name = "lgbm_models/all/fold00.txt"
    whole = (bundles / name).read_text()
    (head, tree), end = whole.split("\nTree=0\n", 1), whole.index("\nend of trees")
    for text in (
        *(whole[:cut] for cut in np.random.default_rng(3).integers(0, end, 40)),
        whole[: end // 2] + "\nend of trees\n",
        head + "\nend of trees\n",
        head + "\nTree=0\n" + "\x00\x01garbage=1\n" * 500 + "end of trees\n",
        head + "\nTree=1\n" + tree.split("\nTree=1\n", 1)[1],
        head + "\nTree=0\n\nTree=0\n" + tree,
        whole.replace("num_class=18", "num_class=180000000", 1),
        re.sub(r"tree_sizes=.*\n", "", whole),
        re.sub(r"feature_names=\S+", "feature_names=evil", whole),
    ):
        assert text != whole
        spoil(name, text)
        with pytest.raises(cmi.DataError, match="lgbm_models"):
            print(text[-300:], load(bundles, "lgbm", "all"))
    spoil(name, whole)
    assert len(load(bundles, "lgbm", "all")) == 2


@pytest.fixture(scope="module")
def is_answered(road: Road) -> Answered:
    """Whether LightGBM and Torch answer; else a gesture comes all the same, counted with a cause."""
    predictor = cmi.Predictor(cmi.Config(output_path=road[0], use_keras=False))
    asked = sorted(questions(data_of(road[0])), key=lambda q: q[0]["thm_1"].null_count())
    of_kind, (_, person) = {"full": asked[0][0], "imu": asked[-1][0]}, asked[0]
    assert of_kind["full"]["thm_1"].null_count() < of_kind["imu"]["thm_1"].null_count()

    def answered(kind: str, change: Change, of_person: Change) -> bool:
        before = predictor.fallbacks.copy()
        gesture = predictor.predict(change(of_kind[kind]), of_person(person))
        assert type(gesture) is str
        assert gesture in cmi.GESTURES
        causes = list((predictor.fallbacks - before).elements())
        known = r"DataError: (predict was handed|A column of numbers|Of the columns)"
        assert not causes or (len(causes) == 1 and re.match(known, causes[0])), causes
        return not causes

    return answered


def one(value: Any, *columns: str) -> Change:
    """The same value in every row of some columns, all sensors by default."""
    literal = value if isinstance(value, pl.Expr) else pl.lit(value)
    return lambda frame: frame.with_columns(literal.alias(c) for c in columns or cmi.SENSORS)


def cast(kind: Any) -> Change:
    return lambda f: f.with_columns(pl.col(c).cast(kind, strict=False) for c in cmi.SENSORS)


AS_IT_IS: Change = lambda f: f  # noqa: E731
REFUSED: dict[str, Change] = {
    "zero rows": lambda f: f.clear(), "nothing": lambda _: pl.DataFrame(),
    "no id": lambda f: f.drop("sequence_id"), "no subject": lambda f: f.drop("subject"),
    "two ids": lambda f: pl.concat([f, one("SEQ_OTHER", "sequence_id")(f)]),
    "null id": one(pl.lit(None, pl.String), "sequence_id"),
    "lists": one(pl.lit([1.0, 2.0]), "acc_x"),
    "structs": lambda f: f.with_columns(acc_x=pl.struct(a=pl.lit(1))),
    "bytes": one(b"x", "thm_1"), "of another library": lambda f: SimpleNamespace(columns=f.columns),
}  # fmt: skip
ANSWERED: dict[str, Change] = {
    "one row": lambda f: f.head(1), "two rows": lambda f: f.head(2),
    "thousands of rows": lambda f: pl.concat([f] * 80), "rows backwards": lambda f: f.reverse(),
    "only ids": lambda f: f.select("sequence_id", "subject"),
    "some rows twice": lambda f: f.sample(fraction=1, with_replacement=True, seed=1),
    "some rows text": lambda f: pl.concat([f.head(9), one("x")(f[9:20]), f[20:]], how="vertical_relaxed"),
    "some rows infinite": lambda f: pl.concat([f.head(9), one(INF)(f[9:20]), f[20:]], how="vertical_relaxed"),
    "no counter": lambda f: f.drop("sequence_counter", "row_id"),
    "more columns": lambda f: f.with_columns(acc_w=1.0, gesture=pl.lit("Wave hello")),
    "columns turned round": lambda f: f.select(reversed(f.columns)),
    "text": cast(pl.String), "small": cast(pl.Int8), "truth": cast(pl.Boolean), "Null dtype": cast(pl.Null),
    "dates": one(pl.lit(0).cast(pl.Date)), "subject a number": one(7, "subject"),
    "subject long": one("x" * 100_000, "subject"), "id empty": one("", "sequence_id"),
    **{f"all {v!r}": one(v) for v in (None, NAN, INF, 3e38, -3e38, 1e300, 2**62, 1e-40, 0.0, "x", "")},
    **{f"rotation {v}": one(v, *cmi.ROT) for v in (None, 0.0, 1e30, 1e-30)},
    **{f"ToF {v}": one(v, *cmi.TOF) for v in (1000, -2.5, 255)},
}  # fmt: skip
PEOPLE: dict[str, Change] = {
    "zero rows": lambda p: p.clear(), "nothing": lambda _: pl.DataFrame(),
    "two that differ": lambda p: pl.concat([p, one(0, "handedness")(p)], how="vertical_relaxed"),
    "no subject": lambda p: p.drop("subject"), "no age": lambda p: p.drop("age"),
    "null": one(None, *cmi.PERSON), "text": one("x", *cmi.PERSON), "infinite age": one(INF, "age"),
    "left hand, as text": one("0", "handedness"), "third hand": one(2, "handedness"),
    "zero height": one(0, "height_cm", "shoulder_to_wrist_cm", "elbow_to_wrist_cm"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "imu"])
def test_odd_recordings_are_answered_or_counted(is_answered: Answered, kind: str) -> None:
    for changes, expected in ((ANSWERED, True), (REFUSED, False)):
        for name, change in changes.items():
            assert is_answered(kind, change, AS_IT_IS) == expected, name
    for name, change in PEOPLE.items():
        assert is_answered(kind, AS_IT_IS, change), name
