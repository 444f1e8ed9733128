from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mits_nb.attack.tamper import (Equalizer, Tampering, centre_mask, cuboid_box, cut_cube, fade, ground_truth, harmonic_inpaint, load_equalizer, make_noise, masked_spectrum,
                                    noise_ratio, noise_spectrum, outside_lung, paste_cube, save_equalizer, seam_ratio, tamper, tamper_tensor)
from mits_nb.core import PlaceError, ScanError, UsageError, WeightsError
from mits_nb.scan import Scan, read_scan, write_scan

SPACINGS = [(2.5, 0.7, 0.7), (1.0, 1.0, 1.0), (5.0, 0.84, 0.9), (0.6, 2.2, 1.3)]
HARMONIC = partial(harmonic_inpaint, mask=centre_mask(32, 16))


def lung(shape=(30, 90, 90), seed=0, dtype=np.int16):
    return np.random.default_rng(seed).normal(-870, 25, shape).astype(dtype)


def ball(hu, spacing, at, radius, value=40):
    grid = np.ogrid[tuple(slice(n) for n in hu.shape)]
    inside = sum(((g - a) * s) ** 2 for g, a, s in zip(grid, at, spacing)) < radius**2
    out = hu.copy(); out[inside] = value
    return out


@pytest.fixture(scope="module")
def equalizer():
    r = np.random.default_rng(0)
    return Equalizer().fit(np.concatenate([r.normal(-870, 40, 50_000), r.normal(40, 30, 8_000), r.uniform(-1000, 300, 5_000)]))


# ------------------------------------------------------------------ cutting
@pytest.mark.parametrize("spacing", SPACINGS)
def test_cut_is_grid_sample(spacing):
    hu = torch.from_numpy(lung((20, 50, 60))).double()
    at = (9.3, 22.2, 31.0)
    off = torch.arange(32, dtype=torch.float64) - 15.5
    axes = [(a + off / s) / (n - 1) * 2 - 1 for a, s, n in zip(at, spacing, hu.shape)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None]
    want = F.grid_sample(hu[None, None], grid, align_corners=True, padding_mode="border")[0, 0]
    assert torch.allclose(cut_cube(hu, at, spacing), want, atol=1e-9)


def test_cut_of_unit_spacing_at_half_voxels_copies():
    hu = torch.from_numpy(lung((40, 40, 40))).float()
    assert torch.equal(cut_cube(hu, (19.5, 17.5, 20.5), (1, 1, 1)), hu[4:36, 2:34, 5:37])


def test_cut_takes_int16_and_one_slice():
    hu = torch.from_numpy(lung((1, 60, 60)))
    cube = cut_cube(hu, (0, 30, 30), (2.5, 0.7, 0.7))
    assert cube.shape == (32, 32, 32) and cube.dtype == torch.float32 and torch.isfinite(cube).all()
    assert torch.equal(cube[0], cube[31])                                      # border repeated


@pytest.mark.parametrize("spacing", SPACINGS)
def test_box_holds_exactly_the_voxels_inside_the_cube(spacing):
    at, shape = (14.2, 44.9, 40.0), (30, 90, 90)
    for (lo, hi), a, s, n in zip(cuboid_box(at, spacing, shape), at, spacing, shape):
        inside = [i for i in range(n) if abs(i - a) * s <= 15.5 + 1e-6]
        assert (lo, hi) == (inside[0], inside[-1] + 1)


# ------------------------------------------------------------------ equaliser
def test_equalizer_is_monotone_bounded_and_invertible(equalizer):
    v = torch.linspace(-1000, 2000, 50_001)
    x = equalizer(v)
    assert (x.diff() > 0).all() and x[0] == -0.5 and x[-1] == 0.5
    assert (equalizer.inverse(x) - v).abs().max() < 0.5
    u = torch.linspace(-0.5, 0.5, 10_001)
    assert (equalizer(equalizer.inverse(u)) - u).abs().max() < 1e-5


