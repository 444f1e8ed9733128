"""The phantom: geometry, determinism, tissue values, noise spectrum, nodules, and bad arguments."""
import dataclasses
import math

import numpy as np
import pytest

from mits_nb.core import MitsError, PlaceError, UsageError
from mits_nb.phantom import (KINDS, Grid, Texture, Tubes, chest_statistics, cover, ct_noise, draw_patient, grow_tree, kernel_curve, lung_distance, make_phantom,
                             noise_spectrum, outside_range, realism, render_nodule, streaks, tube_cover)

SMALL = dict(shape=(6, 96, 96), spacing=(5.0, 3.7, 3.7))


@pytest.fixture(scope="module")
def large():
    "A few full-size slices with their nodules."
    return make_phantom(seed=2, shape=(6, 512, 512), spacing=(2.5, 0.7, 0.7), noise_hu=13)


# --- the scan -------------------------------------------------------------------------------------------------------

def test_geometry_and_types(phantom):
    scan, nodules = phantom
    assert scan.hu.shape == (24, 160, 160) and scan.hu.dtype == np.int16
    assert scan.spacing == (2.5, 2.2, 2.2) and np.array_equal(scan.direction, np.eye(3))
    assert len(nodules) == 4
    assert scan.hu.min() >= -1024 and scan.hu.max() <= 3071
    for n in nodules:
        assert np.allclose(scan.voxel_to_world(np.array(n.centre_voxel)), n.centre_mm, atol=1e-6)


def test_same_seed_same_scan_other_seed_other_scan():
    (a, na), (b, nb), (c, nc) = (make_phantom(seed, **SMALL) for seed in (5, 5, 6))
    assert np.array_equal(a.hu, b.hu) and na == nb and a.meta == b.meta
    assert not np.array_equal(a.hu, c.hu) and na != nc


def test_noise_and_nodules_do_not_disturb_the_anatomy():
    clean = make_phantom(5, n_nodules=0, noiseless=True, **SMALL)[0].hu.astype(float)
    noisy = make_phantom(5, n_nodules=0, noise_hu=20, **SMALL)[0].hu
    body = clean > -200
    assert abs((noisy - clean)[body].mean()) < 1 and 12 < (noisy - clean)[body].std() < 25
    with_nodules, nodules = make_phantom(5, n_nodules=2, noiseless=True, **SMALL)
    changed = with_nodules.hu != np.rint(clean)
    z, y, x = np.nonzero(changed)
    far = np.min([np.sqrt(((z - n.centre_voxel[0]) * 5) ** 2 + ((y - n.centre_voxel[1]) * 3.7) ** 2 + ((x - n.centre_voxel[2]) * 3.7) ** 2) / n.diameter_mm for n in nodules], axis=0)
    assert changed.any() and np.percentile(far, 99) < 2.5


