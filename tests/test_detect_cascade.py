"Second stage, regions, reports, storage, the shipped weights."
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi

from mits_nb.core import DataError, DetectError, OutputError, TrainError, UsageError, WeightsError, from_preset
from mits_nb.detect.cascade import (REPORT_SCHEMA, TRUSTED, Cascade, CascadeConfig, Report, divided, draw_heatmap, enough_in_a_row, fewer_components, find_regions, glcm, load_svm, predictive_value, quantised,
                                    reach_of, read_report, run_rule, slice_features, stored_types, suspicion, train_svm, verdict_worth, with_neighbours)
from mits_nb.detect.cnn import Detector
from mits_nb.detect.windows import grid_shape, to_pixels, touched_slices
from mits_nb.scan import Scan


def spot(y=40, x=70, shape=(121, 121), wide=30.):
    yy, xx = np.mgrid[:shape[0], :shape[1]]
    return np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / wide).astype(np.float32)


# --- neighbouring slices ---

@pytest.mark.parametrize("dz, reach", [(.6, 6), (1., 3), (1.25, 3), (2.5, 1), (-2.5, 1), (5., 0), (10., 0)])
def test_neighbours_within_a_depth(dz, reach): assert reach_of(dz, 7.5) == reach and reach_of(dz, 0.) == 0 and from_preset(CascadeConfig, "tiny").depth_mm == 12.5


def test_neighbours_are_averaged_as_log_odds():
    p = np.full((5, 2, 2), .5, np.float32)
    p[2, 0, 0], p[:, 1, 1] = .9, 0. # one doubt; a cell outside the circle
    joined = with_neighbours(p, 2.5, 7.5)
    assert np.allclose(joined[:, 0, 0], [.5, *[9 ** (1 / 3) / (1 + 9 ** (1 / 3))] * 3, .5], atol=1e-6)
    assert (joined[:, 1, 1] == 0).all() and np.allclose(joined[:, 0, 1], .5) and joined.dtype == np.float32
    sure = np.array([1., 0., 1.], np.float32)[:, None, None] * np.ones((3, 1, 1), np.float32)
    assert np.isfinite(with_neighbours(sure, 2.5)).all()


def test_thick_slices_single_slices_and_the_published_way_stay_as_they_are():
    p = np.random.default_rng(0).random((4, 3, 3)).astype(np.float32)
    assert with_neighbours(p, 5., 7.5) is p and with_neighbours(p, 7.) is p and with_neighbours(p, 1., 0.) is p and with_neighbours(p[:1], 1.) is not None
    assert np.array_equal(with_neighbours(p[:1], 1.), p[:1])


# --- co-occurrence ---

@pytest.mark.parametrize("levels, shape", [(100, (2, 30, 40)), (8, (1, 121, 121)), (5, (3, 2, 2)), (4, (1, 1, 6))])
def test_glcm_equals_scikit_image(levels, shape):
    from skimage.feature import graycomatrix
    grey = np.random.default_rng(0).integers(0, levels, shape)
    ours = glcm(grey, levels)
    assert np.array_equal(glcm(grey.astype(np.uint8), levels), ours), "pairs of bytes do not fit a byte"
    for one, c in zip(grey, ours): assert (graycomatrix(one.astype(np.uint8), [1], np.deg2rad([0, 45, 90, 135]), levels=levels)[:, :, 0] == c).all()


def test_glcm_counts_every_pair_once():
    counts = glcm(np.zeros((2, 7, 9), int), 3)
    assert counts[:, 0, 0].tolist() == [[7 * 8, 6 * 8, 6 * 9, 6 * 8]] * 2 and counts.sum() == 2 * (7 * 8 + 6 * 8 + 6 * 9 + 6 * 8)


def test_glcm_refuses_levels_that_do_not_fit():
    for bad in (np.full((1, 4, 4), 3), np.full((1, 4, 4), -1), np.zeros((4, 4), int)):
        with pytest.raises(DetectError): glcm(bad, 3)


