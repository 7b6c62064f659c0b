"""Every feature and channel once more: slow, obvious, one recording at a time, with scipy.

The oracle of tests/test_features.py, and the plain loop that the benchmark of speed compares with.
Written from the definitions; it shares no code, table or name list with cmi_pipeline.py.
"""

import warnings

import numpy as np
from scipy import signal as sps
from scipy import stats
from scipy.spatial.transform import Rotation, Slerp

DT = 0.1
G = 9.81
LAST = 31
SENSORS = range(1, 6)


def repaired(rot):
    """Unit quaternions (T, 4), w first, gaps filled; all NaN if nothing is known."""
    q = np.array(rot, float)
    found = [t for t in range(len(q)) if np.isfinite(q[t]).all() and np.linalg.norm(q[t]) > 0.1]
    if not found:
        return np.full_like(q, np.nan)
    if len(found) == 1:
        out = np.tile(q[found[0]] / np.linalg.norm(q[found[0]]), (len(q), 1))
    else:
        turns = Slerp(found, Rotation.from_quat(q[found], scalar_first=True))
        times = np.clip(np.arange(len(q)), found[0], found[-1])
        out = turns(times).as_quat(scalar_first=True)
    out[out[:, 0] < 0] *= -1
    return out


def guessed_up(acc):
    slow = np.array([np.nanmedian(acc[max(0, t - 7) : t + 8], axis=0) for t in range(len(acc))])
    return slow / np.linalg.norm(slow, axis=1, keepdims=True)


def motion(acc, rot):
    """Everything that the wrist does, (T, …) each; first rows of steps are NaN."""
    acc, q = np.array(acc, float), repaired(rot)
    n = len(acc)
    m = {"acc": acc, "q": q}
    m["jerk"] = np.vstack([np.full((1, 3), np.nan), np.diff(acc, axis=0) / DT])
    if np.isnan(q[0, 0]):
        m["up"] = guessed_up(acc)
        m["north"] = m["west"] = m["world"] = m["omega"] = np.full((n, 3), np.nan)
        m["swing"] = np.full(n, np.nan)
        m["lin"] = acc - G * m["up"]
    else:
        turn = Rotation.from_quat(q, scalar_first=True)
        matrix = turn.as_matrix()
        m["north"], m["west"], m["up"] = matrix[:, 0], matrix[:, 1], matrix[:, 2]
        m["lin"] = acc - turn.inv().apply([0, 0, G])
        m["world"] = turn.apply(m["lin"])
        m["omega"] = np.full((n, 3), np.nan)
        if n > 1:
            m["omega"][1:] = (turn[:-1].inv() * turn[1:]).as_rotvec() / DT
        m["swing"] = (turn[0].inv() * turn).magnitude()
    m["vertical"] = np.array([a @ u for a, u in zip(m["lin"], m["up"], strict=True)])
    m["horizontal"] = np.linalg.norm(m["lin"] - m["vertical"][:, None] * m["up"], axis=1)
    chord = np.linalg.norm(m["up"] - m["up"][0], axis=1)
    m["lean"] = 2 * np.arcsin(np.clip(chord / 2, 0, 1))
    return m


