"Rivals and ablations: the interface of a detector, trainings, stored rows, tables, the CycleGAN."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from mits_nb.attack.ctgan import CTGAN
from mits_nb.attack.tamper import Equalizer, tamper
from mits_nb.core import DetectError, TrainError, UsageError, WeightsError, from_preset, torch_rng, weights_path, write_json
from mits_nb.detect.cascade import Cascade
from mits_nb.detect.cnn import FORGED, PAIRED, Detector, PatchSet, cut_patch, window_probability
from mits_nb.detect.heatmap import heatmap
from mits_nb.detect.rivals import (ROWS, TABLE1, TABLE2, TABLE3, TABLE4, CycleConfig, CycleForger, CycleInpainter, CycleNet, CycleTask, DctDetector, TablesConfig, TimmNet, ablation, add_noise,
                                   beside_paper, clean_slices, cyclegan_patches, cyclegan_set, dct_matrix, denoising_gain, draw_piles, draw_slices, fingerprint, new_net, row_cascade,
                                   row_scores, scan_row, slide, stored_tables, table_rows, timm_body, train_cyclegan, train_rival, whole_probability)
from mits_nb.detect.training import ForgedSlices
from mits_nb.detect.windows import grid_mask, grid_shape
from mits_nb.scan import Scan


def grainy(seed, size=96):
    "A slice of noise, and the same with a smooth disk: a forgery that any network can learn."
    g = np.random.default_rng(seed)
    hu = g.normal(-800, 80, (size, size))
    y, x = g.integers(34, size - 34, 2)
    yy, xx = np.ogrid[:size, :size]
    disk = (yy - y) ** 2 + (xx - x) ** 2 < 14**2
    return hu.astype(np.int16), np.where(disk, -800, hu).astype(np.int16), (y, x)