def test_levels_cover_the_range():
    assert quantised(np.array([0., .0099, .5, 1., 1.2, -.1])).tolist() == [0, 0, 49, 99, 99, 0]


def test_features_ignore_the_place():
    config = from_preset(CascadeConfig, "tiny")
    a, b = (slice_features(spot(*at)[None], config) for at in ((40, 70), (70, 40)))
    assert a.shape == (1, config.levels**2 * 4) and a.dtype == np.float32 and np.allclose(a, b, atol=.75)
    assert slice_features(spot()[None], from_preset(CascadeConfig, "full")).shape == (1, 40000)
    assert slice_features(spot()[None], from_preset(CascadeConfig, "tiny", use_glcm=False)).shape == (1, 121 * 121)


# --- second stage ---

def slices(n=40):
    numbers = np.random.default_rng(1)
    maps = np.array([np.clip(numbers.beta(.3, 12, (61, 61)) + (spot(30, 25, (61, 61)) if i % 2 else 0), 0, 1) for i in range(n)], np.float32)
    return maps, np.arange(n) % 2 == 1, np.arange(n) // 2 % 5


def test_second_stage_learns_and_is_calibrated():
    config = from_preset(CascadeConfig, "tiny", components=6)
    maps, truth, scan = slices()
    svm, (a, b), found = train_svm(slice_features(maps, config), truth, scan, config)
    assert a > 0 and found["balanced_accuracy"] > .95 and found["components"] == 6
    p = 1 / (1 + np.exp(-(a * svm.decision_function(slice_features(maps, config)) + b)))
    assert ((p > .5) == truth).all()


def test_tiny_decisions_are_calibrated_too(monkeypatch):
    "A machine with a small C decides within 1e-4 of its threshold: probabilities must still tell the classes apart."
    from mits_nb.detect import cascade
    real, config = cascade.new_svm, from_preset(CascadeConfig, "tiny", components=6)
    monkeypatch.setattr(cascade, "new_svm", lambda components, c, gamma, seed=0: real(components, 1e-5, 1e-2, seed))
    maps, truth, scan = slices()
    svm, (a, b), _ = train_svm(slice_features(maps, config), truth, scan, config, show_progress=False)
    decision = svm.decision_function(slice_features(maps, config))
    p = 1 / (1 + np.exp(-(a * decision + b)))
    assert np.ptp(decision) < 1e-2 and p[truth].mean() - p[~truth].mean() > .3


def test_one_class_is_an_error():
    config = from_preset(CascadeConfig, "tiny", components=4)
    for truth in (np.zeros(20, bool), np.ones(20, bool)):
        with pytest.raises(TrainError, match="one class"): train_svm(np.zeros((20, 8), np.float32), truth, np.arange(20), config)


