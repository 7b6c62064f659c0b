"""The Torch member: the network's promises, what augmentation does, and a training that survives."""

# ruff: noqa: ARG001, ARG005, FBT003 - stand-ins take the arguments of what they stand for

import dataclasses
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from made import changed, recordings
from scipy.spatial.transform import Rotation

import cmi_pipeline as cmi

torch = pytest.importorskip("torch")

TABLE = np.array([[b, o, g] for b in (0, 1) for o in (0, 2) for g in (1, 5, 9)])  # (12, 3), sorted
PLAIN = {
    f"torch_{name}_prob": 0.0
    for name in ("mixup", "stretch", "shift", "rotate", "time_mask", "channel_mask")
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def config(**changes):
    small = {"torch_width": 16, "torch_max_epochs": 3, "torch_es_patience": 0, "strict": True}
    return cmi.Config(**small | changes)


def labelled(n=24, seed=0, rows=(20, 60)):
    """Recordings whose gesture shows in rhythm and strength, and their labels."""
    rng = np.random.default_rng(seed)
    rec = recordings([int(k) for k in rng.integers(*rows, n)], seed)
    code = rng.permutation(np.arange(n) % len(TABLE))
    behavior, orientation, gesture = TABLE[code].T
    acc, phase = rec.acc.copy(), np.zeros(len(rec.acc), np.uint8)
    for i in range(n):
        s, e = rec.start[i : i + 2]
        k = min(31, e - s)
        phase[e - k : e] = 1
        beat = np.sin(np.arange(k) * (0.3 + 0.25 * gesture[i]))[:, None]
        acc[e - k : e] += (6 * beat * np.eye(3)[gesture[i] % 3]).astype(np.float32)
        acc[s:e, 2] += 5 * (orientation[i] - 1) + 3 * behavior[i]
    return changed(rec, acc=acc), cmi.Labels.of(gesture, orientation, behavior, phase)


def job_in(folder, train, valid, mode="all", fold=0, seed=0):
    return cmi.Job("torch", mode, seed, fold, np.asarray(train), np.asarray(valid),
                   folder / "models", folder / "scratch", folder / "logs")  # fmt: skip


def spec_of(frames, pad_len=90, width=16, images=False, table=TABLE):
    return cmi.NetSpec(frames.groups, tuple(map(tuple, table.tolist())), pad_len, width, images)


def fresh_net(spec, seed=0, dropout=0.0):
    """A network with random weights everywhere, statistics of its norms included."""
    torch.manual_seed(seed)
    net = cmi.net_class()(spec, dropout)
    for name, value in net.state_dict().items():
        if name.endswith(("running_var", "trunk.sd")):
            value.uniform_(0.5, 2)
        elif value.ndim <= 1:
            value.normal_(0, 0.3)
    return net.eval()


def frames_with_gaps(lengths, seed=0):
    rec = recordings(lengths, seed)
    rot, thm, tof = rec.rot.copy(), rec.thm.copy(), rec.tof.copy()
    rot[3:6] = thm[: lengths[0]] = np.nan
    tof[: lengths[0], 2] = 255
    return cmi.make_frames(changed(rec, rot=rot, thm=thm, tof=tof))


def batch_of(frames, spec, which=None):
    store = cmi.Store.of(frames, spec, torch.device("cpu"))
    which = np.arange(len(frames)) if which is None else np.asarray(which)
    return store, cmi.make_batch(store, cmi.plain_draw(store, which))


def logits(net, batch):
    with torch.no_grad():
        return net(batch.rows, batch.images, batch.length)


# Padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_more_padding_changes_no_probability(images):
    frames = frames_with_gaps([1, 7, 8, 40, 90, 33, 3])
    spec = spec_of(frames, images=images)
    net = fresh_net(spec)
    _, batch = batch_of(frames, spec)
    wide = {"rows": torch.cat([batch.rows, torch.full_like(batch.rows, 1e4)], 1)}
    if images:
        wide["images"] = torch.cat([batch.images, torch.zeros_like(batch.images)], 1)
    once, twice = logits(net, batch), logits(net, dataclasses.replace(batch, **wide))
    for a, b in zip(once[:4], twice[:4], strict=True):
        torch.testing.assert_close(a.softmax(1), b.softmax(1), rtol=0, atol=1e-5)
    steps = once[4].shape[1]
    there = torch.arange(steps) < ((batch.length + 7) // 8)[:, None]
    torch.testing.assert_close(once[4][there], twice[4][:, :steps][there], rtol=0, atol=1e-4)


def test_a_recording_alone_gives_what_it_gives_in_company():
    frames = frames_with_gaps([5, 61, 90, 17])
    spec = spec_of(frames)
    net = fresh_net(spec)
    together = logits(net, batch_of(frames, spec)[1])[1]
    for i in range(4):
        alone = logits(net, batch_of(frames, spec, [i])[1])[1]
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_the_last_rows_are_kept():
    frames = frames_with_gaps([200, 90, 30])
    _, batch = batch_of(frames, spec_of(frames, pad_len=90))
    assert batch.length.tolist() == [90, 90, 30]
    np.testing.assert_array_equal(batch.rows[0, :90].numpy(), frames.x[110:200])
    np.testing.assert_array_equal(batch.rows[2, :30].numpy(), frames.x[290:320])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_leaves_padding_out(training):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 9, generator=rng)
    length = torch.tensor([9, 1, 4, 6])
    mask = (torch.arange(9) < length[:, None]).float()[:, None]
    ours, theirs = cmi.masked_norm_class()(6), torch.nn.BatchNorm1d(6)
    for norm in (ours, theirs):
        norm.train(training)
        torch.nn.init.constant_(norm.weight, 1.7)
        torch.nn.init.constant_(norm.bias, -0.4)
    mine, flat = x.clone().requires_grad_(), x.clone().requires_grad_()
    rows = mask[:, 0] > 0
    expected = theirs(flat.transpose(1, 2)[rows])  # only the rows that exist, as one heap
    got = ours(mine + 1e3 * (1 - mask), mask)
    torch.testing.assert_close(got.transpose(1, 2)[rows], expected, rtol=1e-4, atol=1e-4)
    assert (got.transpose(1, 2)[~rows] == 0).all()
    (got**3).sum().backward()
    (expected**3).sum().backward()
    torch.testing.assert_close(mine.grad * mask, flat.grad * mask, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_a_network_that_is_learning_is_asked_as_it_will_be_served():
    """Without dropout and with the norms' running statistics, whatever it was doing before."""
    frames = frames_with_gaps([40, 25, 31])
    spec = spec_of(frames)
    net = fresh_net(spec, dropout=0.5)
    store, batch = batch_of(frames, spec)
    served = cmi.composite_proba(logits(net, batch), net.head.belongs).numpy()
    asked = cmi.ask(net.train(), store, np.arange(3))
    np.testing.assert_allclose(asked, served, atol=1e-6)


def test_time_is_halved_without_looking_at_padding():
    block = cmi.block_class()(3, 8).eval()
    x, mask = torch.randn(1, 3, 6), torch.ones(1, 1, 6)
    mask[0, 0, 5] = 0  # a fifth row without a partner
    alone, _ = block(x * mask, mask)
    longer, left = block(*(torch.nn.functional.pad(a, (0, 6)) for a in (x * mask, mask)))
    assert left[0, 0].tolist() == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(longer[:, :, :3], alone)
    assert (longer[:, :, 3:] == 0).all()
    three, one = x[:, :, :5], torch.ones(1, 1, 5)  # the layers by hand, on five rows alone
    first, second, short = block.norms
    h = second(block.second(torch.nn.functional.silu(first(block.first(three), one))), one)
    gate = torch.sigmoid(block.excite(torch.nn.functional.silu(block.squeeze(h.mean(2)))))
    h = torch.nn.functional.silu(h * gate[:, :, None] + short(block.short(three), one))
    torch.testing.assert_close(alone, torch.nn.functional.max_pool1d(h, 2, ceil_mode=True))


# Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(dtype):
    frames = frames_with_gaps([1, 90, 12, 50])
    spec = spec_of(frames, images=True)
    net = fresh_net(spec).train()
    _, batch = batch_of(frames, spec)
    with torch.autocast("cpu", dtype):
        outputs = net(batch.rows, batch.images, batch.length)
        inner, _ = net.trunk(batch.rows, batch.images, batch.length)
    assert inner.dtype is dtype
    assert all(o.dtype is torch.float32 and o.isfinite().all() for o in outputs)
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    full = net(batch.rows, batch.images, batch.length)[0]
    assert (outputs[0] - full).abs().max() < 0.2


def test_the_composite_is_shared_out_by_hand():
    belongs = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    gesture, label = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.1, 0.7]]).log()
    got = cmi.composite_proba((gesture, label), belongs)
    # gesture 0: (0.9 + 0.3) / 2 = 0.6, divided 2 : 1; gesture 1: 0.4
    torch.testing.assert_close(got, torch.tensor([[0.4, 0.2, 0.4]]))
    sure = cmi.composite_proba(
        (torch.tensor([[300.0, 0]]), torch.tensor([[-300.0, 0, 300]])), belongs
    )
    torch.testing.assert_close(sure.sum(1), torch.ones(1))


