"CT-GAN: training set, augmentation, training step, resume, weights, and what the shipped forger can do."
import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mits_nb.attack import ctgan as c
from mits_nb.attack.nets import Generator
from mits_nb.attack.tamper import Equalizer, Tampering, cuboid_box
from mits_nb.core import DataError, PlaceError, TrainError, UsageError, WeightsError, from_preset
from mits_nb.data import lung_mask, lung_places
from mits_nb.phantom import make_phantom

MINI = dict(width=2, d_width=2, steps=4, batch=2, settle=1, cubes=8, phantoms=2, phantom_shape=(10, 96, 96), phantom_spacing=(3.0, 3.4, 3.4))


@pytest.fixture(scope="module")
def phantom():
    scan, nodules = make_phantom(seed=3, shape=(20, 160, 160), spacing=(2.5, 2.1, 2.1), n_nodules=3)
    return scan, nodules, lung_mask(scan)


@pytest.fixture(scope="module")
def mini():
    return from_preset(c.CtganConfig, "tiny", **MINI)


@pytest.fixture(scope="module")
def cubes(mini, tmp_path_factory):
    return c.build_cubes(tmp_path_factory.mktemp("cubes"), c.training_sources(mini, data=()), mini, seed=0)


@pytest.fixture(scope="module")
def forger():
    "Untrained networks: the plumbing does not depend on what they have learned."
    torch.manual_seed(0)
    return c.CTGAN(Generator(2), Generator(2), Equalizer(high=400.0), Tampering(mask=20, high=400.0))


@pytest.fixture(scope="module")
def shipped():
    return c.CTGAN.from_pretrained("ctgan-tiny")


# ---- the training set

def test_sources_phantoms_only_and_seeds(mini):
    names = [name for name, *_ in c.training_sources(mini, data=())]
    assert names == ["phantom-1000", "phantom-1001"]


def test_sources_never_hold_the_test_patient(data_dir, monkeypatch):
    monkeypatch.setenv("MITS_DATA", str(data_dir))
    config = from_preset(c.CtganConfig, "tiny")
    names = [name for name, *_ in c.training_sources(config)]
    assert "LIDC-IDRI-0001" in names and not any("LIDC-IDRI-0003" in name for name in names)
    names = [name for name, *_ in c.training_sources(config, data=data_dir)]  # the same folder, given by hand: label maps are no scans either
    assert "CPTAC-LSCC_C3N-00247" in names and not any("LIDC-IDRI-0003" in name or "nodules" in name for name in names)
    names = [name for name, *_ in c.training_sources(replace(config, held_out=("LIDC-IDRI-0001", "Lung_Dx-A0001")))]  # another patient's turn
    assert {"LIDC-IDRI-0003", "CPTAC-LSCC_C3N-00247"} == {name for name in names if not name.startswith("phantom")}
    assert [s.name for s in c.held_out_scans(("LIDC-IDRI-0001",), phantoms=0)] == ["LIDC-IDRI-0001"]


def test_sources_bad_input(mini, tmp_path):
    with pytest.raises(DataError, match="does not exist"): c.training_sources(mini, data=tmp_path / "nowhere")
    with pytest.raises(DataError, match="no scan"): c.training_sources(mini, data=tmp_path)
    with pytest.raises(TrainError): c.training_sources(replace(mini, phantoms=0), data=())