@pytest.mark.parametrize("scan", [np.arange(40) // 2 % 5, np.zeros(40, int), np.r_[np.zeros(30, int), np.ones(5, int), np.full(5, 2)], np.arange(40) % 2],
                         ids=["even", "one scan", "one large and two small scans", "two scans"])
def test_256_components_of_40_slices_fall_back_however_the_scans_divide(scan, caplog):
    maps, truth, _ = slices()
    if scan[:2].tolist() == [0, 1]: truth = np.arange(40) // 2 % 2 == 1
    with caplog.at_level("WARNING", "mits_nb"): svm, _, found = train_svm(slice_features(maps, from_preset(CascadeConfig, "tiny")), truth, scan, from_preset(CascadeConfig, "tiny", components=256), show_progress=False)
    smallest = 40 - max(np.bincount(scan)) if len(set(scan)) > 1 else 26
    assert found["components"] == svm["pca"].n_components_ == min(31, smallest - 1 if smallest < 31 else 31) and f"using {found['components']}" in caplog.text


def test_slices_that_cannot_be_cross_validated_are_an_error():
    config, features = from_preset(CascadeConfig, "tiny", components=4), np.random.default_rng(0).random((20, 8)).astype(np.float32)
    with pytest.raises(TrainError, match="single scan"): train_svm(features, np.arange(20) < 10, np.arange(20) // 10, config, show_progress=False)
    with pytest.raises(TrainError): train_svm(features[:3], np.array([True, False, False]), np.zeros(3, int), config, show_progress=False)


def test_too_few_samples_fall_back_and_say_so(caplog):
    assert fewer_components(256, 1000, 4096) == 256
    with caplog.at_level("WARNING", "mits_nb"): assert fewer_components(256, 100, 4096) == 79
    assert "256 principal components asked for" in caplog.text and "using 79" in caplog.text


# --- regions ---

@pytest.mark.parametrize("dz, n, expected", [(.625, 300, (9, 10)), (1.25, 100, (9, 10)), (2.5, 48, (6, 7)), (5., 24, (3, 4)), (2.5, 1, (1, 1)), (20., 10, (1, 1)), (-2.5, 48, (6, 7))])
def test_rule_adapts_to_the_slices(dz, n, expected): assert run_rule(dz, n) == expected


def test_a_single_hot_window_is_reported_at_the_middle_of_its_pixels():
    "In the slice, in millimetres, and in the middle of its own box: no half pixel to one side."
    from mits_nb.detect.windows import cut_windows, window_centres
    heat, scan = np.zeros((3, 9, 12), np.float32), Scan(np.zeros((3, 64, 76), np.int16), (20., .5, .5), (7., -3., 5.))
    heat[:, 4, 6] = .9
    region, = find_regions(heat, scan)
    rows, columns = np.mgrid[:64, :76]
    centres = window_centres((64, 76))
    this = centres[[tuple(c) == (16 + 4 * 4, 16 + 4 * 6) for c in centres]]
    middle = cut_windows(rows, this).mean(), cut_windows(columns, this).mean()
    assert region["centre_voxel"] == [1, *middle] == [1, 31.5, 39.5]
    assert np.allclose(region["centre_mm"], scan.voxel_to_world((1, *middle)))
    assert [np.mean((a, b - 1)) for a, b in region["box_voxel"][1:]] == [31.5, 39.5]


def test_a_rule_for_larger_forgeries_would_miss_the_papers():
    "All slices of a 16 mm mask are hits: found; asked for 20 mm they would not be."
    for dz in (2.5, 3., 5.):
        hits = np.isin(np.arange(60), touched_slices(30, dz, 60, 16.))
        assert enough_in_a_row(hits, *run_rule(dz, 60)) and not enough_in_a_row(hits, *run_rule(dz, 60, 20.))


def test_nine_of_ten():
    def row(text): return np.array([c == "1" for c in text])
    assert enough_in_a_row(row("0111101111100"), 9, 10) and enough_in_a_row(row("111111111"), 9, 10)
    assert not enough_in_a_row(row("1111011110111"), 9, 10) and not enough_in_a_row(row("11111111"), 9, 10)


def volume(slices, at=(40, 70), n=20):
    maps = np.zeros((n, 121, 121), np.float32)
    for z in slices: maps[z] = np.maximum(maps[z], spot(*at))
    return maps


def blank(n=20, dz=2.5, **kwargs): return Scan(np.zeros((n, 512, 512), np.int16), (dz, .7, .8), **kwargs)


def test_a_region_has_the_right_centre_in_voxels_and_millimetres():
    direction = np.diag([-1., -1., 1.])
    scan = blank(origin=(100., 50., -300.), direction=direction)
    region, = find_regions(volume(range(5, 12)), scan)
    assert np.allclose(region["centre_voxel"], (8, 15.5 + 160, 15.5 + 280), atol=.1) and region["slices"] == list(range(5, 12))
    assert np.allclose(region["centre_mm"], (100 - 295.5 * .8, 50 - 175.5 * .7, -300 + 8 * 2.5), atol=.1)
    assert region["score"] == 1. and np.allclose(region["size_mm"][0], 7 * 2.5)
    (z0, z1), (y0, y1), (x0, x1) = region["box_voxel"]
    assert (z0, z1) == (5, 12) and np.allclose(region["size_mm"][1:], ((y1 - y0) * .7, (x1 - x0) * .8), atol=.01)
    lit = np.argwhere(to_pixels((spot() >= .5).astype(int), (512, 512))) # the box holds just the pixels for which a hot cell stands
    assert np.array_equal(lit.min(0), (y0, x0)) and np.array_equal(lit.max(0) + 1, (y1, x1))


def test_one_slice_may_miss_but_not_two():
    assert len(find_regions(volume([3, 4, 5, 7, 8, 9]), blank())) == 1
    assert find_regions(volume([3, 4, 6, 8, 9]), blank()) == []
    assert find_regions(volume(range(5)), blank()) == []


def test_lukewarm_regions_are_left_out():
    warm = volume(range(3, 12)) * .8
    assert len(find_regions(warm, blank(), .5, 0.)) == 1 and find_regions(warm, blank(), .5, .85) == []


def test_two_places_are_two_regions_and_the_most_certain_comes_first():
    maps = np.maximum(volume(range(2, 10)) * .8, volume(range(8, 16), at=(80, 30)))
    regions = find_regions(maps, blank())
    assert [r["slices"][0] for r in regions] == [8, 2] and regions[0]["score"] > regions[1]["score"]


def touching(columns, radius=5., n=14):
    "Patches whose slopes meet above 0.4, as those of forgeries 30 to 40 mm apart do."
    maps = np.zeros((n, 121, 121), np.float32)
    for column in columns:
        ball = np.exp(-((np.indices((121, 121)) - np.reshape((50, column), (2, 1, 1))) ** 2).sum(0) / 2 / radius ** 2)
        maps[3:10] = np.maximum(maps[3:10], ball)
    return maps


def test_touching_patches_come_apart_between_their_peaks():
    pair, single = touching((40, 52)), touching((40,))
    assert len(find_regions(single, blank(14), .4)) == 1
    regions = sorted(find_regions(pair, blank(14), .4), key=lambda r: r["centre_voxel"][2])
    assert len(regions) == 2
    for region, column in zip(regions, (40, 52)): assert np.allclose(region["centre_voxel"], (6, 15.5 + 200, 15.5 + 4 * column), atol=4)
    assert regions[0]["box_voxel"][2][1] <= regions[1]["box_voxel"][2][0] + 4 # next to each other, not one inside the other


def test_a_flat_ridge_or_close_peaks_are_one_patch(monkeypatch):
    steps = (2.5, 2.8, 2.8)
    ridge = np.zeros((8, 30, 60), np.float32); ridge[:, 10:20, 5:55] = .99 # wide, but without a valley
    close = touching((40, 47), radius=2.5) # 20 mm
    full, ways, real = np.ones((12, 121, 121), np.float32), [], ndi.map_coordinates # saturated everywhere: more than 100,000 equal maxima are one plain, not as many candidates
    monkeypatch.setattr(ndi, "map_coordinates", lambda *args, **kwargs: ways.append(args) or real(*args, **kwargs))
    assert divided(full > 0, full, steps).max() == 1 and len(ways) < 10
    for heat in (ridge, close):
        assert divided(heat >= .3, heat, steps).max() == 1
    parts = divided(touching((40, 52)) >= .4, touching((40, 52)), steps)
    assert parts.max() == 2 and np.array_equal(parts > 0, touching((40, 52)) >= .4) # every cell belongs to a part, none is invented


def test_a_part_that_does_not_last_is_no_region():
    maps = touching((40,)) + 0
    brief = touching((52,)); brief[6:] = 0 # three slices of seven
    region, = find_regions(np.maximum(maps, brief), blank(14), .4)
    assert abs(region["centre_voxel"][2] - (15.5 + 160)) < 6


def test_a_patch_whose_parts_do_not_last_stays_one_region():
    early, late = touching((40,)), touching((52,)); early[7:] = 0; late[:6] = 0
    region, = find_regions(np.maximum(early, late), blank(14), .4)
    assert region["slices"] == list(range(3, 10))


def test_the_centre_is_that_of_the_hotter_half():
    "A lukewarm tail on one side must not pull the centre there."
    maps = touching((40,)); tail = maps[3:10, 48:53, 40:56]; np.maximum(tail, .45, out=tail)
    region, = find_regions(maps, blank(14), .4)
    assert abs(region["centre_voxel"][2] - (15.5 + 160)) < 4 and region["box_voxel"][2][1] > 14 + 4 * 55


def test_one_slice_scans_and_thick_slices_have_regions_too():
    assert len(find_regions(volume([0], n=1), blank(1))) == 1
    assert len(find_regions(volume([3, 4, 5]), blank(dz=5.))) == 1


# --- a small cascade of our own ---

@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = from_preset(CascadeConfig, "tiny", components=6)
    maps, truth, scan = slices()
    svm, calibration, _ = train_svm(slice_features(maps, config), truth, scan, config)
    return Cascade(Detector(width=.125), svm, config, calibration, {"history": {"rows": [{"step": 1, "windows": .7}]}, "card": "# A card\n"})


def test_a_cascade_goes_to_a_folder_and_back(small, tmp_path):
    back = Cascade.from_pretrained(small.save_pretrained(tmp_path / "c"))
    hu = np.random.default_rng(0).normal(-800, 60, (2, 64, 64)).astype(np.float32)
    a, b = small.inspect(hu, False), back.inspect(hu, False)
    assert np.allclose([s["probability"] for s in a.slices], [s["probability"] for s in b.slices], atol=1e-4) and np.array_equal(a.heatmap, b.heatmap)
    assert back.record == small.record and back.config == small.config


def noise(*shape, seed=0): return np.random.default_rng(seed).normal(-800, 60, shape).round().astype(np.int16)


def test_report_is_json_and_complete(small, tmp_path):
    scan = Scan(noise(3, 64, 72), (2.5, .7, .7))
    report = small.inspect(scan, False)
    assert report.heatmap.shape == (3, *grid_shape((64, 72))) and [s["slice"] for s in report.slices] == [0, 1, 2]
    assert all(isinstance(s["tampered"], bool) and 0 <= s["probability"] <= 1 for s in report.slices)
    assert all(s["tampered"] == (s["probability"] >= .5) for s in report.slices)
    assert json.loads(report.save(tmp_path / "r.json").read_text()) == report.to_dict() and report.windows_per_slice == (report.heatmap[0] > 0).sum()
    assert small.inspect(scan, False).to_dict() == report.to_dict() # the same every time
    assert report.to_dict()["scan"] == {"shape": [3, 64, 72], "spacing_mm": [2.5, .7, .7]} and report.to_dict()["settings"]["sure"] == small.config.sure
    assert len(small.inspect(scan.hu[0], False).slices) == 1


@pytest.mark.parametrize("hu", [noise(2, 48, 96), noise(2, 33, 32), noise(1, 65, 47), np.full((3, 64, 64), -1000, np.int16), np.zeros((2, 64, 64), np.float32), np.full((1, 40, 40), 3000, np.int32)],
                         ids=["non-square", "one window", "odd", "air", "water", "one constant slice"])
def test_slices_of_any_size_and_constant_ones(small, hu, tmp_path):
    report = small.inspect(hu, False)
    assert report.heatmap.shape == (len(hu), *grid_shape(hu.shape[1:])) and np.isfinite(report.heatmap).all() and len(report.slices) == len(hu)
    assert read_report(report.save(tmp_path / "r.json"))["scan"]["shape"] == list(hu.shape)
    if (hu == hu.flat[0]).all(): assert len({s["probability"] for s in report.slices}) == 1


def test_what_cannot_be_inspected_is_named(small):
    hu = noise(4, 40, 40).astype(np.float32)
    for bad in (np.nan, np.inf):
        hu[2, 5, 5] = bad
        with pytest.raises(DetectError, match="slice 2 holds"): small.inspect(hu, False)
    for shape in ((2, 31, 64), (2, 64, 31), (0, 64, 64), (2, 2, 64, 64)):
        with pytest.raises(DetectError): small.inspect(np.zeros(shape, np.int16), False)


def test_the_second_stage_holds_few_slices_at_a_time(small):
    import tracemalloc
    class Many: # a second stage for 100 levels
        n_features_in_ = 40000
        def decision_function(self, features): return features[:, 0]
    cascade = Cascade(small.detector, Many(), from_preset(CascadeConfig, "full"))
    maps = np.random.default_rng(0).random((320, 12, 12)).astype(np.float32)
    cascade.slice_probability(maps[:1])
    tracemalloc.start()
    p = cascade.slice_probability(maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(p) == 320 and peak < 100e6, f"{peak / 1e6:.0f} MB: 320 slices at once are 150 MB"


# --- reports ---

def made_up(regions=True):
    "A report with a region, about a scan of our own."
    scan = Scan(noise(12, 512, 512), (2.5, .7, .8), (10., -20., 30.))
    maps = volume(range(3, 10), n=12) if regions else np.zeros((12, 121, 121), np.float32)
    rows = [{"slice": z, "probability": .9 if 3 <= z < 10 and regions else .1, "tampered": bool(3 <= z < 10 and regions)} for z in range(12)]
    return Report(rows, find_regions(maps, scan), maps, 12477, (6, 7), {"shape": list(scan.shape), "spacing_mm": list(scan.spacing)}, from_preset(CascadeConfig, "tiny"), {"name": "made up"}), scan


def test_schema_is_strict_and_reports_follow_it(tmp_path):
    import jsonschema
    jsonschema.Draft202012Validator.check_schema(REPORT_SCHEMA)
    for regions in (True, False):
        report, _ = made_up(regions)
        assert read_report(report.save(tmp_path / "r.json")) == report.to_dict() and report.tampered == regions
    good = made_up()[0].to_dict()
    for change in ({"version": 2}, {"format": "other"}, {"tampered": 1}, {"extra": 1}, {"worth": []}, {"rule": [9]}, {"regions": [{"score": .5}]}, {"slices": [{"slice": 0, "probability": 1.5, "tampered": True}]}):
        (tmp_path / "bad.json").write_text(json.dumps(good | change))
        with pytest.raises(DataError, match="is not a report at"): read_report(tmp_path / "bad.json")
    (tmp_path / "short.json").write_text(json.dumps({k: v for k, v in good.items() if k != "worth"}))
    with pytest.raises(DataError, match="worth"): read_report(tmp_path / "short.json")


def test_table_of_regions():
    table = made_up()[0].table()
    assert list(table.index) == [1] and np.allclose(table.loc[1, ["z [voxel]", "y [voxel]", "x [voxel]"]].astype(float), (6, 175.5, 295.5), atol=.1)
    assert np.allclose(table.loc[1, ["x [mm]", "z [mm]"]].astype(float), (10 + 295.5 * .8, 30 + 6 * 2.5), atol=.1) and table.loc[1, "slices"] == 7 and (table.loc[1, "first"], table.loc[1, "last"]) == (3, 9)
    empty = made_up(False)[0].table()
    assert len(empty) == 0 and list(empty.columns) == list(table.columns)


@pytest.mark.parametrize("regions", [True, False])
def test_figure_shows_the_worst_slice(regions):
    report, scan = made_up(regions)
    left, right = report.figure(scan).axes[:2]
    assert np.allclose(left.lines[0].get_ydata(), [s["probability"] for s in report.slices])
    assert right.get_title().startswith("slice 6: region 1" if regions else "slice 0:") and len(right.patches) == regions and np.array_equal(right.images[1].get_array(), report.heatmap[6 if regions else 0])


def test_a_heatmap_is_drawn_where_its_windows_are():
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots()
    shown = draw_heatmap(axis, np.zeros((70, 41), np.int16), np.ones(grid_shape((70, 41)), np.float32))
    lit = np.argwhere(to_pixels(np.ones(grid_shape((70, 41)), int), (70, 41)))
    x0, x1, y1, y0 = shown.get_extent()
    assert np.allclose(lit.min(0) - .5, (y0, x0)) and np.allclose(lit.max(0) + .5, (y1, x1)) # pixel k reaches from k - 1/2 to k + 1/2
    plt.close(figure)


def test_the_page_is_self_contained_and_escapes_names(tmp_path):
    from html.parser import HTMLParser
    report, scan = made_up()
    seen = []
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs): seen.append((tag, dict(attrs)))
    page = report.save_html(tmp_path / "r.html", scan, "<script>alert(1)</script> & co").read_text(encoding="utf-8")
    Reader().feed(page)
    assert "script" not in {tag for tag, _ in seen} and "&lt;script&gt;" in page
    assert all(value.startswith("data:image/png;base64,") for _, attrs in seen for key, value in attrs.items() if key in ("src", "href")) and not any(key.startswith("on") for _, attrs in seen for key in attrs)
    assert sum(tag == "img" for tag, _ in seen) == 2 and "no clinical use" in page and "suspicious region" in page and len(page) < 1e6
    clean, scan = made_up(False)
    page = clean.save_html(tmp_path / "r.html", scan).read_text(encoding="utf-8") # replaced, whole
    assert "No suspicious region" in page and "acquittal" in page and page.rstrip().endswith("</html>") and [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    report, scan = made_up()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError): report.save_html(tmp_path / "file" / "r.html", scan)
    with pytest.raises(UsageError, match="the scan that was inspected"): report.save_html(tmp_path / "r.html", Scan(scan.hu[:5], scan.spacing))
    with pytest.raises(UsageError): report.figure(Scan(scan.hu[:, :64], scan.spacing))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_an_alarm_is_worth():
    assert predictive_value(1., .02, .5) == pytest.approx(1 / 1.02) and predictive_value(.5, .5, .3) == pytest.approx(.3) and np.isnan(predictive_value(0., 0., .5))
    assert predictive_value(1., .02, .001) < predictive_value(1., .001, .001) < predictive_value(1., .001, .01)
    alarm, clean = (" ".join(verdict_worth(t, {"real": {"regions": {"tp": 3, "fp": 1, "fn": 2}}, "odd": "?"})) for t in (True, False))
    assert "95% of all alarms are false" in alarm and "acquittal" in clean and "no clinical use" in alarm and "no clinical use" in clean and "3 of 5 forged places found, 1 false regions" in alarm


def test_the_report_names_its_weights(small, tmp_path):
    back = Cascade.from_pretrained(small.save_pretrained(tmp_path / "mine"))
    said = [c.inspect(noise(1, 64, 64), False).to_dict()["weights"] for c in (small, back)]
    assert said[0] == {"name": "not saved"} and said[1]["name"] == "mine" and all(len(v) == 64 for k, v in said[1].items() if k != "name") and len(said[1]) == 3


def test_stages_of_two_cascades_are_refused(small, tmp_path):
    a = small.save_pretrained(tmp_path / "a")
    torch.manual_seed(5)
    Detector(width=.125).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", a / "detector" / "model.safetensors")
    with pytest.raises(WeightsError, match="does not belong"): Cascade.from_pretrained(a)


def test_a_cascade_with_a_rival_is_not_stored(small, tmp_path):
    from mits_nb.detect.rivals import DctDetector
    with pytest.raises(UsageError, match="DctDetector cannot be stored"): Cascade(DctDetector(.125), small.svm, small.config, small.calibration).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_changed_or_missing_files_are_refused(small, tmp_path):
    for i, name in enumerate(("svm.skops", "detector/model.safetensors", "config.json")):
        folder = small.save_pretrained(tmp_path / str(i))
        (folder / name).write_bytes(b"{}")
        with pytest.raises(WeightsError): Cascade.from_pretrained(folder)
        (folder / name).unlink()
        with pytest.raises(WeightsError): Cascade.from_pretrained(folder)
    with pytest.raises(WeightsError): Cascade.from_pretrained("cascade-of-nobody")


def test_a_foreign_skops_file_runs_nothing(tmp_path):
    import functools
    import os
    import skops.io
    marker = tmp_path / "ran"
    skops.io.dump(functools.partial(os.system, f"touch {marker}"), tmp_path / "bad.skops")
    assert not stored_types(tmp_path / "bad.skops") <= TRUSTED
    raw = bytearray(skops.io.dumps(functools.partial(os.system, "true"), compression=zipfile.ZIP_DEFLATED))
    start = raw.index(b"schema.json") + 11
    raw[start:start + 40] = bytes(40)
    (tmp_path / "worse.skops").write_bytes(raw)
    with pytest.raises(WeightsError, match="cannot be read"): stored_types(tmp_path / "worse.skops")
    with pytest.raises(WeightsError, match="no second stage needs"): load_svm(tmp_path / "bad.skops")
    assert not marker.exists()
    skops.io.dump(np.zeros(3), tmp_path / "array.skops")
    with pytest.raises(WeightsError, match="not a second stage"): load_svm(tmp_path / "array.skops")
    (tmp_path / "noise.skops").write_bytes(b"PK but no zip")
    with pytest.raises(WeightsError): load_svm(tmp_path / "noise.skops")


def test_heatmaps_of_another_size_without_glcm_are_an_error(small):
    other = Cascade(small.detector, small.svm, from_preset(CascadeConfig, "tiny", use_glcm=False))
    with pytest.raises(DetectError, match="do not fit"): other.inspect(np.full((40, 40), -900, np.int16), False)


# --- the shipped weights ---

def test_shipped_cascade_loads_and_is_small():
    from mits_nb.core import weights_path
    folder = weights_path("cascade-tiny")
    cascade = Cascade.from_pretrained("cascade-tiny")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 15e6
    assert (folder / "detector" / "model.safetensors").stat().st_size <= 12e6 and stored_types(folder / "svm.skops") <= TRUSTED
    assert cascade.record["history"]["rows"] and "Measured" in cascade.record["card"]


def test_suspicion_asks_the_cells_nearby_in_the_depth_of_a_forgery():
    heat = np.full((12, 40, 40), .01, np.float32)
    heat[4:9, 20, 10] = .9 # the middle of that window: y 95.5, x 55.5
    at, spacing = (6, 95.5, 55.5), (4., 1., 1.)
    odds = lambda p: np.log(p / (1 - p))
    assert suspicion(heat, spacing, at) == pytest.approx(1 / (1 + np.exp(-odds(.9)))), "two slices to each side at 4 mm: all of them hot"
    mixed = (5 * odds(.9) + 2 * odds(.01)) / 7
    assert suspicion(heat, (3., 1., 1.), at) == pytest.approx(1 / (1 + np.exp(-mixed)), rel=1e-4), "three to each side at 3 mm"
    assert suspicion(heat, spacing, (6, 95.5, 59.5)) == pytest.approx(.9, abs=1e-4) and suspicion(heat, spacing, (6, 95.5, 63.5)) == pytest.approx(.01, abs=1e-4), "4 mm away counts, 8 mm do not"
    assert suspicion(heat, (4., 3., 3.), (6, 96.9, 56.9)) == pytest.approx(.9, abs=1e-4) and suspicion(heat, (4., 3., 3.), (6, 95.5, 59.5)) == pytest.approx(.01, abs=1e-4), "coarse pixels: the nearest cell, wherever its middle is"
    assert suspicion(heat, spacing, (0, 0, 0)) == pytest.approx(.01, abs=1e-4) and suspicion(np.zeros((1, 5, 5)), spacing, (0, 9, 9)) == pytest.approx(1e-4)
    with pytest.raises(UsageError, match="outside the 12 slices"): suspicion(heat, spacing, (12, 0, 0))
    report = Report([], [], heat, scan={"shape": [12, 180, 180], "spacing_mm": list(spacing)})
    assert report.suspicion(at) == suspicion(heat, spacing, at)
    with pytest.raises(UsageError, match="outside the scan"): report.suspicion((6, 180, 0))