def test_anatomy_lives_in_millimetres():
    coarse = make_phantom(7, noiseless=True, n_nodules=0, shape=(4, 96, 96), spacing=(5.0, 3.7, 3.7))[0].hu
    fine = make_phantom(7, noiseless=True, n_nodules=0, shape=(4, 192, 192), spacing=(5.0, 1.85, 1.85))[0].hu
    assert np.corrcoef(fine.reshape(4, 96, 2, 96, 2).mean((2, 4)).ravel(), coarse.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("shape, spacing", [((1, 1, 1), (1, 1, 1)), ((1, 512, 512), (5, 0.7, 0.7)), ((3, 40, 57), (1.0, 9.0, 6.5)), ((2, 64, 64), (0.5, 0.4, 0.4)), ((2, 128, 128), (2.5, 5.0, 5.0))])
def test_any_grid_works(shape, spacing):
    scan, nodules = make_phantom(3, shape=shape, spacing=spacing)
    assert scan.hu.shape == shape and len(nodules) <= 4
    assert all(0 <= c <= n - 1 for nodule in nodules for c, n in zip(nodule.centre_voxel, shape))


def test_body_fits_in_the_field_of_view():
    for seed in range(6):
        hu = make_phantom(seed, shape=(1, 128, 128), spacing=(2.5, 2.8, 2.8), n_nodules=0, noiseless=True)[0].hu[0]
        assert (hu[0] < -900).all() and (hu[:60, [0, -1]] < -900).all()  # the couch may leave it at the sides, the body may not
        assert 0.3 < (hu > -300).mean() + ((hu < -700) & (hu > -960)).mean() < 0.85


def test_tissues_have_textbook_values(large):
    hu = large[0].hu
    values = hu[(hu > -250) & (hu < 200)]
    counts, edges = np.histogram(values, bins=np.arange(-250, 201, 5))
    middle = (edges[:-1] + edges[1:]) / 2
    fat, muscle = middle[middle < -50][counts[middle < -50].argmax()], middle[(middle > 0) & (middle < 100)][counts[(middle > 0) & (middle < 100)].argmax()]
    assert -120 < fat < -90 and 35 < muscle < 70
    assert (hu > 400).mean() > 0.003  # bone
    s = chest_statistics(hu, large[0].spacing, slices=4)
    assert -900 < s["lung_median_hu"] < -830 and s["back_minus_front_hu"] > 5
    assert 1.5 < s["vessel_percent"] < 7 and s["vessels_per_slice"] > 24
    assert 9 < s["noise_soft_hu"] < 16 and s["noise_air_hu"] < 0.7 * s["noise_soft_hu"]


def test_phantoms_lie_in_the_range_of_real_scans(data_dir):
    "Each of nine numbers lies in [min - 0.2 range, max + 0.2 range] of the four real scans."
    from mits_nb.scan import read_scan
    real = [realism(s.hu, s.spacing) for s in (read_scan(data_dir / f) for f in ("dicom/LIDC-IDRI-0001", "LIDC-IDRI-0003.mha", "CPTAC-LSCC_C3N-00247.mha", "Lung_Dx-A0001.mha"))]
    ours = [realism(s.hu, s.spacing) for s in (make_phantom(seed, shape=(6, 512, 512), n_nodules=0)[0] for seed in (1, 5, 8))]
    assert {s["nps_peak"] > 0.3 for s in ours} == {True, False}  # both kernels are among them
    assert outside_range(ours, real) == {}
    assert "lung_median_hu" in outside_range([{**ours[0], "lung_median_hu": -800.0}], real)


# --- variants -------------------------------------------------------------------------------------------------------

def test_prone_turns_gravity_and_couch():
    up, down = (make_phantom(3, shape=(2, 160, 160), spacing=(2.5, 2.24, 2.24), posture=p, noiseless=True, n_nodules=0, emphysema=0.0)[0] for p in ("supine", "prone"))
    assert up.meta["phantom"]["posture"] == "supine" and down.meta["phantom"]["posture"] == "prone"
    front, back = (chest_statistics(s.hu, s.spacing)["back_minus_front_hu"] for s in (down, up))
    assert back > 3 and front < back - 5
    assert (up.hu[:, -40:].astype(int) - down.hu[:, -40:]).max() > 100  # a couch behind the one, not the other


def test_dose_kernel_and_traits():
    noise = [make_phantom(4, dose=d, n_nodules=0, **SMALL)[0].meta["phantom"]["noise_hu"] for d in (1.0, 0.25)]
    assert math.isclose(noise[1], 2 * noise[0])
    assert make_phantom(4, kernel="soft", **SMALL)[0].meta["phantom"]["kernel"] == "soft"
    holes = [np.percentile(s.hu[(s.hu > -1000) & (s.hu < -700)], 5) for s in (make_phantom(4, emphysema=e, noiseless=True, n_nodules=0, female=True, gown=0.0, shape=(2, 256, 256), spacing=(2.5, 1.4, 1.4))[0] for e in (0.0, 0.3))]
    assert holes[1] < holes[0] - 15


def test_padding_is_a_circle():
    hu = make_phantom(4, padding=-2000, **SMALL)[0].hu
    assert (hu[:, [0, 0, -1, -1], [0, -1, 0, -1]] == -2000).all() and hu[:, 48, 48].min() > -1100 and abs((hu[0] == -2000).mean() - (1 - math.pi / 4)) < 0.02


def test_streaks_follow_bone():
    disc = np.full((128, 128), -1000.0, np.float32)
    y, x = np.mgrid[-64:64, -64:64] * 2.5
    disc[(x / 150) ** 2 + (y / 90) ** 2 < 1] = 20
    soft = streaks(disc, (2.5, 2.5), 1, 0)
    bony = disc.copy()
    bony[np.hypot(np.abs(x) - 100, y) < 18] = 1500
    hard = streaks(bony, (2.5, 2.5), 1, 0)
    between = (np.abs(x) < 60) & (np.abs(y) < 25)
    assert hard[between].std() > 1.25 * soft[between].std() and np.array_equal(hard, streaks(bony, (2.5, 2.5), 1, 0))


def test_masks_are_exact():
    scan, nodules = make_phantom(9, shape=(20, 192, 192), spacing=(2.5, 1.8, 1.8), n_nodules=6, noiseless=True)
    bare = make_phantom(9, shape=(20, 192, 192), spacing=(2.5, 1.8, 1.8), n_nodules=0, noiseless=True)[0]
    changed, union = np.abs(scan.hu.astype(int) - bare.hu) > 60, np.zeros(scan.hu.shape, bool)
    for n in nodules:
        mask = n.mask(scan.hu.shape)
        assert mask.any() and not (mask & union).any() and n.shape in ("smooth", "lobulated", "spiculated") and n.attached in ("none", "vessel", "pleura")
        union |= mask
        if n.attached != "pleura" and n.diameter_mm > 9:
            assert 0.4 < mask.sum() * 2.5 * 1.8 * 1.8 / (math.pi / 6 * n.diameter_mm**3) < 2.2
    assert (changed & union).sum() > 0.7 * union.sum()


def test_nodules_of_all_sizes_shapes_and_places():
    from mits_nb.core import rng
    from mits_nb.phantom import draw_nodule
    seen = [draw_nodule(rng(i, "t"), (3.0, 30.0)) for i in range(400)]
    sizes = [s[0] for s in seen]
    assert 3 <= min(sizes) < 3.5 and 26 < max(sizes) <= 30
    assert {s[1] for s in seen} == set(KINDS) and {s[2] for s in seen} == {"smooth", "lobulated", "spiculated"} and {s[3] for s in seen} == {"none", "vessel", "pleura"}


def test_variants_as_dicom(tmp_path):
    from mits_nb.scan import read_scan, write_scan
    for i, options in enumerate((dict(), dict(posture="prone", kernel="sharp"), dict(padding=-2000, emphysema=0.1))):
        scan = make_phantom(i, shape=(4, 64, 64), spacing=(5.0, 5.5, 5.5), **options)[0]
        write_scan(scan, tmp_path / str(i))
        back = read_scan(tmp_path / str(i))
        assert np.array_equal(back.hu, scan.hu) and np.allclose(back.spacing, scan.spacing)


def test_nothing_is_divided_by_zero():
    lung, r = np.full((9, 40, 40), -860.0, np.float32), np.random.default_rng(0)
    with np.errstate(all="raise", under="ignore"):
        for seed in range(30):
            at = (4, 20, 20) if seed % 2 else tuple(r.uniform(0, (8, 39, 39)))
            new = render_nodule(lung, tuple(r.choice([0.5, 1.0, 2.5], 3)), at, float(r.choice([0.2, 3, 10, 30])), seed=seed, kind=list(KINDS)[seed % 5], shape=[None, "smooth", "lobulated", "spiculated"][seed % 4])
            assert np.isfinite(new).all()


# --- nodules --------------------------------------------------------------------------------------------------------

def test_nodules_are_where_the_list_says(large):
    scan, nodules = large
    patient, kinds = draw_patient(2), set(KINDS)
    grid = Grid.of(patient, scan.hu.shape, scan.spacing)
    assert len(nodules) == 4
    for n in nodules:
        z, y, x = (round(c) for c in n.centre_voxel)
        assert scan.hu[z, y - 1:y + 2, x - 1:x + 2].mean() > -780 and n.kind in kinds and 3 <= n.diameter_mm <= 30
        place = [np.array([c[0] + v * s]) for c, v, s in zip((grid.x, grid.y, grid.z), n.centre_voxel[::-1], grid.spacing[::-1])]
        assert lung_distance(patient, *place)[0] * grid.scale < (-n.diameter_mm / 2 if n.attached != "pleura" else 0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_nodule_has_its_volume_and_spares_the_rest(kind):
    lung = np.full((40, 80, 80), -860.0, np.float32)
    new = render_nodule(lung, (1.0, 0.7, 0.7), (20, 40, 40), 14.0, seed=3, kind=kind)
    assert new is not lung and (lung == -860).all() and new.dtype == np.float32
    changed = new > -860 + 60
    volume = changed.sum() * 0.49
    assert 0.6 < volume / (math.pi / 6 * 14**3) < 2.4, volume
    assert (new[:, :5] == -860).all() and (new[[0, -1]] == -860).all()
    z, y, x = (c.mean() for c in np.nonzero(changed))
    assert abs(z - 20) < 2.5 and abs(y - 40) < 3 and abs(x - 40) < 3


def test_nodule_core_values_differ_by_kind():
    lung = np.full((24, 60, 60), -860.0, np.float32)
    core = {k: float(render_nodule(lung, (1.0, 0.8, 0.8), (12, 30, 30), 16.0, seed=1, kind=k)[11:14, 28:33, 28:33].mean()) for k in KINDS}
    assert core["calcified"] > 250 > 100 > core["solid"] > -60 and -80 < core["part-solid"] < 100 and -720 < core["ground-glass"] < -450


def test_nodule_keeps_the_noise_of_the_scan():
    noisy = ct_noise((9, 96, 96), (1.0, 0.7, 0.7), 25, seed=4) - 860
    new = render_nodule(noisy, (1.0, 0.7, 0.7), (4, 48, 48), 20.0, seed=0)
    inside = (slice(3, 6), slice(42, 55), slice(42, 55))
    assert 0.6 < new[inside].std() / noisy[inside].std() < 1.4
    assert np.corrcoef(new[inside].ravel(), noisy[inside].ravel())[0, 1] > 0.5


def test_vessel_through_ground_glass_survives():
    lung = np.full((9, 60, 60), -860.0, np.float32)
    lung[:, 29:31] = 40
    new = render_nodule(lung, (1.0, 0.8, 0.8), (4, 30, 30), 20.0, seed=0, kind="ground-glass")
    assert (new[4, 29:31, 25:36] >= 40 - 1e-3).all() and new[4, 29:31, 25:36].mean() < 150


def test_nodule_is_deterministic_and_shapes_vary():
    lung = np.full((16, 40, 40), -860.0, np.float32)
    a, b, c = (render_nodule(lung, (1, 1, 1), (8, 20, 20), 12.0, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_nodule_at_the_border_and_in_one_slice():
    lung = np.full((1, 30, 30), -860, np.int16)
    new = render_nodule(lung, (5.0, 1.0, 1.0), (0, 0, 29), 10.0)
    assert new.shape == lung.shape and new[0, 0, 29] > -300


# --- noise ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel, low, high", [("standard", 0.06, 0.20), ("sharp", 0.42, 0.62)])
def test_noise_has_its_sigma_and_spectrum(kernel, low, high):
    n = ct_noise((6, 256, 256), (2.5, 0.6, 0.6), 12.0, seed=1, kernel=kernel)
    assert n.dtype == np.float32 and abs(n.std() - 12) < 0.25 and abs(n.mean((1, 2))).max() < 1e-3  # nothing at DC
    f, power, sd, squares = noise_spectrum(n, (2.5, 0.6, 0.6), low=-500, high=500, best=60)
    assert low < f[power.argmax()] < high and squares == 60
    asked = kernel_curve(f, kernel) ** 2
    assert np.corrcoef(asked[2:], power[2:])[0, 1] > 0.95


def test_noise_slices_are_weakly_related_and_seeded():
    n = ct_noise((4, 128, 128), (1.0, 0.7, 0.7), 10, seed=1)
    near, far = (np.corrcoef(n[0].ravel(), n[k].ravel())[0, 1] for k in (1, 2))
    assert 0.2 < near < 0.5 and abs(far) < 0.1
    assert np.array_equal(n, ct_noise((4, 128, 128), (1.0, 0.7, 0.7), 10, seed=1)) and not np.array_equal(n, ct_noise((4, 128, 128), (1.0, 0.7, 0.7), 10, seed=2))


def test_noise_hu_sets_kernel_and_strength():
    standard, sharp, none = (make_phantom(4, noise_hu=s, **SMALL)[0].meta["phantom"] for s in (10, 45, 0))
    assert standard["kernel"] == "standard" and sharp["kernel"] == "sharp" and none["noise_hu"] == 0


# --- parts ----------------------------------------------------------------------------------------------------------

def test_murray_law_holds_at_every_fork():
    parent, points, radius = grow_tree(np.random.default_rng(0).uniform(0, 60, (200, 3)), (0, 0, 0), 99.0, leaf_radius=0.5, exponent=3.0)
    for i in range(len(points)):
        children = [c for c in range(1, len(points)) if parent[c] == i]
        assert math.isclose(radius[i] ** 3, 0.5**3 + sum(radius[c] ** 3 for c in children), rel_tol=1e-9)
    steps = parent.copy()
    for _ in range(len(points)): steps = parent[steps]
    assert (steps == 0).all()  # all ways lead to the root


def test_tube_has_its_cross_section():
    grid = Grid(np.arange(5.0, dtype=np.float32), np.arange(-20, 20, 0.5, dtype=np.float32), np.arange(-20, 20, 0.5, dtype=np.float32), (1.0, 0.5, 0.5), 1.0, 1.0)
    out = tube_cover(Tubes.along([(0, 0, -10), (0, 0, 0), (0, 0, 15)], 6.0), grid, np.zeros((5, 80, 80), np.float32))
    assert abs(out[2].sum() * 0.25 / (math.pi * 36) - 1) < 0.03 and out.max() <= 1
    thin = tube_cover(Tubes.along([(0, 0, -10), (0, 0, 15)], 0.3), grid, np.zeros((5, 80, 80), np.float32))
    assert 0.05 < thin.max() < 0.6  # thinner than the blur: faint


def test_texture_is_a_function_of_place():
    t = Texture(1, "x", 6.0)
    a, b = t.slice(2.0, np.arange(0, 40, 2.0), np.arange(0, 40, 2.0)), t.slice(2.0, np.arange(0, 40, 1.0), np.arange(0, 40, 1.0))
    assert np.allclose(a, b[::2, ::2], atol=1e-5) and 0.4 < b.std() < 1.6


def test_cover_is_partial_volume():
    assert np.allclose(cover(np.array([-5, -0.5, 0, 0.25, 0.5, 9.0]), 1.0), [1, 1, 0.5, 0.25, 0, 0])


def test_patients_differ_and_are_frozen():
    people = [draw_patient(s) for s in range(40)]
    assert len({p.width for p in people}) == 40 and {p.female for p in people} == {True, False} and {p.sharp for p in people} == {True, False}
    with pytest.raises(dataclasses.FrozenInstanceError): people[0].fat = 1


def test_threads_do_not_change_a_bit(monkeypatch):
    many = make_phantom(11, **SMALL)[0].hu
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert np.array_equal(many, make_phantom(11, **SMALL)[0].hu)


# --- bad arguments --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [dict(shape=(0, 5, 5)), dict(shape=(5, 5)), dict(spacing=(1, 1)), dict(spacing=(1, 0, 1)), dict(spacing=(1, 1, math.nan)), dict(noise_hu=-1), dict(noise_hu=math.nan), dict(n_nodules=-1), dict(dose=0), dict(kernel="blunt"), dict(posture="standing"), dict(diameters=(5, 4)), dict(padding=1e6), dict(tail=1), dict(seed_=2)])
def test_bad_phantom_arguments(bad):
    with pytest.raises(UsageError) as error: make_phantom(0, **{**SMALL, **bad})
    assert isinstance(error.value, MitsError) and "\n" not in str(error.value)


@pytest.mark.parametrize("bad, kind", [(dict(kind="cube"), UsageError), (dict(shape="star"), UsageError), (dict(diameter_mm=0), UsageError), (dict(diameter_mm=math.inf), UsageError), (dict(at=(1, 2)), UsageError), (dict(at=(1, 2, 300)), PlaceError), (dict(at=(math.nan, 2, 3)), PlaceError)])
def test_bad_nodule_arguments(bad, kind):
    with pytest.raises(kind): render_nodule(np.zeros((8, 20, 20)), (1, 1, 1), **{**dict(at=(4, 10, 10), diameter_mm=6.0), **bad})


def test_bad_noise_and_statistics_arguments():
    with pytest.raises(UsageError, match="kernel"): ct_noise((1, 8, 8), (1, 1, 1), 5, 0, kernel="blunt")
    with pytest.raises(UsageError, match="shape"): ct_noise((0, 8, 8), (1, 1, 1), 5, 0)
    with pytest.raises(UsageError, match="lung"): chest_statistics(np.full((2, 64, 64), -1000), (1, 1, 1))
    with pytest.raises(UsageError, match="flat"): noise_spectrum(np.full((2, 64, 64), -1000), (1, 1, 1))
