"""The cells of cmi.ipynb, which make_notebook.py makes of this file."""

# %% [markdown]
# # Which gesture was that? From a wrist sensor to a submission
#
# A device on the wrist records somebody for some seconds: they pull a hair above the ear, scratch
# the neck, drink, or text on a phone. The competition [CMI - Detect Behavior with Sensor
# Data](https://www.kaggle.com/competitions/cmi-detect-behavior-with-sensor-data) asks **which of
# 18 gestures** it was. Eight of them, the *targets*, are habits that hurt: pulling hair, pinching
# and scratching skin.
#
# The work is done by one file, `cmi_pipeline.py`, which trains LightGBM, a Torch and a Keras
# network, blends them and answers the competition's gateway. This notebook runs it and shows what
# happens:
#
# 1. **Settings** and the **plan**: what will be trained, what is there already
# 2. **The recordings**: motion, images of distance, temperatures
# 3. **Training**, the **board** of scores, where the **errors** are, **learning curves**
# 4. What the **blend** does, and how to **submit**
#
# Without the competition's files it simulates a small data set and takes the same road. Figures
# are then of simulated data and say nothing about the leaderboard.

# %%
import json
import os
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from IPython.display import display
from IPython.utils.capture import capture_output

places = [Path.cwd(), Path.cwd().parent]  # at home: in the folder above this notebook's
for mount in ("/kaggle/usr/lib", "/kaggle/input"):  # on Kaggle: utility script, or data set
    places += [path.parent for path in sorted(Path(mount).glob("**/cmi_pipeline.py"))]
sys.path[:0] = [str(place) for place in places if (place / "cmi_pipeline.py").is_file()]
import cmi_pipeline as cmi  # noqa: E402

f"cmi_pipeline from {cmi.__file__}"

# %% [markdown]
# ## 1 Settings
#
# Every setting has a default, so the dictionary can stay empty. A variable of the same name in
# the environment wins. `!python {cmi.__file__} --help` lists them all.
#
# When a version of this notebook is submitted, Kaggle runs it again beside the hidden test. The
# same `main` then does nothing but answer, and that comes first: the server must be up within 15
# minutes. It ends with the last question, so in that run nothing below is executed.

# %%
cmi.SETTINGS |= {
    # such as "USE_KERAS": "0" to leave a member out, "TORCH_MAX_EPOCHS": "60" to train longer,
    # "FORCE_TRAIN_TORCH": "1" to train although there are models that fit
}
env = cmi.SETTINGS | dict(os.environ)
cfg = cmi.Config.from_env(env)

if "KAGGLE_IS_COMPETITION_RERUN" in env:  # the hidden test
    cmi.main(env)

# %% [markdown]
# ## 2 The plan
#
# Before anything is trained the pipeline finds the data and its folds (grouped by subject: nobody
# is on both sides of a split), and compares the models that lie there with those it would train
# now. A line for each member, a column for each mode: `all` sees every sensor, `imu` only the
# motion, because half of the hidden test has nothing else.

# %%
cmi.main(env, ["PLAN_ONLY=1"])

# %% [markdown]
# ## 3 What a recording looks like
#
# First the hand moves to its place, then it performs the gesture; that last part is shaded. Four
# kinds of numbers arrive about ten times a second:
#
# * **acceleration**, gravity included: the three lines far from zero tell how the wrist is held
# * **angular velocity**, computed from the rotation the device reports: how it turns
# * **five temperatures**, which rise when a sensor looks at skin
# * **five images of distance**, 8 × 8 pixels each: below only how much of each image has
#   something in range
#
# Left-handers were mirrored, as the models see them.

# %%
with capture_output(stdout=True):
    data = cmi.settle(cfg, env).data_dir  # the very folder of the plan

rec = cmi.read_train(data)
rec = cmi.canonical(rec, np.zeros(len(rec), bool))  # as if everybody were right-handed
gesture, performed = rec.labels.gesture, rec.labels.phase > 0
owner = np.repeat(np.arange(len(rec)), np.diff(rec.start))  # recording of each row
gap = np.isnan(np.c_[rec.rot, rec.thm]).any(axis=1) | (rec.tof == 255).any(axis=(1, 2, 3))
gaps = np.bincount(owner, gap)  # rows of each recording in which some sensor says nothing