def test_losses_are_those_of_torch():
    rng = torch.Generator().manual_seed(2)
    raw, code = torch.randn(9, 7, generator=rng), torch.randint(7, (9,), generator=rng)
    target = torch.nn.functional.one_hot(code, 7).float()
    for smooth in (0.0, 0.1):
        ours = cmi.soft_loss(raw, target, config(torch_label_smoothing=smooth))
        theirs = torch.nn.functional.cross_entropy(raw, code, label_smoothing=smooth)
        torch.testing.assert_close(ours, theirs)
    focal = cmi.soft_loss(raw, target, config(torch_label_smoothing=0.0, use_focal_loss=True))
    p = raw.softmax(1)[torch.arange(9), code]
    torch.testing.assert_close(focal, (-((1 - p) ** 2) * p.log()).mean())


def test_padding_has_no_part_in_the_loss():
    """Whatever the network says about the phase of steps that are padding."""
    rng = torch.Generator().manual_seed(5)
    table = torch.tensor(TABLE)
    n = (18, len(TABLE), 4, 2)
    heads = [torch.randn(2, k, generator=rng) for k in n]
    label = torch.softmax(torch.randn(2, len(TABLE), generator=rng), 1)
    phase, truth = torch.randn(2, 5, generator=rng), torch.rand(2, 5, generator=rng)
    sides = [
        (table[:, i : i + 1] == torch.arange(k)).float()
        for i, k in zip((2, 1, 0), (18, 4, 2), strict=True)
    ]
    length = torch.tensor([40, 17])  # five steps, and three
    batch = cmi.Batch(torch.zeros(2, 40, 1), None, length, label, truth)

    def loss(phase):
        return cmi.torch_loss((*heads, phase), batch, torch.cat(sides, 1), config())

    told = phase.clone()
    told[1, 3:] += 9
    torch.testing.assert_close(loss(told), loss(phase), rtol=0, atol=0)
    told[1, 2] += 9
    assert (loss(told) - loss(phase)).abs() > 0.01