def images(tof):
    """What one ToF sensor sees: name → (T). Codes: 255 missing, 254 nothing, else distance."""
    codes = np.array(tof, float).reshape(len(tof), 8, 8)
    x, y = np.meshgrid(np.arange(8) - 3.5, np.arange(8) - 3.5)
    there, seen = codes != 255, codes < 250
    d = np.where(seen, codes, np.nan)
    xs, ys = np.where(seen, x, np.nan), np.where(seen, y, np.nan)
    valid = there.sum(axis=(1, 2)).astype(float)
    valid[valid == 0] = np.nan
    axes = (1, 2)
    cx, cy = np.nanmean(xs, axis=axes), np.nanmean(ys, axis=axes)
    dx, dy = xs - cx[:, None, None], ys - cy[:, None, None]
    level = d - np.nanmean(d, axis=axes, keepdims=True)
    xx, yy = np.nanmean(dx**2, axis=axes), np.nanmean(dy**2, axis=axes)
    out = {"near": seen.sum(axis=axes) / valid, "dist": np.nanmean(d, axis=axes)}
    out |= {"cx": cx, "cy": cy}
    out |= {"min": np.nanmin(d, axis=axes), "sd": np.nanstd(d, axis=axes), "xx": xx, "yy": yy}
    out["xy"] = np.nanmean(dx * dy, axis=axes)
    out["sx"] = np.nanmean(level * dx, axis=axes) / np.where(xx > 1e-9, xx, np.nan)
    out["sy"] = np.nanmean(level * dy, axis=axes) / np.where(yy > 1e-9, yy, np.nan)
    out["asym_x"] = (seen * np.sign(x)).sum(axis=axes) / valid
    out["asym_y"] = (seen * np.sign(y)).sum(axis=axes) / valid
    low, mid, high = slice(0, 4), slice(2, 6), slice(4, 8)
    regions = {"nw": (low, low), "ne": (low, high), "sw": (high, low), "se": (high, high)}
    for name, (rows, columns) in (regions | {"mid": (mid, mid)}).items():
        out[f"{name}_near"] = seen[:, rows, columns].mean(axis=axes)
        out[f"{name}_dist"] = np.nanmean(d[:, rows, columns], axis=axes)
    close = np.where(seen, 250 - codes, 0)
    flow = np.abs(np.diff(close, axis=0)).mean(axis=axes)
    gone = np.isnan(valid)
    out["flow"] = np.concatenate([[np.nan], np.where(gone[1:] | gone[:-1], np.nan, flow)])
    return {name: np.where(gone, np.nan, v) for name, v in out.items()}


def signals(rec, i):
    """All signals of recording i: name → (T), and its motion."""
    rows = slice(rec.start[i], rec.start[i + 1])
    m = motion(rec.acc[rows], rec.rot[rows])
    out = {}
    for name in ("acc", "lin"):
        out |= {f"{name}_{a}": m[name][:, k] for k, a in enumerate("xyz")}
        out[f"{name}_mag"] = np.linalg.norm(m[name], axis=1)
    aim = np.array([m["north"][-LAST:, 0].sum(), m["west"][-LAST:, 0].sum()])
    aim /= np.linalg.norm(aim)
    world = m.get("world")
    out["world_ahead"] = world[:, 0] * aim[0] + world[:, 1] * aim[1]
    out["world_aside"] = world[:, 1] * aim[0] - world[:, 0] * aim[1]
    out["world_up"], out["world_flat"] = m["vertical"], m["horizontal"]
    out |= {f"omega_{a}": m["omega"][:, k] for k, a in enumerate("xyz")}
    out["omega_mag"] = np.linalg.norm(m["omega"], axis=1)
    out |= {f"up_{a}": m["up"][:, k] for k, a in enumerate("xyz")}
    out["jerk_mag"] = np.linalg.norm(m["jerk"], axis=1)
    out["swing"], out["lean"] = m["swing"], m["lean"]
    out |= {f"thm_{k}": np.array(rec.thm[rows][:, k - 1], float) for k in SENSORS}
    for k in SENSORS:
        out |= {f"tof_{k}_{n}": v for n, v in images(rec.tof[rows][:, k - 1]).items()}
    return out, m


def still(x):
    x = x[~np.isnan(x)]
    return len(x) == 0 or np.std(x) <= 1e-7 * abs(np.mean(x))


def sd(x):
    return np.nan if np.isnan(x).all() else 0.0 if still(x) else np.nanstd(x)


def mean(x):
    return np.nanmean(x) if np.isfinite(x).any() else np.nan