def make_slices(n, seed, size=96):
    hu, action, scan = [], [], []
    for i in range(n):
        before, after, _ = grainy(1000 * seed + i, size)
        hu, action, scan = hu + [after, before], action + [("inject", "remove")[i % 2], ""], scan + [i // 2 % 4] * 2
    return ForgedSlices(hu, np.arange(2 * n) % 2 == 0, np.array(scan), np.array(action))


@pytest.fixture(scope="module")
def patches():
    hu, kind = [], []
    for i in range(24):
        before, after, at = grainy(i)
        hu, kind = hu + [cut_patch(after, at), cut_patch(before, at)], kind + [FORGED, PAIRED]
    return PatchSet(np.stack(hu), np.array(kind, np.uint8))


SMALL = TablesConfig(preset="tiny", width=.125, size="tiny", step=4, slice_steps=2, slice_batch=2, second=dict(components=4),
                     first=dict(batch=16, dense_batch=4, steps=12, lr=3e-3, decay_every=50, dropout=.1))


def number(net): return sum(p.numel() for p in net.parameters())


def test_parameter_counts_of_the_published_networks():
    assert number(timm_body("xception")) == 20_810_474 # Chollet's 22.9 M with one channel in and two classes out
    assert number(timm_body("resnet50")) == 23_505_858
    assert number(timm_body("xception", "tiny")) < 2_500_000 and number(timm_body("resnet50", "tiny")) < 2_500_000


@pytest.mark.parametrize("name, size", [("vgg", "full"), ("xception", "huge")])
def test_unknown_rivals_are_refused(name, size):
    with pytest.raises(UsageError): TimmNet(name, size)


@pytest.mark.parametrize("make", [lambda: TimmNet("xception", "tiny"), lambda: TimmNet("resnet50", "tiny"), lambda: DctDetector(width=.125)], ids=("xception", "resnet50", "dct"))
def test_a_rival_stands_where_a_detector_stands(make, monkeypatch):
    torch.manual_seed(0)
    net = make()
    hu = torch.randn(5, 1, 32, 32, generator=torch_rng(0, "hu")) * 100 - 800
    if isinstance(net, DctDetector): net.learn_scale(hu)
    for _ in range(30): net.train()(hu) # statistics under which answers differ
    assert net(hu).shape == (5, 2)
    p = net.probability(hu)
    assert net.training and p.shape == (5,) and ((p >= 0) & (p <= 1)).all() # the mode comes back
    assert torch.equal(p, window_probability(net, hu))
    assert next(net.to(dtype=torch.bfloat16).parameters()).dtype == torch.float32 # as `dense_heatmaps` asks for
    with pytest.raises(DetectError): net.probability(torch.full((1, 1, 32, 32), float("nan")))
    with pytest.raises(DetectError): net.probability(torch.zeros(1, 1, 33, 32))
    from mits_nb import core
    for module in ("cnn", "heatmap", "rivals"): monkeypatch.setattr(f"mits_nb.detect.{module}.pick_compute", lambda device=None: core.pick_compute(device, "fp32"))
    some = np.random.default_rng(0).normal(-800, 100, (2, 41, 52)).astype(np.float32)
    exact, dense = heatmap(some, net, method="windows"), heatmap(some, net)
    assert exact.shape == (2, *grid_shape((41, 52))) and exact[:, grid_mask((41, 52))].std() > 1e-4 and np.allclose(exact, dense, atol=1e-4)
    assert ((exact == 0) == ~grid_mask((41, 52))).all()


def test_padding_is_clipped_inside_the_network():
    torch.manual_seed(0)
    net = TimmNet("resnet50", "tiny").eval()
    a = torch.randn(1, 1, 32, 32, generator=torch_rng(0, "hu")) * 100 - 900
    a[..., :4] = -1000
    b = a.clone()
    b[..., :4] = -3024
    assert torch.equal(net(a.clamp(-1000)), net(b.clamp(min=-3024)))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_slide_asks_the_right_windows(step):
    hu = torch.arange(64 * 80.).view(1, 1, 64, 80)
    asked = []
    def answer(x):
        asked.append(len(x))
        return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 0] + 1], 1)
    found = slide(answer, hu, step)[0, 0]
    rows, columns = grid_shape((64, 80))
    assert found.shape == (rows, columns) and sum(asked) == -(-rows // step) * -(-columns // step)
    truth = hu[0, 0, ::4, ::4][:rows, :columns] # first pixel of every window
    assert torch.equal(found[::step, ::step], truth[::step, ::step])
    off = (found - truth).abs()
    assert off.max() <= (step // 2 + step) * 4 * 81 # never further away than the nearest asked one, or the last
    if step == 1: assert off.max() == 0


def test_slide_takes_the_nearest_answer():
    hu = torch.zeros(1, 1, 32, 32 + 4 * 8)
    hu[0, 0, 0] = torch.arange(64.)
    found = slide(lambda x: x[:, 0, 0, :1].repeat(1, 2), hu, 4)[0, 0, 0] / 4 # which window answered for each cell
    assert found.tolist() == [0, 0, 4, 4, 4, 4, 8, 8, 8]
    with pytest.raises(UsageError): slide(lambda x: x, hu, 0)
    with pytest.raises(DetectError): slide(lambda x: x, torch.zeros(1, 1, 31, 64), 1)


def test_dct_by_matrix_is_scipys_and_orthogonal():
    x = torch.randn(32, 32, dtype=torch.float64, generator=torch_rng(0, "x"))
    D = dct_matrix(32).double()
    assert np.allclose(D @ x @ D.T, dctn(x.numpy(), norm="ortho"), atol=1e-5)
    assert torch.allclose(D @ D.T, torch.eye(32, dtype=torch.float64), atol=1e-6)
    flat = D @ torch.full((32, 32), 3., dtype=torch.float64) @ D.T
    assert torch.isclose(flat[0, 0], torch.tensor(96., dtype=torch.float64), atol=1e-4) and flat[1:].abs().max() < 1e-4


def test_dct_detector_standardises_what_it_learnt(patches, tmp_path):
    net = DctDetector(width=.125)
    hu = torch.from_numpy(patches.hu[:, None, 18:50, 18:50].astype(np.float32))
    net.learn_scale(hu)
    z = (net.spectrum(hu) - net.mean) / net.spread
    assert z.mean((0, 1)).abs().max() < 1e-3 and (z.std((0, 1)) - 1).abs().max() < 1e-2
    with pytest.raises(DetectError): net(torch.zeros(1, 1, 64, 64))
    net.eval().save_pretrained(tmp_path) # the scale travels with the weights
    assert torch.equal(DctDetector.from_pretrained(tmp_path)(hu), net(hu))


def test_training_learns_and_is_repeatable(patches):
    def train(steps, seed=0): return train_rival(new_net(ROWS["ResNet50"], SMALL, seed), patches, replace(SMALL.detector, steps=steps), seed=seed, show_progress=False)
    net, history = train(24)
    assert np.mean(history["accuracy"][-6:]) > .8 and not net.training
    (a, _), (b, _), (c, _) = train(2), train(2), train(2, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))


def test_training_goes_on_where_it_was(patches, tmp_path):
    def train(out, callbacks=()): return train_rival(new_net(ROWS["Ours-DCT"], SMALL), patches, replace(SMALL.detector, steps=6), out=out, callbacks=callbacks, show_progress=False)[0]
    class Stop(Exception): pass
    def interrupt(step, task, history):
        if step == 3: raise Stop
    with pytest.raises(Stop): train(tmp_path, (interrupt,))
    steps = []
    resumed = train(tmp_path, (lambda step, task, history: steps.append(step),))
    assert steps[0] > 1 and steps[-1] == 6 # not from the beginning
    assert all(torch.equal(x, y) for x, y in zip(resumed.state_dict().values(), train(None).state_dict().values()))


def test_validation_stops_and_is_measured_on_windows(patches):
    config = replace(SMALL.detector, steps=4, validate_every=2)
    _, history = train_rival(new_net(ROWS["Ours-DCT"], SMALL), patches, config, validation=patches, show_progress=False)
    assert len(history["val_windows"]) == 2 and all(0 <= v <= 1 for v in history["val_windows"])


def test_one_class_is_refused(patches):
    forged = PatchSet(patches.hu[patches.kind == FORGED], patches.kind[patches.kind == FORGED])
    with pytest.raises(TrainError): train_rival(new_net(ROWS["ResNet50"], SMALL), forged, SMALL.detector, show_progress=False)
    slices = make_slices(2, 0)
    honest = ForgedSlices(slices.hu, np.zeros(4, bool), slices.scan, slices.action)
    with pytest.raises(TrainError): train_rival(new_net(ROWS["ResNet50-W"], SMALL), honest, SMALL.detector, show_progress=False)


def test_batches_of_slices_are_balanced_and_filled_with_air():
    slices = make_slices(3, 0)
    slices.hu[0] = slices.hu[0][:70, :90]
    batch = draw_slices(slices, 8, torch_rng(0, "draw"))
    assert batch["windows"].shape == (8, 1, 96, 96) and batch["label"].tolist() == [1, 0] * 4
    again = draw_slices(slices, 8, torch_rng(0, "draw"))
    assert torch.equal(batch["windows"], again["windows"])
    for seed in range(20): # a small slice keeps its values, the rest is air
        for row in draw_slices(ForgedSlices([slices.hu[0], slices.hu[1]], slices.tampered[:2], slices.scan[:2], slices.action[:2]), 2, torch_rng(seed, "d"))["windows"][:1]:
            assert int((row != -1000).sum()) <= 70 * 90


def test_whole_slices_of_any_size_get_a_probability():
    torch.manual_seed(0)
    for net in (TimmNet("xception", "tiny"), Detector(width=.125)):
        p = whole_probability(net.train(), [np.zeros((64, 64), np.int16), np.full((80, 96), -900, np.int16), np.full((66, 70), -900, np.int16), np.full((65, 71), -900, np.int16)], False)
        assert p.shape == (4,) and ((0 <= p) & (p <= 1)).all() and net.training
        with pytest.raises(DetectError): whole_probability(net, [np.full((64, 64), np.nan, np.float32)], False)


def test_rows_differ_in_what_they_say():
    assert set(TABLE1) | set(TABLE2) | set(TABLE3) - {"Ours-W"} <= set(ROWS)
    nets = {name: new_net(row, SMALL) for name, row in ROWS.items()}
    assert number(nets["Ours-Attention"]) < number(nets["Ours"]) == number(nets["Ours-Selu"])
    assert nets["Ours"].selu and not nets["Ours-Selu"].selu and nets["ResNet50"].step == 4
    a, b = new_net(ROWS["Ours"], SMALL, 1), new_net(ROWS["Ours"], SMALL, 1)
    assert torch.equal(a.last.weight, b.last.weight)
    state = torch.get_rng_state()
    new_net(ROWS["Ours"], SMALL, 2)
    assert torch.equal(state, torch.get_rng_state()) # the caller's random numbers stay


def test_published_tables_agree_with_themselves():
    for acc, p, r, f1 in (*TABLE1.values(), *TABLE2.values(), *TABLE3.values()):
        assert abs(2 * p * r / (p + r) - f1) < 1e-3 and abs((r + 1 - r * (1 - p) / p) / 2 - acc) < 1e-3
    wrong = {(scan, m) for scan, (_, methods) in TABLE4.items() for m, (tp, tn, fp, fn, acc) in methods.items() if abs((tp + tn) / (tp + tn + fp + fn) - acc) > 1e-3}
    assert wrong == {("MAL", "XceptionNet"), ("MAL", "ResNet50"), ("REM2", "XceptionNet")}


def test_an_ablation_is_stored_and_read_again(patches, tmp_path, monkeypatch, caplog):
    global_slices, test = make_slices(8, 1), make_slices(4, 2)
    run = lambda **changes: ablation("Ours", patches, global_slices, test, config=replace(SMALL, **changes), out=tmp_path, show_progress=False)
    first = run()
    assert (tmp_path / "ours-0.json").is_file() and len(first["probability"]) == 8 and first["settings"]["row"]["net"] == "detector"
    networks = sorted((tmp_path / "networks").iterdir())
    assert len(networks) == 1 and (networks[0] / "model.safetensors").is_file() # no checkpoints left
    monkeypatch.setattr("mits_nb.detect.rivals.train_detector", lambda *a, **k: pytest.fail("trained again"))
    assert run() == first
    with pytest.raises(TrainError, match="other data or settings"): run(step=2)
    (tmp_path / "ours-0.json").write_text('{"row": "Ours", "sco')  # a disk that was full
    with caplog.at_level("WARNING", "mits_nb"): again = run()
    assert "computing this row again" in caplog.text and again["settings"] == first["settings"] and np.allclose(again["probability"], first["probability"], atol=1e-3)
    assert run() == again and len(sorted((tmp_path / "networks").iterdir())) == 1  # written down once more, from the network that is there
    # the heatmap without co-occurrence shares the first stage
    plain = ablation("Ours-GLCM", patches, global_slices, test, config=SMALL, out=tmp_path, show_progress=False)
    assert plain["row"] == "Ours-GLCM" and len(sorted((tmp_path / "networks").iterdir())) == 1


def test_a_row_for_whole_slices_and_one_kind_of_forgery(patches, tmp_path):
    global_slices, test = make_slices(6, 1), make_slices(4, 2)
    whole = ablation("XceptionNet-W", patches, global_slices, test, config=SMALL, show_progress=False)
    assert whole["second_stage"] is None and len(whole["probability"]) == 8
    removed = ablation("CTGAN-REM", patches, global_slices, test, config=SMALL, show_progress=False)
    assert set(removed["action"]) == {"remove", ""} and len(removed["tampered"]) == 4
    with pytest.raises(UsageError, match="no row"): ablation("VGG", patches, global_slices, test)
    with pytest.raises(UsageError, match="no second stage"): row_cascade(ROWS["Ours-SW"], patches, global_slices, SMALL)


def test_sizes_may_differ_but_not_without_cooccurrence(patches):
    mixed = make_slices(6, 1)
    mixed.hu[1] = mixed.hu[1][:80]
    with pytest.raises(TrainError, match="different sizes"): row_cascade(ROWS["Ours-GLCM"], patches, mixed, SMALL, show_progress=False)


def test_fingerprints_see_every_pixel_and_label(patches):
    a, b = make_slices(2, 1), make_slices(2, 1)
    assert fingerprint(patches, a) == fingerprint(patches, b)
    b.hu[1][3, 4] += 1
    assert fingerprint(patches, a) != fingerprint(patches, b)
    assert fingerprint(a) != fingerprint(ForgedSlices(a.hu, ~a.tampered, a.scan, a.action))
    assert fingerprint(None, a) != fingerprint(a)


def fake(row, seed, right, n=40):
    "A result in which the first `right` of `n` slices are called correctly."
    tampered = np.arange(n) % 2 == 0
    p = np.where(np.arange(n) < right, tampered, ~tampered) * .8 + .1
    return {"row": row, "seed": seed, "scores": row_scores(p, tampered), "probability": p.tolist(), "tampered": tampered.tolist(), "scan": (np.arange(n) // 10).tolist(),
            "parameters": 5, "step": 1, "seconds": 1., "settings": {"row": row, "seed": seed}}


def test_tables_join_seeds_and_resample_scans():
    rows = table_rows([fake("Ours", 1, 36), fake("Ours", 0, 40), fake("ResNet50", 0, 20)], 200)
    assert rows["Ours"]["accuracy"] == .95 and rows["Ours"]["seeds"] == [0, 1] and abs(rows["Ours"]["spread"] - .1) < 1e-9
    low, high = rows["Ours"]["accuracy_interval"]
    assert low < .95 < high <= 1 and rows["ResNet50"]["per_scan"] == [1., 1., 0., 0.] and rows["Ours"]["per_scan"] == [1., 1., 1., .8]
    assert rows["ResNet50"]["accuracy_interval"][0] == 0. # two scans all wrong, two all right: a slice-wise interval would be far too short
    frame = beside_paper(rows, TABLE3)
    assert frame.loc["Ours", "accuracy, ours"] == .95 and frame.loc["Ours", "accuracy, paper"] == TABLE1["Ours"][0]
    assert frame.loc["XceptionNet", "seeds"] == 0 and frame.loc["Ours", "seeds"] == 2
    json.dumps(rows)


def test_tables_refuse_mixtures():
    other = fake("Ours", 1, 30)
    other["settings"]["row"] = "something else"
    with pytest.raises(UsageError, match="different data or settings"): table_rows([fake("Ours", 0, 30), other])


def test_scores_of_one_class_have_no_auc():
    assert row_scores(np.array([.2, .7]), np.array([False, False]))["auc"] is None
    both = row_scores(np.array([.2, .7, .5]), np.array([False, True, True]))
    assert both["auc"] == 1. and both["accuracy"] == 1. # one half counts as forged


def test_stored_tables(tmp_path):
    assert stored_tables(tmp_path) is None
    write_json(tmp_path / "tables.json", {"rows": {}})
    assert stored_tables(tmp_path) == {"rows": {}}
    with pytest.raises(WeightsError): stored_tables("no-such-weights")


def test_whole_scans_with_a_rival_as_first_stage(patches):
    cascade = row_cascade(ROWS["ResNet50"], patches, make_slices(8, 1), SMALL, show_progress=False)
    assert isinstance(cascade, Cascade)
    hu = np.stack([grainy(77)[1]] * 5)
    note = {"kind": "forged", "action": "inject", "at": [2, 40, 40], "settings": {"mask": 16, "blend": 4}}
    scan = Scan(grainy(5)[0][None].repeat(5, 0), (2.5, 1., 1.)).with_hu(hu, note)
    line = scan_row(cascade, scan)
    assert line["tp"] + line["tn"] + line["fp"] + line["fn"] == 5 and line["regions"]["tp"] + line["regions"]["fn"] == 1
    line = scan_row(cascade, Scan(hu, (2.5, 1., 1.)), np.zeros(5, bool))
    assert line["tp"] == line["fn"] == 0 and line["regions"]["tp"] == line["regions"]["fn"] == 0


@pytest.fixture(scope="module")
def cleaner():
    return CycleNet.from_pretrained(weights_path("cyclegan-tiny"))


def test_noise_is_gaussian_and_impulses_and_leaves_padding():
    hu = torch.full((1, 1, 300, 300), -500.)
    hu[..., :20] = -2000
    noisy = add_noise(hu, torch_rng(0, "n"), gaussian_hu=40., impulses=.02)
    assert torch.equal(noisy[..., :20], hu[..., :20])
    inside = noisy[..., 20:]
    low, high = (inside == -1000).float().mean(), (inside == 1000).float().mean()
    assert .008 < low < .012 and .008 < high < .012
    rest = inside[(inside != -1000) & (inside != 1000)]
    assert abs(rest.mean() + 500) < 1 and 39 < rest.std() < 41
    assert torch.equal(noisy, add_noise(hu, torch_rng(0, "n"), gaussian_hu=40., impulses=.02))


def test_the_generator_starts_by_changing_nothing_at_any_size():
    hu = torch.randn(2, 1, 37, 50, generator=torch_rng(0, "x")) * 300 - 700
    assert torch.equal(CycleNet()(hu), hu)


def test_shipped_cyclegan_takes_noise_out_and_keeps_the_anatomy(cleaner, phantom):
    for gaussian_hu, impulses in ((60., .01), (40., .005)):
        gain = denoising_gain(cleaner, phantom[0].hu[10:12], gaussian_hu=gaussian_hu, impulses=impulses)
        assert gain["cleaned"] > gain["noisy"] + 3 and gain["untouched"] > gain["cleaned"]
    hu = phantom[0].hu[10].astype(np.float32)
    noisy = add_noise(torch.from_numpy(hu)[None, None], torch_rng(0, "n"))[0, 0].numpy()
    cleaned = clean_slices(cleaner, noisy)
    grain = lambda x: np.median(np.abs(np.diff(x.astype(float), axis=1)))
    assert grain(cleaned) < .6 * grain(noisy) and cleaned.dtype == np.int16
    assert np.corrcoef(cleaned.ravel(), hu.ravel())[0, 1] > .98


def test_shipped_cyclegan_is_small(cleaner):
    folder = weights_path("cyclegan-tiny", "card.md", "history.json")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1_000_000
    assert "dB" in (folder / "card.md").read_text(encoding="utf-8")


def test_shipped_cyclegan_on_a_patient(cleaner, data_dir):
    from mits_nb.data import development_scans
    from mits_nb.scan import read_scan
    gain = denoising_gain(cleaner, read_scan(development_scans()["LIDC-IDRI-0003"]).hu[20:21])
    assert gain["cleaned"] > gain["noisy"] + 2


def test_clean_slices_keeps_shape_and_padding_and_refuses_nan(cleaner):
    hu = np.full((2, 40, 51), -800, np.int16)
    hu[:, :3] = -2000
    out = clean_slices(cleaner, hu)
    assert out.shape == hu.shape and (out[:, :3] == -2000).all() and clean_slices(cleaner, hu[0]).shape == (40, 51)
    with pytest.raises(DetectError): clean_slices(cleaner, np.full((40, 40), np.nan))


def test_cyclegan_trains_from_zero_losses(phantom):
    config = from_preset(CycleConfig, "tiny", width=8, blocks=1, d_width=4, batch=2, crop=64, steps=3)
    torch.manual_seed(0)
    task = CycleTask(config)
    first = {name: net.state_dict()["body.1.weight"].clone() for name, net in task.networks.items() if name in ("clean", "spoil")}
    batch = draw_piles([phantom[0]], config, torch_rng(0, "b"))
    assert batch["noisy"].shape == batch["clean"].shape == (2, 1, 64, 64) and not torch.equal(batch["noisy"], batch["clean"])
    losses = [task.update(batch, lambda loss: loss.backward()) for _ in range(3)]
    assert losses[0]["cycle"].item() == losses[0]["identity"].item() == 0 < losses[-1]["cycle"].item()
    assert all(not torch.equal(task.networks[name].state_dict()["body.1.weight"], w) for name, w in first.items())


def test_training_the_cyclegan_writes_weights_and_card(phantom, tmp_path):
    settings = dict(width=8, blocks=1, d_width=4, batch=2, crop=64, steps=3, show_progress=False)
    net = train_cyclegan("tiny", tmp_path / "net", [phantom[0]], **settings)
    again = CycleNet.from_pretrained(tmp_path / "net")
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(net.parameters(), again.parameters()))
    assert {f.name for f in tmp_path.iterdir()} == {"net"} and {f.name for f in (tmp_path / "net").iterdir()} == {"config.json", "model.safetensors", "history.json", "card.md"}
    with pytest.raises(TrainError, match="smaller than crops"): train_cyclegan("tiny", tmp_path / "other", [phantom[0]], **{**settings, "crop": 200})
    with pytest.raises(TrainError, match="no scans"): train_cyclegan("tiny", tmp_path / "other", [])
    assert not (tmp_path / "other").exists()


def test_the_cyclegan_set_comes_in_pairs(cleaner, phantom):
    found = cyclegan_set([phantom[0].hu[:4], phantom[0].hu[10:12]], cleaner, every=2)
    assert len(found.hu) == 6 and found.tampered.tolist() == [True, False] * 3 and found.scan.tolist() == [0] * 4 + [1] * 2
    assert found.action.tolist() == ["denoise", ""] * 3
    assert (found.hu[1] == phantom[0].hu[0]).all() and (found.hu[0] != found.hu[1]).mean() > .5
    patches = cyclegan_patches(found, n=4)
    assert len(patches) == 24 and (patches.kind == FORGED).sum() == 12
    before, after = patches.hu[4:8], patches.hu[:4] # the same places
    assert np.corrcoef(before.ravel().astype(float), after.ravel().astype(float))[0, 1] > .9


def test_an_untrained_detector_learns_the_cyclegan_set(cleaner, phantom):
    learn, look = (cyclegan_patches(cyclegan_set(phantom[0].hu[part], cleaner, seed), 12, seed) for part, seed in ((slice(4, 12), 0), (slice(14, 18), 1)))
    torch.manual_seed(0)
    net, _ = train_rival(Detector(width=.125, dropout=.1), learn, replace(SMALL.detector, steps=30, batch=32), show_progress=False)
    p = net.probability(torch.from_numpy(look.hu[:, None, 18:50, 18:50].astype(np.float32))).numpy()
    from mits_nb.metrics import roc_auc
    assert roc_auc(p, look.kind == FORGED) > .8


@pytest.fixture(scope="module")
def place(phantom):
    from mits_nb.data import lung_places
    return tuple(int(v) for v in lung_places(phantom[0], 1, seed=2, margin_mm=8)[0])


def test_the_inpainter_fits_the_pipeline(cleaner, phantom, place):
    equalizer = Equalizer().fit(phantom[0].hu)
    forged = tamper(phantom[0], place, CycleInpainter(cleaner, equalizer), "remove", equalizer=equalizer, seed=0)
    note, = forged.history[len(phantom[0].history):]
    box = tuple(slice(*b) for b in note["box"])
    changed = forged.hu != phantom[0].hu
    assert changed[box].any() and changed.sum() == changed[box].sum() # nothing outside the cuboid
    again = tamper(phantom[0], place, CycleInpainter(cleaner, equalizer), "remove", equalizer=equalizer, seed=0)
    assert (forged.hu == again.hu).all()


def test_the_inpainter_knows_nothing_of_the_emptied_centre(cleaner):
    "It gets what `empty_centre` left; the soap film does not read the hole."
    equalizer, cube = Equalizer(), torch.rand(1, 1, 32, 32, 32, generator=torch_rng(0, "c")) - .5
    other = cube.clone()
    other[..., 8:24, 8:24, 8:24] = .3
    paint = CycleInpainter(cleaner, equalizer)
    assert paint(cube).shape == cube.shape and torch.allclose(paint(cube), paint(other), atol=1e-4)
    assert not torch.equal(CycleInpainter(cleaner, equalizer, seed=1)(cube), paint(cube))


def test_the_forger_is_another_one_than_the_ctgan(cleaner, phantom, place):
    ctgan = CTGAN.from_pretrained("ctgan-tiny")
    forger = CycleForger(cleaner, ctgan)
    a, b = forger.tamper(phantom[0], place, "inject", seed=3), ctgan.tamper(phantom[0], place, "inject", seed=3)
    box = tuple(slice(*x) for x in a.history[-1]["box"])
    assert (a.hu[box] != b.hu[box]).any() and a.history[-1]["kind"] == "forged"
    assert np.corrcoef(a.hu[box].ravel(), b.hu[box].ravel())[0, 1] > .8 # but the same lesion
    with pytest.raises(UsageError): forger.tamper(phantom[0], place, "paint")