def test_the_schedule_is_torchs_one_cycle():
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.AdamW([weight], lr=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, 3e-3, total_steps=50)
    for step in range(50):
        assert cmi.one_cycle(step, 50, 3e-3) == pytest.approx(
            theirs.param_groups[0]["lr"], rel=1e-6
        )
        theirs.step()
        if step < 49:
            schedule.step()
    assert [cmi.one_cycle(k, n, 1.0) >= 0 for n in (1, 2, 3) for k in range(n)]


@pytest.mark.parametrize(
    ("n_train", "asked", "size"),
    [
        (345, 512, 21),
        (6500, 512, 406),
        (6500, 64, 64),
        (10, 512, 4),
        (3, 512, 3),
        (1, 8, 1),
        (100, 2, 2),
    ],
)
def test_a_batch_holds_at_most_a_sixteenth(n_train, asked, size):
    assert cmi.torch_batch(n_train, config(torch_batch_size=asked)) == size


def test_averaged_weights_follow_slowly():
    slow, fast = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before, now = slow.weight.detach().clone(), fast.weight.detach().clone()
    cmi.follow(slow, fast, 0.9)
    torch.testing.assert_close(slow.weight.detach(), 0.9 * before + 0.1 * now)


# Batches and augmentation -----------------------------------------------------------------------


def bare_store(lengths, seed=0):
    frames = cmi.make_frames(recordings(lengths, seed))
    return frames, cmi.Store.of(frames, spec_of(frames), torch.device("cpu"))


def test_stretching_is_linear_interpolation_anchored_at_the_end():
    frames, store = bare_store([50, 80])
    d = cmi.plain_draw(store, np.array([1, 0]))
    d.speed = np.array([1.25, 0.8], np.float32)
    d.length = np.array([40, 30])
    rows = cmi.make_batch(store, d).rows.numpy()
    for b, (first, last) in enumerate([(50, 129), (0, 49)]):
        at = last - (d.length[b] - 1 - np.arange(d.length[b])) * float(d.speed[b])
        assert at[0] >= first
        for c in range(rows.shape[2]):
            slow = np.interp(at, np.arange(len(frames.x)), frames.x[:, c])
            np.testing.assert_allclose(rows[b, : d.length[b], c], slow, rtol=1e-4, atol=1e-3)


def test_draws_stay_inside_their_recordings():
    lengths = [1, 2, 9, 31, 150, 700]
    _, store = bare_store(lengths)
    cfg, rng = (
        config(torch_stretch_prob=1, torch_shift_prob=1, torch_mixup_prob=1),
        np.random.default_rng(0),
    )
    for _ in range(50):
        which = rng.integers(0, len(lengths), 8)
        d = cmi.augmented_draw(store, which, 90, cfg, rng)
        reach = np.floor((d.length - 1) * d.speed.astype(float) + 1e-6)
        assert (d.length >= 1).all()
        assert (d.length <= 90).all()
        assert (d.last <= store.last[which]).all()
        assert (d.last - reach >= store.first[which]).all()
        assert ((d.share >= 0.5) & (d.share <= 1)).all()


def test_stretching_never_reads_the_neighbour_whatever_the_rounding():
    """Recordings of zeros between recordings of ones stay zeros."""
    _, store = bare_store([97] * 3)
    x = torch.ones_like(store.x)
    x[97:194] = 0
    store = dataclasses.replace(store, x=x)
    d = cmi.plain_draw(store, np.full(2000, 1))
    d.speed = np.linspace(0.85, 1.15, 2000).astype(np.float32)
    d.length = (96 / d.speed).astype(np.int64) + 1
    assert (cmi.make_batch(store, d).rows == 0).all()
    d.which[:], d.last[:] = 0, 96  # before the first recording there is nothing at all
    assert (cmi.make_batch(store, d).rows == 1).all()


def test_a_stretched_recording_takes_no_gap_from_its_neighbour():
    """What is missing in the row before its first is no row of it, however little it weighs."""
    _, store = bare_store([40, 31])
    x = store.x.clone()
    x[:40] = torch.nan
    store = dataclasses.replace(store, x=x)
    d = cmi.plain_draw(store, np.array([0, 1, 1]))
    d.speed, d.length = np.array([1.1, 1, 1.25], np.float32), np.array([30, 31, 25])
    rows = cmi.make_batch(store, d).rows
    assert rows[0, :30].isnan().all()
    torch.testing.assert_close(rows[1, :31], x[40:])
    torch.testing.assert_close(rows[2, :25:4], x[40::5])  # 24 steps of 1.25 rows: the first row