def statistics(name, x, moves):
    """The statistics that every signal has; quantiles for motion only."""
    n, gesture, before = len(x), x[-LAST:], x[:-LAST]
    d, shaped = np.diff(x, prepend=np.nan), [np.nan] if still(x) else x[~np.isnan(x)]
    out = {"mean": mean(x), "sd": sd(x)}
    out |= {"skew": stats.skew(shaped), "kurtosis": stats.kurtosis(shaped)}
    if moves:
        q = {f"q{p}": np.nanquantile(x, p / 100) for p in (10, 25, 50, 75, 90)}
        out |= {"min": np.nanmin(x), "max": np.nanmax(x), **q, "iqr": q["q75"] - q["q25"]}
    out |= {"first": mean(x[:3]), "last": mean(x[-3:]), "delta": mean(x[-3:]) - mean(x[:3])}
    out |= {f"third{k + 1}": mean(x[n * k // 3 : n * (k + 1) // 3]) for k in range(3)}
    out |= {"before_mean": mean(before), "before_sd": sd(before)}
    out |= {"gesture_mean": mean(gesture), "gesture_sd": sd(gesture)}
    out["change"] = mean(gesture) - mean(before)
    out |= {"step": mean(abs(d)), "step_sd": sd(d), "gesture_step": mean(abs(d)[-LAST:])}
    out |= {"gesture_min": np.nanmin(gesture), "gesture_max": np.nanmax(gesture)}
    out["gesture_q50"] = np.nanmedian(gesture)
    return {f"{name}_{stat}": v for stat, v in out.items()}


def compass(m):
    axes = {f"{name}_{a}": m[name][:, k] for name in ("north", "west") for k, a in enumerate("xyz")}
    out = {f"{name}_before_mean": mean(x[:-LAST]) for name, x in axes.items()}
    return out | {f"{name}_gesture_mean": mean(x[-LAST:]) for name, x in axes.items()}


def spectrum(x, rows):
    """Power at 1 / rows … 1/2 cycle per row, by scipy's Welch."""
    window = min(len(x), rows)
    f, p = sps.welch(x, 1.0, "hann", window, window // 2, rows, "constant")
    return f[1:], p[1:]


def spectra(s):
    out = {}
    for part, rows in (("", 64), ("gesture_", 32)):
        sums = {}
        for group in ("lin", "omega"):
            power = 0.0
            for a in "xyz":
                x = s[f"{group}_{a}"]
                x = np.where(np.isnan(x), mean(x), x)
                f, p = spectrum(x if part == "" else x[-32:], rows)
                power = power + p
                if group == "lin":
                    sums[f"lin_{a}"] = p
            sums[group] = power
        for name, p in sums.items():
            known, k = p.sum() > 1e-12, len(p) // 4
            share = p / (p.sum() if known else np.nan)
            shape = {f"band{b + 1}": share[b * k : b * k + k].sum() for b in range(4)}
            shape["centroid"] = (share * f).sum()
            shape["rolloff"] = f[np.flatnonzero(np.cumsum(share) >= 0.85)[0]] if known else np.nan
            shape["peak"] = f[np.flatnonzero(p >= p.max() * (1 - 1e-9))[0]] if known else np.nan
            shape["entropy"] = stats.entropy(share) / np.log(len(p)) if known else np.nan
            shape["power"] = np.log10(p.sum() if known else np.nan)
            out |= {f"{name}_{part}{stat}": v for stat, v in shape.items()}
    return out


def pearson(a, b):
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    return np.nan if still(a) or still(b) else np.corrcoef(a, b)[0, 1]


def correlations(s):
    vectors = ("acc", "lin", "omega")
    pairs = [(f"{v}_{a}", f"{v}_{b}") for v in vectors for a, b in ("xy", "xz", "yz")]
    pairs += [(f"lin_{a}", f"omega_{a}") for a in ("x", "y", "z", "mag")]
    out = {f"corr_{a}_{b}": pearson(s[a], s[b]) for a, b in pairs}
    out |= {f"gesture_corr_{a}_{b}": pearson(s[a][-LAST:], s[b][-LAST:]) for a, b in pairs}
    return out


def echoes(s):
    """Autocorrelation in the gesture."""
    out = {}
    for name in ("lin", "omega", "world_up", "lin_mag"):
        axes = [f"{name}_{a}" for a in "xyz"] if name in ("lin", "omega") else [name]
        r = np.zeros(13)
        for axis in axes:
            x = s[axis][-LAST:]
            c = np.zeros(len(x)) if still(x) else np.where(np.isnan(x), 0, x - mean(x))
            full = np.correlate(c, c, "full")[len(c) - 1 :]
            r[: len(full)] += full[:13]
        known = not all(still(s[axis][-LAST:]) for axis in axes)
        r = r / r[0] if known else np.full(13, np.nan)
        out |= {f"{name}_echo{lag}": r[lag] for lag in range(1, 9)}
        out[f"{name}_echo_period"] = 2 + np.argmax(r[2:]) if known else np.nan
        out[f"{name}_echo_strength"] = r[2:].max()
    return out


def histograms(s):
    out = {}
    wide, turn = (-4, -1, -0.25, 0.25, 1, 4), (-2, -0.5, -0.1, 0.1, 0.5, 2)
    for name, edges in (("acc_x", wide), ("acc_y", wide), ("acc_z", wide), ("omega_mag", turn)):
        d = np.diff(s[name])
        d = d[~np.isnan(d)]
        share, _ = np.histogram(d, [-np.inf, *edges, np.inf])
        share = share / len(d) if len(d) else np.full(7, np.nan)
        out |= {f"{name}_step_bin{k + 1}": share[k] for k in range(7)}
    return out


def nearby(s):
    out = {}
    warm = np.stack([s[f"thm_{k}"] for k in SENSORS])[:, -LAST:]
    warmest = [np.nanargmax(row) + 1 for row in warm.T if np.isfinite(row).any()]
    for k in SENSORS:
        x = s[f"thm_{k}"]
        g = np.flatnonzero(np.isfinite(x[-LAST:]))
        slope = np.polyfit(g, x[-LAST:][g], 1)[0] if len(g) > 1 else np.nan
        out |= {f"thm_{k}_rise": mean(x[-LAST:]) - mean(x[:3]), f"thm_{k}_slope": slope}
        out[f"thm_{k}_hottest"] = warmest.count(k) / len(warmest) if warmest else np.nan
        for name in s:
            if name.startswith(f"tof_{k}") and name not in (f"tof_{k}_near", f"tof_{k}_dist"):
                a, b = mean(s[name][-LAST:]), mean(s[name][:-LAST])
                out |= {f"{name}_gesture_mean": a, f"{name}_change": a - b}
    return out


def about(rec, i, s):
    adult, age, sex, _, height, arm, forearm = (float(v) for v in rec.person[i])
    out = {"adult_child": adult, "age": age, "sex": sex, "height_cm": height}
    out |= {"shoulder_to_wrist_cm": arm, "elbow_to_wrist_cm": forearm}
    out |= {"arm_to_height": arm / height, "forearm_to_arm": forearm / arm}
    rows = slice(rec.start[i], rec.start[i + 1])
    out["n_rows"] = float(rec.start[i + 1] - rec.start[i])
    out["rot_present"] = np.isfinite(rec.rot[rows]).all(axis=1).mean()
    for k in SENSORS:
        out[f"thm_{k}_present"] = np.isfinite(s[f"thm_{k}"]).mean()
        out[f"tof_{k}_present"] = np.isfinite(s[f"tof_{k}_near"]).mean()
    return out


def features(rec, i):
    """All features of recording i: name → value."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        s, m = signals(rec, i)
        out = {}
        for name, x in s.items():
            if not name.startswith("tof") or name[6:] in ("near", "dist"):
                out |= statistics(name, x, moves=not name.startswith(("thm", "tof")))
        parts = [part(s) for part in (spectra, correlations, echoes, histograms, nearby)]
        parts += [compass(m), about(rec, i, s)]
        for part in parts:
            assert not out.keys() & part.keys()
            out |= part
        return out


def channels(rec, i):
    """All channels of recording i: name → (T)."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        s, m = signals(rec, i)
    blind = np.isnan(m["q"][0, 0])
    stems = ("acc", "lin", "omega", "world_up", "world_flat", "thm")
    out = {name: x for name, x in s.items() if name.startswith(stems)}
    out |= {"swing": m["swing"], "jerk_mag": s["jerk_mag"]}
    for k, a in enumerate("xyz"):
        out[f"jerk_{a}"] = m["jerk"][:, k]
        out |= {f"{n}_{a}": m[n][:, k] + (np.nan if blind else 0) for n in ("up", "north", "west")}
    for name in out:
        if name.startswith("jerk") or (name.startswith("omega") and not blind):
            first = 0.0 if name.startswith("omega") else 0.0 * s["acc_mag"][0]
            out[name] = np.r_[first, out[name][1:]]  # nothing came before the first row
    nothing = dict.fromkeys(("near", "sd", "cx", "cy", "sx", "sy", "flow"), 0)
    nothing |= {"dist": 250, "min": 250}
    for k in SENSORS:
        gone = np.isnan(s[f"tof_{k}_near"])
        for name, value in nothing.items():
            x = s[f"tof_{k}_{name}"]
            out[f"tof_{k}_{name}"] = np.where(np.isnan(x) & ~gone, value, x)
    return out