def test_equalizer_flattens_the_histogram(equalizer):
    r = np.random.default_rng(0)
    v = torch.from_numpy(np.concatenate([r.normal(-870, 40, 50_000), r.normal(40, 30, 8_000), r.uniform(-1000, 300, 5_000)]))
    counts = torch.histc(equalizer(v).float(), 10, -0.5, 0.5)
    assert counts[:9].std() / counts[:9].mean() < 0.2                          # the last tenth belongs to the uniform share above 300 HU


def test_equalizer_slope_is_bounded(equalizer):
    x = torch.linspace(-0.499, 0.498, 5_000)
    assert ((equalizer.inverse(x + 1e-3) - equalizer.inverse(x)) <= 3000 / equalizer.mix * 1.01e-3).all()


def test_equalizer_gradients(equalizer):
    v = (torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2900 - 950).requires_grad_(True)
    assert torch.autograd.gradcheck(equalizer, (v,), eps=1e-5, atol=1e-6, nondet_tol=0)
    x = equalizer(v).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(equalizer.inverse, (x,), eps=1e-9, rtol=1e-3, atol=1)


def test_unfitted_equalizer_is_a_straight_line():
    v = torch.tensor([-1000., 500., 2000., 5000., -3024.])
    assert torch.allclose(Equalizer()(v), torch.tensor([-0.5, 0., 0.5, 0.5, -0.5]), atol=1e-6)


def test_equalizer_saves_and_refuses(tmp_path, equalizer):
    path = save_equalizer(equalizer, tmp_path / "eq.safetensors")
    back = load_equalizer(path)
    assert torch.equal(back.cdf, equalizer.cdf) and back.mix == equalizer.mix
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError): load_equalizer(path)
    with pytest.raises(WeightsError): load_equalizer(tmp_path / "none.safetensors")


def test_equalizer_refuses_nothing_and_nonsense():
    with pytest.raises(UsageError): Equalizer().fit(np.array([]))
    with pytest.raises(UsageError): Equalizer().fit(np.full(5, np.nan))
    with pytest.raises(UsageError): Equalizer(mix=0)


# ------------------------------------------------------------------ harmonic in-painting
def test_harmonic_reproduces_harmonic_functions_and_obeys_the_maximum_principle():
    z, y, x = torch.meshgrid(*[torch.arange(16.)] * 3, indexing="ij")
    f, m = 0.1 * (z * x - y), centre_mask(16, 8)
    assert torch.allclose(harmonic_inpaint(f.masked_fill(m, 9.), m), f, atol=1e-3)
    r = torch.rand(2, 1, 16, 16, 16)
    out = harmonic_inpaint(r, m)
    assert out.min() >= 0 and out.max() <= 1 and torch.equal(out[..., ~m], r[..., ~m])


def test_harmonic_ignores_what_is_inside_and_has_the_right_gradient():
    m = centre_mask(8, 4)
    r = torch.rand(8, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(harmonic_inpaint, mask=m), (r,))
    grad, = torch.autograd.grad(harmonic_inpaint(r, m).sum(), r)
    assert (grad[m] == 0).all() and (grad[~m] > 0).any()


def test_harmonic_refuses_a_mask_without_rim():
    for mask in (torch.ones(8, 8, 8, dtype=torch.bool), torch.zeros(8, 8, 8, dtype=torch.bool), centre_mask(16, 8)):
        with pytest.raises(UsageError): harmonic_inpaint(torch.zeros(8, 8, 8), mask)


# ------------------------------------------------------------------ pasting
@pytest.mark.parametrize("spacing", SPACINGS)
def test_equal_cubes_change_nothing(spacing):
    hu = torch.from_numpy(lung()).float()
    cube = cut_cube(hu, (15, 45, 45), spacing)
    noise = torch.full([b - a for a, b in cuboid_box((15, 45, 45), spacing, hu.shape)], 100.)
    assert torch.equal(paste_cube(hu, cube, cube, (15, 45, 45), spacing, noise=noise), hu)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("at", [(15.0, 45.0, 45.0), (14.3, 40.7, 50.2), (0, 0, 89), (29, 89, 2)])