def test_nodule_table(tmp_path):
    (tmp_path / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,-10,20.5,-30,12\n1.2.3,1,2,3,4\n")
    assert c.nodule_table(tmp_path) == {"1.2.3": [((-10.0, 20.5, -30.0), 12.0), ((1.0, 2.0, 3.0), 4.0)]}
    (tmp_path / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,-10,oops,-30,12\n")
    with pytest.raises(DataError, match="line 2"): c.nodule_table(tmp_path)
    assert c.nodule_table(tmp_path / "elsewhere") == {}


def test_real_nodules_land_where_the_table_says(data_dir, monkeypatch):
    monkeypatch.setenv("MITS_DATA", str(data_dir))
    source = c.read_training_scan(data_dir / "LIDC-IDRI-0003.mha", "LIDC-IDRI-0003", c.nodule_table(data_dir))
    at, mm = source.nodules[1]
    assert np.allclose(at, (30.7, 198.0, 307.6), atol=1.0) and abs(mm - 9.43) < 0.1
    assert c.tissue_mm3(source.scan, at, edge=8) > 150


def test_training_cube_grows_a_nodule_in_the_middle(phantom):
    scan, _, mask = phantom
    at = tuple(lung_places(scan, 1, seed=1, margin_mm=12, mask=mask)[0])
    plain, grown = c.training_cube(scan, at), c.training_cube(scan, at, 12.0, seed=5)
    assert plain.shape == (40, 40, 40) and plain.dtype == np.int16
    assert grown[18:22, 18:22, 18:22].mean() > -300 > plain[18:22, 18:22, 18:22].mean()
    assert np.abs(grown[:4].astype(int) - plain[:4]).mean() < 5  # far from it nothing changed
    assert np.array_equal(grown, c.training_cube(scan, at, 12.0, seed=5))
    assert not np.array_equal(grown, c.training_cube(scan, at, 12.0, seed=6))


def test_clear_places_keep_away_from_nodules(phantom):
    scan, nodules, mask = phantom
    source = c.TrainingScan("p", scan, tuple((n.centre_voxel, n.diameter_mm) for n in nodules))
    places = c.clear_places(source, 200, 0, mask, margin_mm=3.0)
    assert 20 < len(places) <= 200 and mask[tuple(places.T)].all()
    for n in nodules:
        assert np.linalg.norm((places - np.array(n.centre_voxel)) * scan.spacing, axis=1).min() > 16 + n.diameter_mm / 2


def test_build_cubes_is_deterministic_and_reused(mini, cubes, tmp_path):
    again = c.build_cubes(tmp_path, c.training_sources(mini, data=()), mini, seed=0)
    for action in c.ACTIONS: assert np.array_equal(again[action], cubes[action]) and len(cubes[action])
    assert sum(row["inject"] for row in cubes["sources"]) == len(cubes["inject"])
    stamp = (tmp_path / "inject.i16").stat().st_mtime_ns
    c.build_cubes(tmp_path, c.training_sources(mini, data=()), mini, seed=0)
    assert (tmp_path / "inject.i16").stat().st_mtime_ns == stamp
    other = c.build_cubes(tmp_path, c.training_sources(mini, data=()), mini, seed=1)
    assert not np.array_equal(other["inject"], cubes["inject"])


def test_build_cubes_without_lung(mini, tmp_path, phantom):
    empty = phantom[0].with_hu(np.full(phantom[0].shape, 40, np.int16))
    with pytest.raises(TrainError, match="no training cubes"):
        c.build_cubes(tmp_path, [("block", 4, lambda: c.TrainingScan("block", empty))], mini)


# ---- augmentation and network

def test_augment_quarter_turns_only_reorder():
    x = torch.randn(5, 40, 40, 40, generator=torch.Generator().manual_seed(0)) * 300
    y = c.augment(x, torch.Generator().manual_seed(1), jitter=0, turn=0.0)
    assert y.shape == (5, 1, 32, 32, 32)
    inside = x[:, 4:-4, 4:-4, 4:-4].flatten(1).sort().values
    assert torch.allclose(y.flatten(1).sort().values, inside, atol=0.5)
    assert torch.equal(y, c.augment(x, torch.Generator().manual_seed(1), jitter=0, turn=0.0))
    assert not torch.equal(y, c.augment(x, torch.Generator().manual_seed(2), jitter=0, turn=0.0))


def test_augment_keeps_a_centred_ball_centred():
    r = torch.linspace(-19.5, 19.5, 40)
    ball = ((r[:, None, None]**2 + r[:, None]**2 + r**2) < 64).float()[None].repeat(6, 1, 1, 1)
    y = c.augment(ball, torch.Generator().manual_seed(0), jitter=0, turn=1.0)[:, 0]
    p = torch.linspace(-15.5, 15.5, 32)
    for axis in (1, 2, 3):
        mass = y.sum(tuple(a for a in (1, 2, 3) if a != axis))
        assert ((mass * p).sum(1) / mass.sum(1)).abs().max() < 0.05


def test_batches_have_a_hole_and_are_pure(mini, cubes):
    batches = c.cube_batches(cubes["inject"], Equalizer().fit(cubes["inject"].copy()), replace(mini, start="zeros"))
    one, two = (batches(3, torch.Generator().manual_seed(7)) for _ in range(2))
    hole = c.centre_mask(32, mini.mask)
    assert torch.equal(one["cond"], two["cond"]) and torch.equal(one["target"], two["target"])
    assert (one["cond"][..., hole] == 0).all() and torch.equal(one["cond"][..., ~hole], one["target"][..., ~hole])
    film = c.cube_batches(cubes["inject"], Equalizer().fit(cubes["inject"].copy()), replace(mini, start="film"))(3, torch.Generator().manual_seed(7))
    assert torch.allclose(film["cond"], c.harmonic_inpaint(one["target"], hole), atol=1e-3) and torch.equal(film["target"], one["target"])
    assert one["target"].abs().max() <= 0.5 and one["target"][..., hole].std() > 0.01


def test_training_lowers_l1(cubes):
    config = from_preset(c.CtganConfig, "tiny", **MINI | dict(width=4, steps=16, batch=4, lr_g=4e-3))
    task = c.InpaintTask(config)
    history = c.fit(task, c.cube_batches(cubes["remove"], Equalizer().fit(cubes["remove"].copy()), config), 16, progress=False)
    assert np.mean(history["l1"][-3:]) < 0.75 * np.mean(history["l1"][:3])
    task.step = 0
    assert task.rate() == 1
    task.step = 15
    assert 0 < task.rate() < 0.2


def test_settled_statistics_are_those_of_inference(mini, cubes):
    torch.manual_seed(0)
    net = Generator(2, dropout=0.5)
    batches = c.cube_batches(cubes["remove"], Equalizer().fit(cubes["remove"].copy()), mini)
    norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm3d))
    seen = []
    hook = norm.register_forward_hook(lambda m, x, y: seen.append(x[0].detach()))
    c.settle_batchnorm(net, batches, 3, compute=c.pick_compute(precision="fp32"))
    hook.remove()
    means = torch.stack([x.mean((0, 2, 3, 4)) for x in seen]).mean(0)
    assert len(seen) == 3 and torch.allclose(norm.running_mean, means, atol=1e-5) and norm.momentum == 0.2 and not net.training