def typical(code):
    """Of the recordings of a gesture, best without a gap, the one of median length."""
    own = np.flatnonzero(gesture == code)
    best = own[gaps[own] == gaps[own].min()]
    return best[np.argsort(np.diff(rec.start)[best], kind="stable")[len(best) // 2]]


examples = {code: typical(code) for code in np.unique(gesture)}
favourite = cmi.GESTURES.index("Forehead - scratch")
shown = examples.get(favourite, examples[min(examples)])

# %%
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
FIVE = (BLUE, ORANGE, GREEN, RED, SKY)  # Okabe and Ito: told apart by colour-blind eyes too
plt.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white",  # readable on a dark page as well
    "figure.constrained_layout.use": True, "figure.dpi": 110, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
})  # fmt: skip


def channels(i):
    """Of recording i: seconds since the gesture began, and each channel that networks see."""
    _, frames = cmi.extract_features(rec.part(i, i + 1), table=False)
    acts = performed[rec.start[i] : rec.start[i + 1]]
    seconds = (np.arange(len(acts)) - acts.argmax()) * cmi.SAMPLE_PERIOD
    return seconds, dict(zip(frames.names, frames.x.T, strict=True))


def draw_recording(i):
    seconds, x = channels(i)
    panels = {
        "acceleration\nm/s²": [f"acc_{a}" for a in "xyz"],
        "angular velocity\nrad/s": [f"omega_{a}" for a in "xyz"],
        "temperature\n°C": [f"thm_{k}" for k in range(1, 6)],
        "pixels in range\n%": [f"tof_{k}_near" for k in range(1, 6)],
    }
    _, rows = plt.subplots(4, 1, figsize=(9, 8), sharex=True)
    for axes, (label, names) in zip(rows, panels.items(), strict=True):
        for name, colour in zip(names, FIVE, strict=False):
            unit = 100 if label.endswith("%") else 1
            axes.plot(seconds, unit * x[name], color=colour, label=name.removesuffix("_near"))
        axes.axvspan(0, seconds[-1], color="#888", alpha=0.15, lw=0)
        axes.set_ylabel(label)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    rows[0].set_title(f"{cmi.GESTURES[gesture[i]]}, recording {rec.sequence_id[i]}")
    rows[-1].set_xlabel("seconds since the gesture began, at about 10 rows a second")
    plt.show()


draw_recording(shown)

# %% [markdown]
# ### Gesture by gesture: motion and temperature
#
# First the acceleration without gravity, in the axes of the device: one typical recording of each
# gesture, all on the same scale. Scratching goes to and fro almost as fast as ten rows a second
# can show; waving and pulling air reach farther than any target; pinching hardly has a rhythm.
#
# Then how much warmer each sensor is during the gesture than on the way there, mean of all
# recordings: skin is warm, so a hand at the face warms other sensors than one in front of the
# body.

# %%
fig, grid = plt.subplots(6, 3, figsize=(11, 11), sharex=True, sharey=True)
sizes = []
for code, axes in enumerate(grid.flat):
    axes.set_title(cmi.GESTURES[code], color=RED if code < len(cmi.TARGETS) else "black")
    if code in examples:
        seconds, x = channels(examples[code])
        for name, colour in zip(("lin_x", "lin_y", "lin_z"), FIVE, strict=False):
            axes.plot(seconds, x[name], color=colour, lw=1, label=name[-1])
            sizes += np.abs(x[name][seconds > -2]).tolist()
        axes.axvspan(0, seconds[-1], color="#888", alpha=0.15, lw=0)
most = np.nanquantile(sizes, 0.999)  # a single jolt should not make all the rest flat
grid[0, 0].set(xlim=(-2, 4), ylim=(-most, most))
fig.legend(
    *grid.flat[min(examples)].get_legend_handles_labels(), ncols=3, loc="outside upper right"
)
fig.supylabel("acceleration without gravity, m/s²")
fig.supxlabel("seconds since the gesture began (red: targets)")
plt.show()