@pytest.mark.parametrize("settings", [Tampering(), Tampering.released()])
def test_outside_the_box_every_bit_stays(spacing, at, settings, equalizer):
    scan = Scan(lung((36, 90, 90)), spacing)
    out = tamper(scan, at, lambda c: c * 0 + 0.3, "inject", settings, equalizer)
    outside = np.ones(scan.shape, bool)
    outside[tuple(slice(*b) for b in cuboid_box(at, spacing, scan.shape))] = False
    assert np.array_equal(out.hu[outside], scan.hu[outside]) and not np.array_equal(out.hu, scan.hu)


def test_window_is_one_in_the_mask_and_zero_at_the_rim():
    p = np.arange(-0.5, 32, 0.25)
    w = fade(p)
    assert (w[np.abs(p - 15.5) <= 8] == 1).all() and (w[np.abs(p - 15.5) >= 12] == 0).all() and (np.diff(w[p >= 15.5]) <= 0).all()


def test_removed_ball_leaves_no_ghost(equalizer):
    spacing, at = (1.0, 0.7, 0.7), (15, 45, 45)
    base = lung()
    scan = Scan(ball(base, spacing, at, 6), spacing)
    out = tamper(scan, at, HARMONIC, "remove", equalizer=equalizer)
    z, y, x = np.ogrid[:30, :90, :90]
    d = np.sqrt((z - 15) ** 2 + 0.49 * (y - 45) ** 2 + 0.49 * (x - 45) ** 2)
    shell = (d > 5) & (d < 7)
    assert abs(out.hu[shell].mean() + 870) < 25 and 15 < out.hu[shell].std() < 40
    assert (out.hu[d < 6] > -400).mean() < 0.01


def test_noise_level_inside_is_that_of_the_scan(equalizer):
    scan = Scan(lung((40, 150, 150)), (1.0, 0.7, 0.7))
    out = tamper(scan, (20, 75, 75), HARMONIC, "remove", equalizer=equalizer)
    inner = np.s_[14:27, 66:85, 66:85]
    assert 0.75 < out.hu[inner].std() / scan.hu[inner].std() < 1.25
    plain = tamper(scan, (20, 75, 75), HARMONIC, "remove", Tampering(touch_up=None), equalizer)
    assert plain.hu[inner].std() < 10


def test_noise_depends_on_the_seed_only():
    hu, at, spacing = torch.from_numpy(lung((40, 150, 150))), (20, 75, 75), (1.0, 0.7, 0.7)
    patches = [make_noise(hu, at, spacing, seed=s) for s in (1, 1, 2, 3, 4, 5)]
    assert torch.equal(patches[0], patches[1]) and not all(torch.equal(patches[0], p) for p in patches[2:])


def test_padding_survives(equalizer):
    hu = lung(); hu[:, :, 60:] = -3024
    out = tamper(Scan(hu, (2.5, 0.7, 0.7)), (15, 45, 45), HARMONIC, "remove", equalizer=equalizer)
    assert np.array_equal(out.hu[:, :, 62:], hu[:, :, 62:])


# ------------------------------------------------------------------ tensors
def test_crop_equals_volume(equalizer):
    hu, spacing, at = torch.from_numpy(ball(lung(), (2.5, 0.7, 0.7), (15, 45, 45), 5)).float(), (2.5, 0.7, 0.7), np.array([15, 45, 45])
    noise = make_noise(hu, at, spacing)
    whole = tamper_tensor(hu, at, spacing, HARMONIC, equalizer=equalizer, noise=noise)
    lo = np.array([5, 10, 12])
    part = tamper_tensor(hu[5:27, 10:82, 12:80], at - lo, spacing, HARMONIC, equalizer=equalizer, noise=noise)
    assert torch.equal(part, whole[5:27, 10:82, 12:80])