def test_mixup_mixes_rows_and_labels_alike_and_aligns_the_ends():
    frames, store = bare_store([20, 30])
    store = dataclasses.replace(store, phase=torch.zeros(50))
    d = cmi.plain_draw(store, np.array([1, 0]))
    d.partner, d.share = np.array([0, 1]), np.array([0.7, 1.0], np.float32)
    batch = cmi.make_batch(store, d, np.array([4, 2]), 6)
    np.testing.assert_allclose(batch.label[0], [0, 0, 0.7, 0, 0.3, 0], atol=1e-6)
    np.testing.assert_allclose(batch.label[1], [0, 0, 0, 0, 1, 0], atol=1e-6)
    own, other = frames.x[20:50], frames.x[0:20]
    np.testing.assert_allclose(
        batch.rows[0, 10:30], 0.7 * own[10:] + 0.3 * other, rtol=1e-4, atol=1e-3
    )
    np.testing.assert_array_equal(batch.rows[0, :10], own[:10])  # there the other one has no rows
    np.testing.assert_array_equal(batch.rows[1, :20], other)


def test_mixup_takes_nothing_from_beyond_the_other_recording():
    """The partner is short and has a neighbour in front, whose rows must not be mixed in."""
    _, store = bare_store([40, 10, 40])
    x = torch.zeros_like(store.x)
    x[:40] = 100  # the neighbour
    x[40:50] = 1  # the partner
    store = dataclasses.replace(store, x=x)
    d = cmi.plain_draw(store, np.array([2, 1]))
    d.partner, d.share = np.array([1, 2]), np.array([0.5, 1], np.float32)
    rows = cmi.make_batch(store, d).rows[0]
    assert (rows[:30] == 0).all()
    torch.testing.assert_close(rows[30:], torch.full_like(rows[30:], 0.5))


def test_turning_the_wristband_turns_every_vector_by_one_rotation():
    frames, store = bare_store([40, 40])
    d = cmi.plain_draw(store, np.array([0, 1]))
    d.turn = np.array([[0.1, -0.2, 0.15], [0, 0, 0]], np.float32)
    rows = cmi.make_batch(store, d).rows.numpy()[:, :40].astype(float)
    names, before = list(frames.names), frames.x[:40].astype(float)
    turn = Rotation.from_rotvec(d.turn[0].astype(float))
    triples = [
        [names.index(f"{n}_{a}") for a in "xyz"]
        for n in ("acc", "up", "north", "west", "lin", "omega", "jerk")
    ]
    for columns in triples:
        np.testing.assert_allclose(rows[0][:, columns], turn.apply(before[:, columns]), atol=1e-3)
    acc, up = triples[:2]
    angle = [np.sum(x[:, acc] * x[:, up], axis=1) for x in (rows[0], before)]
    np.testing.assert_allclose(angle[0], angle[1], atol=1e-3)  # pose against gravity is kept
    others = np.setdiff1d(np.arange(len(names)), np.concatenate(triples))
    np.testing.assert_array_equal(rows[0][:, others], before[:, others])
    np.testing.assert_array_equal(rows[1], frames.x[40:80])


def test_a_turned_wristband_is_what_the_sensors_would_have_told():
    """The augmented frames equal those of recordings whose device sat askew."""
    rec = recordings([30, 30])
    turn = Rotation.from_rotvec([0.05, 0.1, -0.08])
    quat = Rotation.from_quat(rec.rot, scalar_first=True) * turn.inv()
    askew = changed(rec, acc=turn.apply(rec.acc).astype(np.float32),
                    rot=quat.as_quat(scalar_first=True).astype(np.float32))  # fmt: skip
    expected = cmi.make_frames(askew).x[:30, :13]  # acc and rot
    frames = cmi.make_frames(rec)
    store = cmi.Store.of(frames, spec_of(frames), torch.device("cpu"))
    d = cmi.plain_draw(store, np.array([0]))
    d.turn = turn.as_rotvec()[None].astype(np.float32)
    np.testing.assert_allclose(cmi.make_batch(store, d).rows[0, :30, :13], expected, atol=2e-3)


def test_the_sign_of_the_quaternion_does_not_matter():
    rec = recordings([40])
    np.testing.assert_allclose(
        cmi.make_frames(changed(rec, rot=-rec.rot)).x, cmi.make_frames(rec).x, atol=1e-4
    )


@pytest.mark.parametrize("lose", [("thm",), ("tof",), ("thm", "tof")])
def test_a_dropped_modality_is_a_recording_without_the_sensor(lose, monkeypatch):
    rec = recordings([40, 25])
    frames = cmi.make_frames(rec)
    spec = spec_of(frames, images=True)
    store = cmi.Store.of(frames, spec, torch.device("cpu"))
    chosen = np.array([True, False])
    drawn = (chosen & ("thm" in lose), chosen & ("tof" in lose))
    monkeypatch.setattr(cmi, "dropped_modalities", lambda n, rng, share: drawn)
    d = cmi.augmented_draw(store, np.arange(2), 90, config(**PLAIN), np.random.default_rng(0))
    thm, tof = rec.thm.copy(), rec.tof.copy()
    thm[:40][:, [True] * 5 if "thm" in lose else [False] * 5] = np.nan
    if "tof" in lose:
        tof[:40] = 255
    without = cmi.make_frames(changed(rec, thm=thm, tof=tof))
    expected = batch_of(without, spec)[1]
    got = cmi.make_batch(store, d)
    np.testing.assert_array_equal(got.rows.numpy(), expected.rows.numpy())
    seen = [cmi.make_batch(store, cmi.plain_draw(store, np.arange(2))).images, expected.images]
    np.testing.assert_array_equal(got.images[0], seen["tof" in lose][0])
    np.testing.assert_array_equal(got.images[1], seen[0][1])
    net = fresh_net(spec)
    torch.testing.assert_close(logits(net, got)[1], logits(net, expected)[1])