# %%
table = pl.DataFrame({"gesture": gesture[owner], "performed": performed})
table = table.with_columns(pl.Series(f"thm_{k + 1}", rec.thm[:, k]) for k in range(5))
means = table.fill_nan(None).group_by("gesture", "performed").mean().sort("gesture")
rise = (
    means.filter("performed").drop("gesture", "performed").to_numpy()
    - means.filter(~pl.col("performed")).drop("gesture", "performed").to_numpy()
)
most = np.nanmax(np.abs(rise))

fig, axes = plt.subplots(figsize=(7, 6))
drawn = axes.imshow(rise, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
for (i, k), value in np.ndenumerate(rise):
    axes.text(k, i, f"{value.round(1) + 0:+.1f}", ha="center", va="center", fontsize=8,
              color="white" if abs(value) > 0.6 * most else "black")  # fmt: skip
axes.set_yticks(range(len(examples)), [cmi.GESTURES[code] for code in sorted(examples)])
axes.set_xticks(range(5), [f"thm_{k}" for k in range(1, 6)])
axes.grid(visible=False)
fig.colorbar(drawn, label="during the gesture less before it, °C")
plt.show()

# %% [markdown]
# ### What the five distance sensors see
#
# Sensor 1 sits in the middle, 2 and 4 above and below it, 3 and 5 at the sides, and so the
# pictures are arranged. Bright is close, black is nothing in range. First one recording as a
# film, then the mean of each gesture. Motion alone hardly tells an eyebrow from an eyelash; such
# images are what the `all` mode knows beyond `imu`.

# %%
CROSS = ((1, 1), (0, 1), (1, 2), (2, 1), (1, 0))  # row and column of sensors 1 … 5


def cross(rows):
    """Mean closeness in some rows, the sensors as on the wrist. 0: nothing in range. → (26, 30)"""
    code = rec.tof[rows].astype(float)
    close = np.where(code <= 249, 250 - code, 0)
    known = code != 255
    mean = (close * known).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    picture = np.full((26, 30), np.nan)
    for (r, c), image in zip(CROSS, mean, strict=True):
        picture[9 * r : 9 * r + 8, 9 * c + 2 : 9 * c + 10] = image
    return picture


def draw_crosses(pictures, columns):
    n_rows = -(-len(pictures) // columns)
    fig, grid = plt.subplots(n_rows, columns, figsize=(11, 0.4 + n_rows * 11 / columns))
    most = np.nanmax(list(pictures.values()))
    for axes, (title, picture) in zip(grid.flat, pictures.items(), strict=False):
        drawn = axes.imshow(picture, cmap="inferno", vmin=0, vmax=most)
        axes.set_title(title, fontsize=8, loc="center")
    for axes in grid.flat:
        axes.axis("off")
    bar = fig.colorbar(drawn, ax=grid, shrink=0.8, aspect=10 * n_rows, pad=0.01)
    bar.set_label("250 − reading\n(0: nothing in range)")
    plt.show()


own = np.arange(rec.start[shown], rec.start[shown + 1])
moments = own[np.linspace(0, len(own) - 1, 8).astype(int)]
seconds = (moments - own[performed[own].argmax()]) * cmi.SAMPLE_PERIOD
film = {f"{s:+.1f} s": cross([row]) for s, row in zip(seconds, moments, strict=True)}
draw_crosses(film, columns=8)

of_gesture = {
    textwrap.fill(cmi.GESTURES[code], 22): cross(performed & (gesture[owner] == code))
    for code in examples
}
draw_crosses(of_gesture, columns=6)

# %% [markdown]
# ## 4 Training
#
# One line does the rest: train what the plan says (finished models are kept, so a stopped run
# goes on), predict every recording by models that never saw its subject, find the weights of the
# blend, ask the local gateway for each test recording and write `submission.parquet` and a
# report. How long it still takes stands behind each finished model; details go to `logs/run.log`.
#
# Then the learning curves, a thin line for each fold. Above: the score of the
# recordings kept aside. Below: their loss, and dotted the loss of training, which also counts
# what a network learns beside the gesture. A loss that still falls at the end asks for more
# epochs.

# %%
with capture_output(stdout=False, stderr=False):  # the report has a page of its own
    cmi.main(env)

# %%
files = sorted(cfg.out.glob("*_models/*/fold*_train.csv"))
colours = {"all": BLUE, "imu": ORANGE, "mixed": GREEN, "norot": GREEN}


def draw_curves():
    members = sorted({path.parts[-3] for path in files}, reverse=True)
    _, grid = plt.subplots(
        2, len(members), figsize=(11, 6), sharex="col", sharey="row", squeeze=False
    )
    for path in files:
        epochs, (member, mode) = pl.read_csv(path.read_bytes()), path.parts[-3:-1]
        upper, lower = grid[:, members.index(member)]
        label = mode if path.name.startswith("fold00_train") else None
        for axes, name, line in ((upper, "score", ".-"), (lower, "val_loss", ".-"),
                                 (lower, "train_loss", ":")):  # fmt: skip
            axes.plot(
                epochs.to_series(), epochs[name], line, lw=1, color=colours[mode], label=label
            )
        upper.set_title(member.removesuffix("_models"))
        upper.legend(title="mode")
        lower.set_xlabel("round" if "lgbm" in member else "epoch")
        lower.xaxis.get_major_locator().set_params(integer=True)
    grid[0, 0].set_ylabel("score of the fold kept aside")
    grid[1, 0].set_ylabel("loss (dotted: training)")
    plt.show()


draw_curves() if files else display("Nothing was trained into this output folder.")

# %% [markdown]
# ## 5 The board
#
# The competition's score, on recordings of people the models had not seen. Quote *blend nested*:
# its weights come from other folds than those they are scored on. *Optimistic* weights were found
# on the very same rows, *score* ones by the score instead of the log loss; *assigned* uses that
# everybody does each thing a known number of times. `mixed` is the mean of the two modes, because
# half of the hidden test has no more than motion. Whiskers are 95 % intervals, from a bootstrap
# over subjects.

# %%
rows = pl.DataFrame(json.loads((cfg.out / "oof" / "scores.json").read_text())["rows"])
rows = rows.with_columns(line=pl.col("name") + " " + pl.col("kind"))
lines = rows["line"].unique(maintain_order=True).to_list()

fig, axes = plt.subplots(figsize=(9, 0.8 + 0.5 * len(lines)))
for k, (mode, colour) in enumerate(colours.items()):
    part = rows.filter(mode=mode)
    y = np.array([lines.index(line) for line in part["line"]]) + 0.2 * (k - 1)
    low, value, high = (part[name].to_numpy() for name in ("low", "score", "high"))
    axes.errorbar(value, y, xerr=(value - low, high - value), fmt="o", color=colour, label=mode)
axes.set_yticks(range(len(lines)), lines)
axes.set(ylim=(len(lines) - 0.5, -0.5), xlabel="score, out of fold")
axes.legend(title="mode", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
scores = rows.filter(pl.col("mode").is_in(list(colours)))
scores.with_columns(pl.col("score").round(3)).pivot("mode", index="line", values="score")

# %% [markdown]
# ## 6 Where it errs
#
# Left, what the nested blend answers (columns) to each true gesture (rows), with all sensors. The
# red lines part the targets from the other gestures: errors in the lower right block, one of the
# ten others for another, cost nothing. Right, the F1 of each class that the score averages.

# %%
truth = np.load(cfg.out / "oof" / "y_true.npy")
proba = {
    path.stem.removeprefix("oof_").removesuffix("_proba"): np.load(path)
    for path in sorted((cfg.out / "oof").glob("oof_*_proba.npy"))
}
answer = {mode: proba[f"blend_{mode}"].argmax(axis=1) for mode in ("all", "imu")}
counts = np.zeros((18, 18))
np.add.at(counts, (truth, answer["all"]), 1)
share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def f1(code, given):
    """Of a target, or with code 8 of all others as one class."""
    t, a = np.minimum(truth, 8) == code, np.minimum(given, 8) == code
    return 2 * (t & a).sum() / max(t.sum() + a.sum(), 1)


fig, (left, right) = plt.subplots(1, 2, figsize=(13, 7), width_ratios=(2, 1))
left.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
for i, j in np.argwhere(share >= 1):
    left.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=7,
              color="white" if share[i, j] > 55 else "black")  # fmt: skip
left.set_xticks(range(18), range(1, 19))
left.set_yticks(range(18), [f"{name}  {k}" for k, name in enumerate(cmi.GESTURES, 1)])
left.axhline(7.5, color=RED)
left.axvline(7.5, color=RED)
left.set(xlabel="answer", title="of 100 recordings of each gesture")
left.grid(visible=False)
values = {mode: [f1(code, answer[mode]) for code in range(9)] for mode in answer}
right.hlines(range(9), values["imu"], values["all"], color="#bbb", lw=3)
for mode, value in values.items():
    label = f"{mode}, score {cmi.score(truth, answer[mode]):.3f}"
    right.plot(value, range(9), "o", color=colours[mode], label=label)
right.set_yticks(range(9), (*cmi.TARGETS, "any other"))
right.set(ylim=(8.5, -0.5), xlim=(0, 1), xlabel="F1", title="classes of the score")
right.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2)
plt.show()

# %% [markdown]
# ## 7 What the blend does
#
# It multiplies: the probability of a label is the product of the members' probabilities, each
# raised to its weight. A member that is sure it is *not* something can veto it. Weights are those
# of least log loss on out-of-fold rows; a weight of 0 says that a member adds nothing the others
# do not know.
#
# Left, the weights. Right, the recording on which blending helped most: how likely each member
# found each gesture, and what came of it. The arrow marks the truth.

# %%
modes = json.loads((cfg.out / "ensemble" / "weights.json").read_text())["modes"]
parts = modes["all"]["parts"]
columns = {"blend": proba["blend_all"]} | {p: proba[p.replace("/", "_")] for p in parts}
row = np.arange(len(truth))
helped = proba["blend_all"][row, truth] - np.mean([columns[p][row, truth] for p in parts], axis=0)
best = int((helped * (answer["all"] == truth)).argmax())

fig, (left, right) = plt.subplots(1, 2, figsize=(13, 6), width_ratios=(1, 1.3))
for mode, shift in {"all": -0.2, "imu": 0.2}.items():
    places = [parts.index(part) + shift for part in modes[mode]["parts"]]
    left.barh(places, modes[mode]["weights"], 0.36, color=colours[mode], label=mode)
left.set_yticks(range(len(parts)), parts)
left.set(xlabel="weight (exponent)", ylim=(len(parts) - 0.4, -0.6))
left.legend(title="when answering in mode", loc="lower right")
found = np.stack([p[best] for p in columns.values()]).T
right.imshow(found, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for i, k in np.argwhere(found >= 0.01):
    right.text(k, i, f"{found[i, k]:.2f}", ha="center", va="center", fontsize=8,
               color="white" if found[i, k] > 0.55 else "black")  # fmt: skip
right.axvline(0.5, color=RED)
right.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
marks = {truth[best]: "→ "}
right.set_yticks(range(18), [marks.get(k, "") + name for k, name in enumerate(cmi.GESTURES)])
right.set_title(f"probability of each gesture, recording {rec.sequence_id[best]}")
right.grid(visible=False)
plt.show()

# %% [markdown]
# ## 8 Submit
#
# The local run has asked for every test recording over the same gRPC interface as the
# competition. Here are the first answers, and how likely the models found each gesture for the
# first of them.
#
# **On Kaggle**: Save Version with the accelerator GPU T4 × 2 and the internet off. When it is
# complete, make a data set of its output, add that as an input and save again: the plan now says
# `reuse`, and this version is the one to submit: its hidden re-run only loads the models.
#
# **Next**: change one setting and run again; only what depends on it is trained. The whole
# report, with every subject and a gallery of mistakes, is `report/index.html` in the output
# folder. Features are added in section 6 of `cmi_pipeline.py`, members in section 12.

# %%
submission = pl.read_parquet((cfg.out / "submission.parquet").read_bytes())
first = submission["sequence_id"][0]
test, people = (pl.read_csv((data / name).read_bytes(), infer_schema_length=None)
                for name in ("test.csv", "test_demographics.csv"))  # fmt: skip
sequence = test.filter(sequence_id=first)
people = people.filter(subject=sequence["subject"][0])
likely = cmi.Predictor(cfg).predict_proba(sequence, people)
display(submission.head())
pl.DataFrame({"gesture": [*likely], "probability": [*likely.values()]}).top_k(5, by="probability")