def test_gradient_by_finite_differences(equalizer):
    spacing, at = (2.5, 0.7, 0.7), (8.2, 30, 31)
    gen = torch.Generator().manual_seed(0)
    hu = torch.from_numpy(ball(lung((17, 62, 62)), spacing, at, 5)).double() + torch.rand(17, 62, 62, generator=gen, dtype=torch.float64) * 0.3
    noise, r = make_noise(hu, at, spacing), torch.randn(17, 62, 62, generator=gen, dtype=torch.float64)
    f = lambda h: (r * tamper_tensor(h, at, spacing, HARMONIC, equalizer=equalizer, noise=noise)).sum()
    hu.requires_grad_(True)
    grad, = torch.autograd.grad(f(hu), hu)
    d, eps = torch.randn(17, 62, 62, generator=gen, dtype=torch.float64), 1e-6
    with torch.no_grad(): numeric = (f(hu + eps * d) - f(hu - eps * d)) / (2 * eps)
    assert abs((grad * d).sum() - numeric) < 1e-3 * abs(numeric)
    assert not torch.allclose(grad, r)                                         # the attack is not the identity


def test_centre_does_not_reach_the_in_painter(equalizer):
    hu = torch.from_numpy(lung()).float()
    seen = []
    spy = lambda c: seen.append(c.clone()) or HARMONIC(c)
    for value in (-900, 500):
        changed = hu.clone(); changed[13:18, 40:51, 40:51] = value
        tamper_tensor(changed, (15, 45, 45), (2.5, 0.7, 0.7), spy, equalizer=equalizer)
    assert torch.equal(seen[0], seen[1]) and (seen[0][0, 0][centre_mask()] == 0).all()