# ---- the one call

def test_train_ctgan_resumes_to_the_same_weights(tmp_path):
    whole = c.train_ctgan("tiny", tmp_path / "a", data=(), measure=False, **MINI)

    class Stop(Exception): pass
    def crash(step, task, history):
        if step == 2: raise Stop
    with pytest.raises(Stop): c.train_ctgan("tiny", tmp_path / "b", data=(), measure=False, callbacks=(crash,), **MINI)
    assert not (tmp_path / "b").exists()  # nothing half-written
    with pytest.raises(TrainError, match="another start"): c.train_ctgan("tiny", tmp_path / "b", data=(), measure=False, **MINI, start="zeros")
    again = c.train_ctgan("tiny", tmp_path / "b", data=(), measure=False, **MINI)
    for action in c.ACTIONS:
        a, b = whole.generator(action).state_dict(), again.generator(action).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (tmp_path / "b.work").exists()
    card = (tmp_path / "b" / "card.md").read_text()
    assert "phantom-1000" in card and "CC BY" in card and "seed=0" in card
    history = json.loads((tmp_path / "b" / "history.json").read_text())
    assert history["inject"]["rows"][-1]["step"] == 4 and "val_mae_hu" in history["remove"]["rows"][-1]


def test_unknown_preset_and_setting(tmp_path):
    with pytest.raises(UsageError): c.train_ctgan("huge", tmp_path / "x")
    with pytest.raises(UsageError): c.train_ctgan("tiny", tmp_path / "x", widht=3)