def test_masks_make_rows_and_columns_missing():
    _, store = bare_store([40])
    d = cmi.plain_draw(store, np.array([0]))
    d.gap, d.lost[0, 3] = np.array([[5, 9]]), True
    gone = cmi.make_batch(store, d).rows.isnan().numpy()[0]
    assert gone[5:9].all()
    assert gone[:, 3].all()
    assert not np.delete(gone, range(5, 9), axis=0)[:, np.arange(gone.shape[1]) != 3].any()


def test_phase_is_the_share_of_rows():
    phase = torch.tensor([[0.0] * 6 + [1] * 10, [1.0] * 16])
    got = cmi.phase_share(phase, torch.tensor([12, 16]))
    torch.testing.assert_close(got, torch.tensor([[0.25, 1], [1, 1]]))


def test_dropout_draws_from_its_own_generator():
    x, state = torch.ones(1000), torch.get_rng_state()
    a = cmi.drop(x, 0.25, torch.Generator().manual_seed(3), True)
    torch.rand(7)
    b = cmi.drop(x, 0.25, torch.Generator().manual_seed(3), True)
    torch.testing.assert_close(a, b)
    assert a.unique().tolist() == pytest.approx([0, 4 / 3])
    assert 0.7 < (a > 0).float().mean() < 0.8
    assert cmi.drop(x, 0.25, None, False) is x
    torch.set_rng_state(state)


# Training -------------------------------------------------------------------------------------


def test_it_learns_and_serves_what_it_learnt(tmp_path):
    rec, labels = labelled(120, seed=3)
    job, frames = job_in(tmp_path, range(90), range(90, 120)), cmi.make_frames(rec)
    cfg = config(torch_max_epochs=12, torch_lr=5e-3, torch_width=24, **PLAIN)
    info = cmi.fit_torch(job, frames, labels, cfg)
    model = cmi.load_torch(job.folder, [job.stem], labels.table, cfg)
    proba = cmi.predict_torch(model, frames.take(job.valid))
    assert proba.shape == (1, 30, 12)
    np.testing.assert_allclose(proba.sum(2), 1, atol=1e-5)
    said = cmi.gesture_proba(proba[0], labels.table).argmax(1)
    assert (said == labels.gesture[90:]).mean() > 0.7  # one in three by chance
    assert (proba[0].argmax(1) == labels.composite[90:]).mean() > 0.2  # one in twelve
    assert info["score"] == pytest.approx(cmi.score(labels.gesture[90:], said))
    assert info["epochs"] == 12
    lines = [
        json.loads(k) for k in (tmp_path / "logs/torch_progress.jsonl").read_text().splitlines()
    ]
    assert [k["epoch"] for k in lines] == list(range(1, 13))
    wanted = {
        "fold",
        "epoch",
        "train_loss",
        "bin_f1",
        "macro_f1",
        "score",
        "secs",
        "max_mem_gb",
        "lr",
        "mode",
        "seed",
        "batch",
    }
    assert wanted <= set(lines[0])
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert not list((tmp_path / "scratch").glob("*"))


class Stop(Exception):
    """The process is gone."""


def weights(job):
    return torch.load(job.folder / f"{job.stem}.pt", weights_only=True)["state"]


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_stopped_at_any_moment_and_resumed_it_gives_the_same_bits(tmp_path, monkeypatch, steps):
    rec, labels = labelled(20)
    frames, cfg = cmi.make_frames(rec), config(torch_batch_size=4)
    straight, broken = (job_in(tmp_path / k, range(15), range(15, 20)) for k in "ab")
    cmi.fit_torch(straight, frames, labels, cfg)
    whole, count = cmi.train_step, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count > steps:
            raise Stop
        return whole(*args)

    monkeypatch.setattr(cmi, "train_step", failing)
    with pytest.raises(Stop):
        cmi.fit_torch(broken, frames, labels, cfg)
    monkeypatch.setattr(cmi, "train_step", whole)
    assert cmi.torch_resumable(broken, cfg) == (
        f"resumable at epoch {steps // 4} of 3" if steps > 3 else None
    )
    torch.rand(5)  # another process has other global random numbers
    cmi.fit_torch(broken, frames, labels, cfg)
    a, b = weights(straight), weights(broken)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, monkeypatch, capsys):
    rec, labels = labelled(20)
    frames, job = cmi.make_frames(rec), job_in(tmp_path, range(15), range(15, 20))
    monkeypatch.setattr(
        cmi, "note_epoch", lambda run, *rest: (_ for _ in ()).throw(Stop) if run.epoch > 1 else None
    )
    with pytest.raises(Stop):
        cmi.fit_torch(job, frames, labels, config(torch_batch_size=4))
    monkeypatch.undo()
    other = config(torch_batch_size=3)
    assert cmi.torch_resumable(job, config(torch_batch_size=4)) == "resumable at epoch 1 of 3"
    assert cmi.torch_resumable(job, other) == "not resumable, TORCH_BATCH_SIZE 4 → 3"
    assert cmi.torch_resumable(job, config(torch_batch_size=4, resume_torch=False)) is None
    moved = job_in(tmp_path, range(1, 15), range(15, 20))
    assert "training rows" in cmi.torch_resumable(moved, config(torch_batch_size=4))
    capsys.readouterr()
    cmi.fit_torch(job, frames, labels, other)
    assert "TORCH_BATCH_SIZE 4 → 3" in capsys.readouterr().out
    lines = [
        json.loads(k) for k in (tmp_path / "logs/torch_progress.jsonl").read_text().splitlines()
    ]
    assert [k["epoch"] for k in lines] == [1, 2, 3]  # from the start