def test_input_is_not_changed_and_autocast_is_harmless(equalizer):
    hu = torch.from_numpy(lung()).float(); before = hu.clone()
    plain = tamper_tensor(hu, (15, 45, 45), (2.5, 0.7, 0.7), HARMONIC, equalizer=equalizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = tamper_tensor(hu, (15, 45, 45), (2.5, 0.7, 0.7), HARMONIC, equalizer=equalizer)
    assert torch.equal(hu, before) and torch.allclose(plain, auto, atol=0.5)


# ------------------------------------------------------------------ scans
def test_several_places_notes_and_dtype(equalizer):
    for dtype in (np.int16, np.float32):
        scan = Scan(lung(dtype=dtype), (2.5, 0.7, 0.7))
        out = tamper(scan, [(10, 40, 40), (20, 50, 50)], HARMONIC, "remove", equalizer=equalizer, seed=3)
        assert out.hu.dtype == dtype and scan.history == () and len(out.history) == 2
        changed = out.hu != scan.hu
        assert np.array_equal(out.hu[changed], np.rint(out.hu[changed]))
        note = out.history[0]
        assert note["kind"] == "forged" and note["action"] == "remove" and note["at"] == [10, 40, 40] and note["voxels_changed"] > 0
        again = tamper(scan, [(10, 40, 40), (20, 50, 50)], HARMONIC, "remove", equalizer=equalizer, seed=3)
        assert np.array_equal(again.hu, out.hu)


def test_note_is_json(equalizer):
    import json
    out = tamper(Scan(lung(), (2.5, 0.7, 0.7)), np.array([10, 40, 40]), HARMONIC, "remove", equalizer=equalizer)
    assert json.loads(json.dumps(out.history[0]))["box"] == [list(b) for b in cuboid_box((10, 40, 40), (2.5, 0.7, 0.7), (30, 90, 90))]


def test_world_coordinates(equalizer):
    scan = Scan(lung(), (2.5, 0.7, 0.7), origin=(-10., 5., 100.))
    voxel = tamper(scan, (15, 45, 45), HARMONIC, "remove", equalizer=equalizer)
    world = tamper(scan, scan.voxel_to_world((15, 45, 45)), HARMONIC, "remove", equalizer=equalizer, system="world")
    assert np.abs(voxel.hu.astype(int) - world.hu).max() <= 1


def test_scans_smaller_than_the_cuboid_are_clipped_and_smaller_than_the_mask_refused(equalizer):
    for shape in ((7, 90, 90), (10, 23, 23)):                                   # 17.5 mm deep; 16.1 mm wide
        assert tamper(Scan(lung(shape), (2.5, 0.7, 0.7)), (0, 10, 10), HARMONIC, "remove", equalizer=equalizer).shape == shape
    for shape in ((1, 90, 90), (6, 90, 90), (10, 22, 90), (10, 90, 22)):
        with pytest.raises(ScanError, match="cuboid has 32 mm"): tamper(Scan(lung(shape), (2.5, 0.7, 0.7)), (0, 10, 10), HARMONIC, "remove", equalizer=equalizer)
    with pytest.raises(ScanError, match="centre alone 20 mm"): tamper(Scan(lung((7, 90, 90)), (2.5, 0.7, 0.7)), (0, 10, 10), HARMONIC, "remove", Tampering.released(), equalizer)


@pytest.mark.parametrize("at", [(-1, 10, 10), (30, 10, 10), (5, 90, 10), (5, 10, -3), (5, 10), (np.nan, 5, 5), "here", [(5, 10, 10), (99, 5, 5)], []])
def test_places_outside_or_senseless(at, equalizer):
    scan = Scan(lung(), (2.5, 0.7, 0.7))
    with pytest.raises(PlaceError) as e: tamper(scan, at, HARMONIC, "remove", equalizer=equalizer)
    assert "\n" not in str(e.value)


def test_bad_arguments(equalizer):
    scan = Scan(lung(), (2.5, 0.7, 0.7))
    with pytest.raises(UsageError): tamper(scan, (5, 40, 40), HARMONIC, "melt", equalizer=equalizer)
    with pytest.raises(UsageError): tamper(scan, (5, 40, 40), HARMONIC, "remove", equalizer=equalizer, system="inch")
    with pytest.raises(UsageError): tamper(scan, (5, 40, 40), lambda c: c[..., :16], "remove", equalizer=equalizer)
    with pytest.raises(UsageError): tamper(scan, (5, 40, 40), lambda c: c * np.nan, "remove", equalizer=equalizer)
    with pytest.raises(UsageError): tamper_tensor(torch.from_numpy(scan.hu), (5, 40, 40), scan.spacing, HARMONIC)
    with pytest.raises(ScanError): cut_cube(torch.zeros(30, 90, 90), (5, 40, 40), (0, 0.7, 0.7))
    with pytest.raises(ScanError): cut_cube(torch.zeros(30, 90, 90), (5, 40, 40), (25, 0.7, 0.7))
    for bad in ({"mask": 32}, {"mask": 15}, {"paste": "glue"}, {"blend": 20}, {"touch_up": "paint"}, {"low": 3000}):
        with pytest.raises(UsageError): Tampering(**bad)
    with pytest.raises(UsageError, match="noise has shape"): tamper_tensor(torch.zeros(30, 90, 90), (5, 40, 40), (2.5, 0.7, 0.7), HARMONIC, noise=torch.zeros(3, 3, 3))


def test_real_scan(data_dir, equalizer):
    from mits_nb.scan import read_scan
    scan = read_scan(data_dir / "LIDC-IDRI-0003.mha")
    at = (scan.shape[0] // 2, 256, 140)
    out = tamper(scan, at, HARMONIC, "remove", equalizer=equalizer)
    outside = np.ones(scan.shape, bool)
    outside[tuple(slice(*b) for b in out.history[0]["box"])] = False
    assert np.array_equal(out.hu[outside], scan.hu[outside]) and out.spacing == scan.spacing


# ------------------------------------------------------------------ what is no CT in HU
@pytest.mark.parametrize("low, high", [(0, 255), (0, 1), (24, 4095)])
def test_values_that_are_no_hu(equalizer, low, high):
    r = np.random.default_rng(0)
    for dtype in (np.int16, np.float32):
        if high == 1 and dtype == np.int16: continue
        scan = Scan(r.uniform(low, high, (30, 90, 90)).astype(dtype), (2.5, 0.7, 0.7))
        with pytest.raises(ScanError, match="8-bit picture"): tamper(scan, (15, 45, 45), HARMONIC, "remove", equalizer=equalizer)
    solid = lung(); solid[5:25, 20:70, 20:70] = 40                              # soft tissue without noise all around the place, but a CT
    assert tamper(Scan(solid, (2.5, 0.7, 0.7)), (15, 45, 45), HARMONIC, "remove", equalizer=equalizer).history
    with pytest.raises(ScanError, match="int16 or float32"): Scan(np.zeros((30, 90, 90), np.uint8), (2.5, 0.7, 0.7))


def test_odd_spacing_of_a_scan(equalizer):
    with pytest.raises(ScanError, match="at most 20"): tamper(Scan(lung(), (25., 0.7, 0.7)), (15, 45, 45), HARMONIC, equalizer=equalizer)
    for bad in (0, -1, np.nan):
        with pytest.raises(ScanError): Scan(lung(), (2.5, bad, 0.7))


def test_a_refused_place_changes_nothing_and_calls_no_one(equalizer):
    called = []
    with pytest.raises(PlaceError): tamper(Scan(lung(), (2.5, 0.7, 0.7)), [(15, 45, 45), (31, 45, 45)], lambda c: called.append(1) or c, equalizer=equalizer)
    assert not called


def test_only_the_cuboid_is_resampled(equalizer, monkeypatch):
    import mits_nb.attack.tamper as module
    sizes, plain = [], module.resample3
    monkeypatch.setattr(module, "resample3", lambda x, where: sizes.append(x.numel()) or plain(x, where))
    scan = Scan(lung((40, 200, 200)), (2.5, 0.7, 0.7))
    tamper(scan, (20, 100, 100), HARMONIC, "remove", equalizer=equalizer)
    assert sizes and max(sizes) < 1.1 * 32**3 < scan.hu.size / 10


def test_threads_are_the_networks_and_come_back(equalizer):
    usual, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        scan = Scan(lung(), (2.5, 0.7, 0.7))
        tamper(scan, (15, 45, 45), lambda c: seen.append(torch.get_num_threads()) or HARMONIC(c), "remove", equalizer=equalizer)
        with pytest.raises(ZeroDivisionError): tamper(scan, (15, 45, 45), lambda c: c / (1 // 0), equalizer=equalizer)
        assert seen == [2] and torch.get_num_threads() == 2
    finally: torch.set_num_threads(usual)


def test_padding_outside_the_field_of_view_is_no_tissue(equalizer):
    hu = lung(); hu[:, :, 48:] = -2048
    out = tamper(Scan(hu, (2.5, 0.7, 0.7)), (15, 45, 45), lambda c: c * 0 + 0.3, "inject", equalizer=equalizer)
    assert (out.hu[:, :, 48:] == -2048).all() and (out.hu != hu).any()


def test_rim_is_the_scans_own(equalizer):
    hu, at, spacing = torch.from_numpy(lung((40, 60, 60))).float(), (20, 30, 30), (1., 1., 1.)
    wrong_rim = lambda c: HARMONIC(c) + 0.2 * (c != 0)                          # a network that repeats its rim badly
    right, wrong = (tamper_tensor(hu, at, spacing, f, equalizer=equalizer) for f in (HARMONIC, wrong_rim))
    assert torch.equal(right, wrong)
    settings = Tampering(paste="released", touch_up=None)
    right, wrong = (tamper_tensor(hu, at, spacing, f, settings, equalizer) for f in (HARMONIC, wrong_rim))
    assert not torch.allclose(right, wrong, atol=20)


def test_grain_of_the_in_painter_is_replaced(equalizer):
    scan, at = Scan(lung((40, 150, 150)), (1.0, 0.7, 0.7)), (20, 75, 75)
    for grain in (0., 0.02, 0.15):                                              # none, a little, too much
        noise = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1)) * grain
        out = tamper(scan, at, lambda c: HARMONIC(c) + noise, "remove", equalizer=equalizer)
        assert 0.8 < noise_ratio(out, at, 16) < 1.25


# ------------------------------------------------------------------ measuring
def test_seam_of_nothing_of_a_step_and_of_a_smooth_block():
    scan, at = Scan(lung((40, 90, 90)), (1.0, 0.7, 0.7)), (20, 45, 45)
    assert seam_ratio(scan, scan, at) == 1
    inside = np.s_[10:31, 31:60, 31:60]                                         # 20 mm: |offset| <= 10 mm
    step = scan.hu.copy(); step[inside] += 500
    noise = 2 / np.sqrt(np.pi) * 25                                             # mean |difference| of two independent normal numbers
    assert abs(seam_ratio(scan, Scan(step, scan.spacing), at, 20) / (500 / noise) - 1) < 0.05
    assert seam_ratio(scan, Scan(step, scan.spacing), at, 16) == 1 == seam_ratio(scan, Scan(step, scan.spacing), at, 24)
    smooth = scan.hu.copy(); smooth[inside] = -870
    assert abs(seam_ratio(scan, Scan(smooth, scan.spacing), at, 20) - 2**-0.5) < 0.05
    assert seam_ratio(scan, Scan(smooth, scan.spacing), at, 12) == 0
    with pytest.raises(PlaceError): seam_ratio(scan, scan, at, 300)
    with pytest.raises(PlaceError): seam_ratio(scan, scan, (99, 0, 0))
    top = scan.hu.copy(); top[:11, 31:60, 31:60] += 500                         # at the border of the scan only the faces inside it count
    assert abs(seam_ratio(scan, Scan(top, scan.spacing), (0, 45, 45), 20) / (500 / noise) - 1) < 0.05 and seam_ratio(scan, scan, (0, 45, 45)) == 1


@pytest.mark.parametrize("factor", [0., 0.5, 1., 2.])
def test_noise_ratio_is_the_ratio(factor):
    r = np.random.default_rng(3)
    hu = r.normal(-850, 25, (40, 120, 120)); at = (20, 60, 60)
    zyx = np.ogrid[:40, :120, :120]
    inside = np.maximum(np.maximum(abs(zyx[0] - 20) * 1.0, abs(zyx[1] - 60) * 0.7), abs(zyx[2] - 60) * 0.7) <= 10
    hu = np.where(inside, -850 + (hu + 850) * factor, hu)
    hu[:, 57:60, :] = 60                                                        # a vessel through both regions
    assert noise_ratio(Scan(hu.astype(np.float32), (1.0, 0.7, 0.7)), at, 20) == pytest.approx(factor, abs=0.06)


def test_noise_ratio_without_lung_is_nan():
    scan = Scan(np.random.default_rng(0).normal(40, 10, (40, 90, 90)).astype(np.int16), (1., .7, .7))
    assert np.isnan(noise_ratio(scan, (20, 45, 45))) and noise_ratio(scan, (20, 45, 45), band=(-200., 200.)) == pytest.approx(1, abs=0.1)
    assert np.isnan(noise_spectrum(scan, (20, 45, 45))[1]).all()


def test_spectrum_of_white_and_of_smooth_noise_and_parseval():
    from scipy import ndimage as ndi
    r, spacing = np.random.default_rng(0), (1., 0.7, 0.9)
    noise = r.normal(0, 20, (30, 100, 90)); mask = ndi.gaussian_filter(r.normal(size=noise.shape), (0, 4, 4)) > -0.05   # irregular islands
    f, white = masked_spectrum(np.where(mask, noise, 0), mask, spacing)
    assert np.allclose(white, 400 * 0.63, rtol=0.12) and f[0] == 0 and f[-1] <= 0.5 / 0.9
    sigma = 1.2                                                                 # mm: the spectrum of smoothed white noise is known
    soft = ndi.gaussian_filter(noise, (0, sigma / 0.7, sigma / 0.9))
    f, power = masked_spectrum(np.where(mask, soft, 0), mask, spacing)
    want = 400 * 0.63 * np.exp(-(2 * np.pi * f * sigma) ** 2)
    assert np.allclose(power[2:4], want[2:4], rtol=0.35) and power[-1] < 0.05 * power[0]
    corner = np.broadcast_to(20. * (-1.) ** np.add.outer(np.arange(100), np.arange(90)), noise.shape)            # as fast as it goes along both axes: beyond every ring
    _, power = masked_spectrum(corner, np.ones_like(mask), spacing)
    assert np.abs(power).max() < 0.05 * 400 * 0.63


# ------------------------------------------------------------------ ground truth
def test_ground_truth_is_bit_exact_with_and_without_the_original(equalizer):
    scan = Scan(lung(), (2.5, 0.7, 0.7), origin=(-50., 20., -300.))
    out = tamper(scan, [(10, 40, 40), (12, 50, 50)], HARMONIC, "remove", equalizer=equalizer, seed=3)      # boxes overlap
    out = tamper(out, (29, 2, 88), lambda c: c * 0 + 0.3, "inject", equalizer=equalizer)
    truth = ground_truth(out, scan)
    assert np.array_equal(truth.mask, out.hu != scan.hu)
    alone = ground_truth(out)
    assert (alone.mask >= truth.mask).all() and (alone.mask & ~truth.mask).sum() <= 3                      # changed, and changed back by chance
    assert [p["action"] for p in truth.places] == ["remove", "remove", "inject"] and truth.settings[0]["mask"] == 16
    assert np.allclose(truth.places[2]["at_mm"], scan.voxel_to_world((29, 2, 88))) and "3 places" in repr(truth)
    assert not ground_truth(scan).mask.any() and ground_truth(scan).places == ()


def test_ground_truth_of_old_damaged_and_resampled(equalizer):
    from dataclasses import replace
    from mits_nb.scan import resample
    scan = Scan(lung(), (2.5, 0.7, 0.7))
    out = tamper(scan, (10, 40, 40), HARMONIC, "remove", equalizer=equalizer)
    note = dict(out.history[0])
    def with_note(**changes): return replace(out, meta={"history": ({k: v for k, v in {**note, **changes}.items() if v is not None},)})
    old = ground_truth(with_note(changed=None))                                 # an old note: the whole box
    assert old.mask.sum() == np.prod([b - a for a, b in note["box"]]) and old.mask[tuple(slice(*b) for b in note["box"])].all()
    for bad in ("?", "", note["changed"][:40], 5):
        with pytest.raises(ScanError, match="mask"): ground_truth(with_note(changed=bad))
    with pytest.raises(ScanError, match="resampl"): ground_truth(resample(out, (2.5, 1.4, 1.4)))
    with pytest.raises(ScanError, match="original"): ground_truth(out, resample(scan, (2.5, 1.4, 1.4)))


@pytest.mark.parametrize("name", ["a", "a.mha", "a.nrrd", "a.nii.gz"])
def test_ground_truth_survives_files(equalizer, tmp_path, name):
    scan = Scan(lung(), (2.5, 0.7, 0.7))
    out = tamper(scan, (10, 40, 40), HARMONIC, "remove", equalizer=equalizer)
    back = read_scan(write_scan(out, tmp_path / name))
    assert back.history == out.history and np.array_equal(ground_truth(back).mask, out.hu != scan.hu)


def test_outside_lung(phantom):
    from mits_nb.data import lung_mask, lung_places
    scan, nodules = phantom
    mask = lung_mask(scan)
    place = tuple(int(v) for v in lung_places(scan, 1, seed=0, mask=mask)[0])
    assert outside_lung(scan, place) == [] and outside_lung(scan, [n.centre_voxel for n in nodules], mask) == []
    said = outside_lung(scan, [place, (12, 3, 80)], mask)
    assert len(said) == 1 and "12, 3, 80" in said[0] and "mm" in said[0]
    assert "no lung" in outside_lung(scan, place, ~mask & mask)[0]
    with pytest.raises(PlaceError): outside_lung(scan, (99, 3, 80), mask)