# ---- the forger

def test_save_and_load(forger, phantom, tmp_path):
    forger.save_pretrained(tmp_path / "w", half=False)
    again = c.CTGAN.from_pretrained(tmp_path / "w")
    assert again.settings == forger.settings and torch.equal(again.equalizer.cdf, forger.equalizer.cdf)
    at = (10, 80, 50)
    assert np.array_equal(forger.tamper(phantom[0], at).hu, again.tamper(phantom[0], at).hu)


def spoil_missing(w): (w / "remover" / "model.safetensors").unlink()
def spoil_short(w): (w / "injector" / "model.safetensors").write_bytes((w / "injector" / "model.safetensors").read_bytes()[:1000])
def spoil_width(w): (w / "injector" / "config.json").write_text(json.dumps({"width": 3}))
def spoil_settings(w): (w / "pipeline.json").write_text(json.dumps({"settings": {"mask": 20, "colour": "red"}}))
def spoil_json(w): (w / "pipeline.json").write_text("{")
def spoil_equalizer(w): (w / "pipeline.safetensors").write_bytes(b"")


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_short, spoil_width, spoil_settings, spoil_json, spoil_equalizer])
def test_broken_weights(forger, tmp_path, spoil):
    forger.save_pretrained(tmp_path / "w")
    spoil(tmp_path / "w")
    with pytest.raises(WeightsError): c.CTGAN.from_pretrained(tmp_path / "w")


def test_no_such_weights():
    with pytest.raises(WeightsError, match="ctgan-tiny"): c.CTGAN.from_pretrained("ctgan-gigantic")


def test_tamper_touches_the_box_only(forger, phantom):
    scan = phantom[0]
    at = [(9, 80, 50), (10.4, 70.2, 110.0)]
    forged = forger.tamper(scan, at, "remove", seed=2)
    outside = np.ones(scan.shape, bool)
    for place in at: outside[tuple(slice(*b) for b in cuboid_box(place, scan.spacing, scan.shape))] = False
    assert np.array_equal(forged.hu[outside], scan.hu[outside]) and not np.array_equal(forged.hu, scan.hu)
    assert forged.hu.dtype == scan.hu.dtype and not scan.history
    assert [note["action"] for note in forged.history] == ["remove", "remove"]
    assert np.array_equal(forged.hu, forger.tamper(scan, at, "remove", seed=2).hu)


def test_tamper_bad_input(forger, phantom):
    with pytest.raises(PlaceError): forger.tamper(phantom[0], (99, 10, 10))
    with pytest.raises(UsageError): forger.tamper(phantom[0], (9, 80, 50), "enlarge")
    with pytest.raises(UsageError): forger.tamper_tensor(torch.zeros(20, 40, 40), (9, 20, 20), (2.5, 2, 2), "enlarge")


def test_tensor_and_scan_agree(forger, phantom):
    scan, at = phantom[0], (9, 80, 50)
    quiet = c.CTGAN(forger.injector, forger.remover, forger.equalizer, replace(forger.settings, touch_up=None))
    tensor = quiet.tamper_tensor(torch.from_numpy(scan.hu.astype(np.float32)), at, scan.spacing, "inject")
    assert np.abs(tensor.numpy() - quiet.tamper(scan, at, "inject").hu).max() <= 0.51  # rounding to whole HU


def test_gradient_reaches_the_scan(shipped, phantom):
    "In double precision, where a step can be smaller than the distance to the next kink of the piecewise linear parts."
    scan, at = phantom[0], (9, 20, 20)
    exact = c.CTGAN(*(copy.deepcopy(m).double() for m in (shipped.injector, shipped.remover, shipped.equalizer)), shipped.settings)
    hu = torch.from_numpy(scan.hu[:, 60:100, 30:70].astype(np.float64) + 0.37).requires_grad_()
    for action in c.ACTIONS:
        def loss(x): return (exact.tamper_tensor(x, at, scan.spacing, action) / 100).square().mean()
        gradient, = torch.autograd.grad(loss(hu), hu)
        size = float(gradient.norm())
        assert np.isfinite(size) and size > 0
        with torch.no_grad(): slope = float(loss(hu + 1e-3 * gradient / size) - loss(hu - 1e-3 * gradient / size)) / 2e-3
        assert slope == pytest.approx(size, rel=0.02)
    assert all(not p.requires_grad for p in shipped.injector.parameters())