def test_a_damaged_checkpoint_is_left_behind(tmp_path, capsys):
    rec, labels = labelled(12)
    job = job_in(tmp_path, range(8), range(8, 12))
    cmi.torch_checkpoint(job).parent.mkdir(parents=True)
    cmi.torch_checkpoint(job).write_bytes(b"PK half a file")
    assert "damaged" in cmi.torch_resumable(job, config())
    cmi.fit_torch(job, cmi.make_frames(rec), labels, config(torch_max_epochs=1))
    assert "damaged" in capsys.readouterr().out


def training_of(job, frames, cfg, labels):
    spec = cmi.net_spec(frames, labels.table, cfg)
    run = cmi.new_training(job, spec, frames, cfg)
    return run, cmi.Store.of(frames, spec, run.device, labels.phase)


def full_batch(store, labels, n):
    return cmi.make_batch(
        store, cmi.plain_draw(store, np.arange(n)), labels.composite, len(labels.table)
    )


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_accumulated_pieces_have_the_gradient_of_the_whole(tmp_path, micro):
    rec, labels = labelled(8)
    cfg, frames = config(torch_dropout=0.0), cmi.make_frames(rec)
    gradients = []
    for size in (8, micro):
        run, store = training_of(job_in(tmp_path, range(8), []), frames, cfg, labels)
        run.net.eval()  # statistics of a piece are its own, so they are fixed here
        run.micro = size
        loss = cmi.backward(run, full_batch(store, labels, 8), None, cfg)
        gradients.append([loss, *(p.grad for p in run.net.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 2e-4 * a.abs().max() + 1e-6


def test_a_checkpoint_of_another_precision_can_be_taken_up(tmp_path):
    """float16 has a scaler; float32 and bfloat16 leave nothing of theirs in the file."""
    rec, labels = labelled(20)
    job = job_in(tmp_path, range(15), range(15, 20))
    run = training_of(job, cmi.make_frames(rec), config(), labels)[0]
    state = run.state() | {"epoch": 3}
    assert state["scaler"] == {}
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True)
    run.restore(state)
    assert run.epoch == 3
    assert run.scaler.get_scale() == 8.0


def test_out_of_memory_halves_the_pieces_and_goes_on(tmp_path, monkeypatch, capsys):
    rec, labels = labelled(40)
    frames, cfg = cmi.make_frames(rec), config(torch_batch_size=512, torch_max_epochs=2)
    monkeypatch.setattr(cmi, "torch_batch", lambda n_train, cfg: 16)
    original, sizes = cmi.new_training, []

    def tight(*args):
        run = original(*args)

        def forward(rows, *rest):
            sizes.append(len(rows))
            if len(rows) > 5:
                raise torch.OutOfMemoryError("injected")
            return run.net(rows, *rest)

        run.forward = forward
        return run

    monkeypatch.setattr(cmi, "new_training", tight)
    info = cmi.fit_torch(job_in(tmp_path, range(32), range(32, 40)), frames, labels, cfg)
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[3:]) == 4
    assert info["steps"] == 4  # two epochs of two steps of sixteen: the schedule is untouched
    told = [k for k in capsys.readouterr().out.splitlines() if "retreat" in k]
    assert len(told) == 2
    assert "recordings_at_once=4" in told[1]


def test_out_of_memory_with_one_recording_is_an_error(tmp_path):
    rec, labels = labelled(4)
    cfg, frames = config(), cmi.make_frames(rec)
    run, store = training_of(job_in(tmp_path, range(4), []), frames, cfg, labels)

    def never(*args):
        raise torch.OutOfMemoryError("injected")

    run.forward = never
    with pytest.raises(torch.OutOfMemoryError):
        cmi.train_step(run, full_batch(store, labels, 4), None, cfg)


@pytest.mark.parametrize("n_train", [1, 2, 10])
@pytest.mark.parametrize("mode", ["all", "imu"])
def test_a_handful_of_recordings_trains(tmp_path, n_train, mode):
    """Labels that no training row carries, recordings of one row, sensors that are never there."""
    rec, labels = labelled(14, rows=(1, 12))
    rot, thm = rec.rot.copy(), rec.thm.copy()
    rot[:], thm[:] = np.nan, np.nan
    frames = cmi.make_frames(changed(rec, rot=rot, thm=thm)).of_mode(mode)
    job = job_in(tmp_path, range(n_train), range(n_train, 14), mode)
    cfg = config(torch_tof_images=True)
    assert np.isfinite(cmi.fit_torch(job, frames, labels, cfg)["score"])
    model = cmi.load_torch(job.folder, [job.stem], labels.table, cfg)
    proba = cmi.predict_torch(model, frames)
    assert np.isfinite(proba).all()
    np.testing.assert_allclose(proba.sum(2), 1, atol=1e-5)


def test_early_stopping_keeps_the_best_and_a_fixed_number_the_last(tmp_path, monkeypatch):
    rec, labels = labelled(12)
    frames = cmi.make_frames(rec)
    seen = []

    def keep(run, *rest):
        seen.append(run.ema.state_dict()["head.out.weight"].clone())

    monkeypatch.setattr(cmi, "note_epoch", keep)
    reached = iter([0.3, 0.6, 0.5, 0.55, 0.1])
    monkeypatch.setattr(cmi, "score_parts", lambda *a: (s := next(reached), s))
    job = job_in(tmp_path / "a", range(8), range(8, 12))
    info = cmi.fit_torch(job, frames, labels, config(torch_max_epochs=9, torch_es_patience=2))
    assert (info["epoch"], info["score"], info["epochs"]) == (2, 0.6, 4)
    assert torch.equal(weights(job)["head.out.weight"], seen[1])
    assert not torch.equal(seen[1], seen[3])
    seen.clear()
    reached = iter([0.3, 0.6, 0.5])
    job = job_in(tmp_path / "b", range(8), range(8, 12))
    info = cmi.fit_torch(job, frames, labels, config(torch_max_epochs=3, torch_es_patience=0))
    assert (info["epoch"], info["score"], info["epochs"]) == (3, 0.5, 3)
    assert torch.equal(weights(job)["head.out.weight"], seen[2])


def test_only_training_rows_standardise(tmp_path):
    rec, labels = labelled(12)
    acc = rec.acc.copy()
    acc[rec.start[8] :] += 1000  # the validation rows are from another world
    frames, job = cmi.make_frames(changed(rec, acc=acc)), job_in(tmp_path, range(8), range(8, 12))
    cmi.fit_torch(job, frames, labels, config(torch_max_epochs=1))
    own, state = frames.x[: rec.start[8]].astype(float), weights(job)
    np.testing.assert_allclose(state["trunk.mean"], np.nanmean(own, axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(state["trunk.sd"][:3], own[:, :3].std(axis=0), rtol=1e-3)


def test_every_epoch_shows_every_training_row_once_and_in_another_order(tmp_path, monkeypatch):
    rec, labels = labelled(24)
    original, shown = cmi.make_batch, []

    def spy(store, draw, *labels):
        shown.extend([draw.which.tolist()] if labels else [])  # without labels it only asks
        assert not set(draw.partner) - {*range(4, 23)} or not labels
        return original(store, draw, *labels)

    monkeypatch.setattr(cmi, "make_batch", spy)
    job = job_in(tmp_path, range(4, 23), [0, 1])
    cmi.fit_torch(job, cmi.make_frames(rec), labels, config(torch_max_epochs=2, torch_batch_size=4))
    assert [len(k) for k in shown] == [4, 4, 4, 4, 3] * 2
    epochs = [[i for batch in part for i in batch] for part in (shown[:5], shown[5:])]
    assert all(sorted(k) == list(range(4, 23)) for k in epochs)
    assert epochs[0] != epochs[1]


def test_a_loss_that_is_no_number_stops_with_a_remedy(tmp_path, monkeypatch):
    rec, labels = labelled(12)
    monkeypatch.setattr(cmi, "torch_loss", lambda out, *a: out[0].sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="TORCH_LR"):
        cmi.fit_torch(
            job_in(tmp_path, range(8), range(8, 12)), cmi.make_frames(rec), labels, config()
        )


def test_side_by_side_equals_one_after_another(tmp_path):
    rec, labels = labelled(20)
    frames, cfg = cmi.make_frames(rec), config(torch_max_epochs=2)

    def jobs(name):
        halves = [(range(10), range(10, 20)), (range(10, 20), range(10))]
        return [job_in(tmp_path / name, *halves[k], fold=k) for k in range(2)]

    for job in jobs("serial"):
        cmi.fit_torch(job, frames, labels, cfg)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: cmi.fit_torch(job, frames, labels, cfg), jobs("parallel")))
    for a, b in zip(jobs("serial"), jobs("parallel"), strict=True):
        one, other = weights(a), weights(b)
        assert all(torch.equal(one[k], other[k]) for k in one)
    folds = [weights(job) for job in jobs("serial")]
    assert not torch.equal(folds[0]["head.out.weight"], folds[1]["head.out.weight"])


# Devices ----------------------------------------------------------------------------------------


@pytest.fixture
def cards(monkeypatch):
    """Pretend that there are cards, of which some have no kernels."""

    def pretend(*works):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(works))
        monkeypatch.setattr(cmi, "card_works", lambda i: works[i])

    return pretend


def test_one_job_a_card(cards, tmp_path):
    job = job_in(tmp_path, range(600), range(600, 640))
    cards(True, True)
    names = [str(cmi.device_for(i, config())) for i in range(4)]
    assert names == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert cmi.torch_side_by_side(job, config()) == 2
    assert str(cmi.device_for(1, config(torch_data_parallel=True))) == "cuda:0"
    assert cmi.torch_side_by_side(job, config(torch_data_parallel=True)) == 1
    cards(False, True)
    assert [str(cmi.device_for(i, config())) for i in range(2)] == ["cuda:1", "cuda:1"]
    cards(False)
    assert str(cmi.device_for(0, config())) == "cpu"
    cards()
    assert str(cmi.device_for(5, config())) == "cpu"


def test_a_card_without_kernels_is_told_and_left_out(monkeypatch, capsys):
    def no_kernel(*args, **kwargs):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nmore"
        )

    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    cmi.card_works.cache_clear()
    assert cmi.card_works(0) is False
    cmi.card_works.cache_clear()
    out = capsys.readouterr().out
    assert all(k in out for k in ("P100", "sm_60", "sm_75,sm_90", "no kernel image"))


@pytest.mark.parametrize(
    ("capability", "amp", "dtype"),
    [
        ((7, 5), True, torch.float16),
        ((6, 0), True, torch.float16),
        ((8, 0), True, torch.bfloat16),
        ((9, 0), False, None),
    ],
)
def test_precision_follows_the_card(monkeypatch, capability, amp, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    assert cmi.half_precision(torch.device("cuda:0"), config(torch_amp=amp)) is dtype
    assert cmi.half_precision(torch.device("cpu"), config()) is None


# Bundles and serving ----------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    """Three untrained folds in a folder, and frames to ask them about."""
    frames = frames_with_gaps([1, 5, 64, 90, 130])
    for k in range(3):
        spec = spec_of(frames, images=True)
        content = {"spec": dataclasses.asdict(spec), "state": fresh_net(spec, seed=k).state_dict()}
        (tmp_path / f"fold{k:02d}.pt").write_bytes(cmi.torch_bytes(content))
    return tmp_path, [f"fold{k:02d}" for k in range(3)], frames


def test_all_networks_in_one_pass_equal_the_plain_loop(bundle):
    folder, stems, frames = bundle
    model = cmi.load_torch(folder, stems, TABLE, config())
    together = cmi.predict_torch(model, frames)
    assert together.shape == (3, 5, 12)
    for i in range(5):
        one = cmi.predict_torch(model, frames.take(np.array([i])))
        np.testing.assert_allclose(one[:, 0], together[:, i], rtol=0, atol=1e-5)
    loop = [
        cmi.ask(net, cmi.Store.of(frames, model.spec, torch.device("cpu")), np.array([2]))
        for net in model.nets
    ]
    one = cmi.predict_torch(model, frames.take(np.array([2])))
    np.testing.assert_allclose(one, loop, rtol=0, atol=1e-5)
    assert np.abs(one[0] - one[1]).max() > 1e-3  # three networks, not one three times


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_with_code_in_it_is_refused(bundle):
    folder, stems, _ = bundle
    trap = folder / "executed"
    buffer = io.BytesIO()
    torch.save({"spec": Evil(trap), "state": {}}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Evil(trap), protocol=2)):
        (folder / "fold01.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"fold01\.pt holds more than weights"):
            cmi.load_torch(folder, stems, TABLE, config())
    assert not trap.exists()


@pytest.mark.parametrize(
    "damage",
    ["no state", "no spec", "a list", "a weight is missing", "a shape", "empty", "too wide"],
)
def test_a_file_that_is_no_network_is_named(bundle, damage):
    folder, stems, _ = bundle
    path = folder / "fold02.pt"
    content = torch.load(path, weights_only=True)
    if damage in ("no state", "no spec"):
        del content[damage[3:]]
    elif damage == "a list":
        content = [1]
    elif damage == "a weight is missing":
        content["state"].pop("head.out.bias")
    elif damage == "a shape":
        content["state"]["head.out.bias"] = torch.zeros(3)
    elif damage == "too wide":
        content["spec"]["width"] = 10**9
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(b"" if damage == "empty" else buffer.getvalue())
    with pytest.raises(ValueError, match=r"fold02\.pt"):
        cmi.load_torch(folder, stems, TABLE, config())


def test_damaged_bytes_are_refused_or_read_never_run(bundle):
    folder, stems, _ = bundle
    path, rng = folder / "fold01.pt", np.random.default_rng(5)
    whole, refused = path.read_bytes(), []
    for _ in range(60):
        spoilt = bytearray(whole)
        for at in rng.integers(len(whole) - 6000, len(whole), 3):  # where the archive is described
            spoilt[at] = rng.integers(256)
        path.write_bytes(spoilt[: rng.integers(len(whole))] if rng.random() < 0.2 else spoilt)
        try:
            cmi.load_torch(folder, stems, TABLE, config())
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all("fold" in message for message in refused)


def test_other_labels_or_other_channels_are_refused(bundle):
    folder, stems, frames = bundle
    with pytest.raises(ValueError, match="labels"):
        cmi.load_torch(folder, stems, TABLE[:-1], config())
    model = cmi.load_torch(folder, stems, TABLE, config())
    with pytest.raises(ValueError, match="channels"):
        cmi.predict_torch(model, frames.of_mode("imu"))


def test_networks_of_different_make_do_not_join(bundle):
    folder, stems, frames = bundle
    spec = spec_of(frames, width=8)
    content = {"spec": dataclasses.asdict(spec), "state": fresh_net(spec).state_dict()}
    (folder / "fold00.pt").write_bytes(cmi.torch_bytes(content))
    with pytest.raises(ValueError, match="differ"):
        cmi.load_torch(folder, stems, TABLE, config())


def test_frames_mapped_from_disk_are_as_good(bundle, tmp_path):
    folder, stems, frames = bundle
    np.save(tmp_path / "x.npy", frames.x)
    mapped = dataclasses.replace(frames, x=np.load(tmp_path / "x.npy", mmap_mode="r"))
    model = cmi.load_torch(folder, stems, TABLE, config())
    np.testing.assert_array_equal(
        cmi.predict_torch(model, mapped), cmi.predict_torch(model, frames)
    )


def test_without_a_card_one_job_a_core_unless_it_is_done_at_once(cards, tmp_path, monkeypatch):
    cards()
    monkeypatch.setattr(cmi.os, "sched_getaffinity", lambda _: range(6))
    large, small = (job_in(tmp_path, range(n), range(n, n + 9)) for n in (600, 100))
    assert cmi.torch_side_by_side(large, config(torch_threads=1)) == 6
    assert cmi.torch_side_by_side(large, config(torch_threads=4)) == 1
    assert cmi.torch_side_by_side(small, config(torch_threads=1)) == 1