# ---- what the shipped weights can do, on a phantom that was not trained on

def test_measures_on_made_up_lesions(phantom):
    scan, at = phantom[0].with_hu(np.full(phantom[0].shape, -850, np.int16)), (10, 80, 80)
    z, y, x = np.indices(scan.shape)
    def ball(centre, mm):
        d2 = sum(((g - a) * s)**2 for g, a, s in zip((z, y, x), centre, scan.spacing))
        return scan.with_hu(np.where(d2 <= (mm / 2)**2, 30, scan.hu).astype(np.int16))
    assert c.new_lesion(scan, ball(at, 14), at) == pytest.approx(14, abs=1.5)
    assert c.new_lesion(scan, ball((10, 80, 86), 14), at) == 0    # 12.6 mm away
    assert c.new_lesion(ball(at, 14), ball(at, 14), at) == 0      # it was there before
    assert c.tissue_mm3(ball(at, 14), at) == pytest.approx(1437, rel=0.25) and c.tissue_mm3(scan, at) == 0
    assert c.tissue_mm3(ball(at, 14), at, ball_mm=10) == pytest.approx(524, rel=0.1)


def test_shipped_quality(shipped):
    scan, nodules = make_phantom(seed=5, shape=(24, 224, 224), spacing=(2.5, 1.5, 1.5))
    source = c.TrainingScan("p", scan, tuple((n.centre_voxel, n.diameter_mm) for n in nodules))
    mask = lung_mask(scan)
    places = c.clear_places(source, 10, 0, mask, margin_mm=10.0)
    assert c.measure_injection(shipped, scan, places)["found"] >= 0.8 * len(places)
    assert c.measure_removal(shipped, c.with_nodule(scan, places[0], 11.0, 1), [(places[0], 11.0)])["removed"] >= 0.7
    error = c.measure_inpainting(shipped, scan, places[:6])
    assert error["remover"] < 0.75 * error["rim_mean"]


def test_baseline_fills_know_what_they_can_know():
    "A plane is harmonic and biharmonic; x^3 is biharmonic only; a constant is all that the mean of the rim gets right."
    x = torch.linspace(-1, 1, 32)
    plane = (x[:, None, None] + 2 * x[:, None] - x).expand(32, 32, 32)
    cubic = (x**3).expand(32, 32, 32)
    truth = torch.stack([torch.full((32, 32, 32), 7.0), plane, cubic]) * 100
    hole = c.centre_mask(32, 12)
    error = {name: (fill - truth)[:, hole].abs().amax(1) for name, fill in c.baseline_fills(truth.masked_fill(hole, -1e4), hole).items()}
    assert error["rim_mean"][0] < 1e-2 and error["rim_mean"][1] > 20
    assert (error["harmonic"][:2] < 0.1).all() and error["harmonic"][2] > 1
    assert (error["biharmonic"] < 0.1).all()


def test_inpainting_error_is_that_of_the_filling(forger, phantom):
    scan, _, mask = phantom
    places = lung_places(scan, 2, seed=1, margin_mm=12, mask=mask)

    class Constant(torch.nn.Module):
        def __init__(self): super().__init__(); self.value = torch.nn.Parameter(torch.tensor(-0.5))
        def forward(self, x): return self.value.expand_as(x)
    lowest = c.CTGAN(forger.injector, Constant(), Equalizer(high=400.0), Tampering(mask=20, high=400.0))
    inside = np.stack([c.training_cube(scan, tuple(p))[10:-10, 10:-10, 10:-10] for p in places]).clip(-1000, 400)
    found = c.measure_inpainting(lowest, scan, places)
    assert found["cubes"] == 2 and found["remover"] == pytest.approx(np.abs(inside + 1000.0).mean(), abs=0.1)


def test_patch_pairs_show_the_same_place(forger, phantom):
    scan, _, mask = phantom
    places = lung_places(scan, 3, seed=1, margin_mm=12, mask=mask)
    for action in c.ACTIONS:
        patches, forged = c.patch_pairs(forger, scan, places, action)
        assert patches.shape == (6, 1, 32, 32) and patches.dtype == np.float32 and forged.tolist() == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(patches, c.patch_pairs(forger, scan, places, action)[0])
        same = [np.mean(patches[i] == patches[i + 3]) for i in range(3)]
        assert all(0 < s < 1 for s in same)  # the frame is the same scan, the middle is not


def test_patch_judge_learns_what_can_be_learnt_and_nothing_else():
    g = np.random.default_rng(0)
    noise, labels = g.normal(size=(120, 1, 16, 16)).astype(np.float32), np.arange(120) % 2
    marked = noise + 0.7 * labels[:, None, None, None].astype(np.float32)
    for patches, low, high in ((marked, 0.95, 1.0), (noise, 0.2, 0.8)):
        judge = c.PatchJudge(patches[:80], labels[:80])
        c.fit(judge, judge.batches, 30, progress=False)
        assert low <= judge.auc(patches[80:], labels[80:]) <= high


def test_traces_of_nothing_are_none(phantom):
    scan, _, mask = phantom
    class Honest:
        settings = Tampering(mask=20)
        def tamper(self, scan, at, action, seed): return scan
    found = c.measure_traces(Honest(), scan, lung_places(scan, 4, seed=1, margin_mm=12, mask=mask))
    for action in c.ACTIONS:
        assert found[action]["seam"] == pytest.approx(1) and 0.6 < found[action]["noise"] < 1.5


def test_pictures_while_training(tmp_path):
    c.train_ctgan("tiny", tmp_path / "w", data=(), measure=False, pictures=tmp_path / "pictures", **MINI)
    for action in c.ACTIONS: assert len(list((tmp_path / "pictures" / action).glob("step-*.png"))) >= 4


def test_the_remover_may_train_otherwise(mini, tmp_path):
    config = replace(mini, remover=dict(lr_d=1e-6))
    assert config.of("inject") is config and config.of("remove").lr_d == 1e-6 != config.lr_d
    assert replace(config.of("remove"), lr_d=config.lr_d) == config
    with pytest.raises(UsageError, match="cubes"): replace(mini, remover=dict(cubes=3))  # both share the cubes
    ctgan = c.train_ctgan("tiny", tmp_path / "w", data=(), measure=False, **MINI | dict(remover=dict(steps=2)))
    assert {a: ctgan.record["history"][a]["rows"][-1]["step"] for a in c.ACTIONS} == {"inject": 4, "remove": 2}
    assert c.CTGAN.from_pretrained(tmp_path / "w").record["config"]["remover"] == {"steps": 2}


def test_disguise_needs_a_place_to_forge_at(forger, phantom):
    scan, _, _ = phantom
    air = c.TrainingScan("air", scan.with_hu(np.full_like(scan.hu, -1000)))
    with pytest.raises(DataError, match="no clear lung place in air"): c.measure_disguise(forger, [air], [air], n=4, steps=1)


def test_the_start_is_kept_with_the_weights(forger, tmp_path):
    c.CTGAN(forger.injector, forger.remover, forger.equalizer, Tampering(mask=20, start="film")).save_pretrained(tmp_path / "w")
    assert c.CTGAN.from_pretrained(tmp_path / "w").settings.start == "film"


def test_shipped_files_are_small(shipped):
    from mits_nb.core import weights_path
    folder = weights_path("ctgan-tiny", "card.md", "history.json")
    for name in ("injector", "remover"): assert (folder / name / "model.safetensors").stat().st_size < 12e6
    assert "CC BY" in (folder / "card.md").read_text()
