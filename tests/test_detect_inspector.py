"""The heatmap inspector without a browser: which window answers for a voxel, its pictures, and what keys, clicks and buttons do."""
from dataclasses import replace

import numpy as np
import pytest

from mits_nb.core import UsageError, from_preset
from mits_nb.detect.cascade import (Cascade, CascadeConfig, HeatmapInspector, Report, find_regions, glcm, glcm_picture, hottest_voxel, inspector_overlays, inspector_status, quantised, window_at,
                                    window_picture)
from mits_nb.detect.windows import cut_windows, grid_mask, grid_shape, to_pixels
from mits_nb.scan import Scan, window
from mits_nb.viewer import look

SHAPE, SIZE = (16, 160, 192), (160, 192)
PLACES = ((5, 40, 60), (9, 100, 120)) # two spots: slice, y, x


def heat():
    rows, columns = grid_shape(SIZE)
    z, y, x = np.mgrid[:SHAPE[0], :rows, :columns]
    maps = [(1 - .1 * k) * (abs(z - at[0]) <= 3) * np.exp(-((y - (at[1] - 16) / 4) ** 2 + (x - (at[2] - 16) / 4) ** 2) / 12) for k, at in enumerate(PLACES)]
    return (np.max(maps, 0) * grid_mask(SIZE)).astype(np.float32)


@pytest.fixture
def scan():
    note = {"kind": "forged", "action": "inject", "at": [9.0, 100.0, 120.0], "box": [[6, 13], [90, 110], [110, 130]], "seed": 0}
    return Scan(np.random.default_rng(0).integers(-900, -700, SHAPE).astype(np.int16), (2.5, .8, .8)).with_hu(np.random.default_rng(0).integers(-900, -700, SHAPE).astype(np.int16), note)


@pytest.fixture
def report(scan):
    maps = heat()
    rows = [{"slice": z, "probability": float(maps[z].max()), "tampered": bool(maps[z].max() >= .5)} for z in range(SHAPE[0])]
    return Report(rows, find_regions(maps, scan, .5, .8), maps, int(grid_mask(SIZE).sum()), (6, 7), {"shape": list(SHAPE), "spacing_mm": list(scan.spacing)}, from_preset(CascadeConfig, "tiny"))


@pytest.fixture
def inspector(scan, report): return HeatmapInspector(scan, report, size=160)


def press(inspector, key, screen=None):
    "What the browser sends when a key is pressed."
    screen = screen or inspector.viewer.screen
    screen._handle_custom_msg({"kind": "key", "key": key}, [])


def test_the_window_that_answers_is_the_one_that_is_drawn(report):
    number = np.arange(np.prod(grid_shape(SIZE))).reshape(grid_shape(SIZE)) + 1
    drawn = to_pixels(number, SIZE)
    for y, x in [(14, 14), (17, 18), (40, 60), (41, 63), (100, 120), *np.argwhere(drawn)[::371]]:
        here = window_at(report, (5, y, x))
        assert number[here["cell"]] == drawn[y, x] and max(abs(here["centre"][0] - y), abs(here["centre"][1] - x)) <= 2
    for corner in ((0, 0), (0, 191), (159, 0), (159, 191)): # the nearest window that exists, and whole
        cut_windows(np.zeros(SIZE), np.array([window_at(report, (0, *corner))["centre"]]))
    assert window_at(report, (5, 0, 0))["inside"] is False and window_at(report, (5, 80, 96))["inside"] is True
    for z in (-1, 16):
        with pytest.raises(UsageError, match="was not inspected"): window_at(report, (z, 80, 80))


def test_probability_and_region_of_a_voxel(report):
    first, second = (window_at(report, at) for at in PLACES)
    assert first["probability"] == pytest.approx(1, abs=.02) and first["region"] == 0 and second["region"] == 1
    assert window_at(report, (14, 40, 60))["region"] is None and window_at(report, (5, 40, 120))["region"] is None
    assert hottest_voxel(report)[1:] == first["centre"] and "region 1 of 2" in inspector_status(report, 5, first) and "region" not in inspector_status(report, 14, window_at(report, (14, 40, 60)))


def test_window_picture_is_the_window(scan):
    picture = window_picture(scan.hu, scan.spacing, 3, (40, 60), size=32)
    assert np.array_equal(picture, window(cut_windows(scan.hu[3], np.array([[40, 60]]))[0]))
    assert window_picture(scan.hu, (2.5, .8, .4), 3, (40, 60), size=64).shape == (64, 32) # true aspect
    assert (window_picture(scan.hu, scan.spacing, 3, (40, 60), 32, (0, 100)) == 0).all()


@pytest.mark.parametrize("preset", ["tiny", "full"])
def test_glcm_picture_is_the_matrix_of_the_second_stage(report, preset):
    config, one = from_preset(CascadeConfig, preset), report.heatmap[5]
    picture = glcm_picture(one, config, size=1)
    counts = glcm(quantised(np.where(one < config.floor, 0, one)[None], config.levels), config.levels)[0].sum(2)
    assert picture.shape == (config.levels, config.levels, 3)
    empty, most = picture[0, 0], picture[-1, 0] # top left: nothing pairs level 0 with the highest; bottom left: (0, 0), the most
    assert counts[-1, 0] == 0 and counts[0, 0] == counts.max() and (empty != most).any()
    assert np.array_equal((picture == empty).all(2)[::-1], counts == 0)
    marked = glcm_picture(one, config, .9, size=4 * config.levels)
    level = int(quantised(np.array(.9), config.levels))
    amber = (marked == (255, 176, 0)).all(2)
    assert marked.shape[0] == 4 * config.levels and amber[:, 4 * level + 2].all() and amber[len(amber) - 1 - (4 * level + 2)].all() and amber.sum() == 2 * len(amber) - 1
    assert glcm_picture(np.zeros((5, 5), np.float32), config).shape[2] == 3 # a constant slice


def test_overlays_hide_what_is_below_the_threshold_and_lie_on_their_windows(report):
    view = look(SHAPE, (2.5, .8, .8), index=5, size=192)
    for threshold in (0., .25, .6):
        levels, table = inspector_overlays(report, .5, threshold)[0].sheet(view)
        shown = to_pixels(np.where(report.heatmap[5] >= max(threshold, 1e-6), 1, 0), SIZE) > 0
        assert np.array_equal(levels > 0, shown) and table[0, 3] == 0 and (table[1:, 3] == round(.5 * 255)).all()
    assert len(inspector_overlays(report)) == 2


def test_it_opens_at_the_most_certain_region(inspector, report):
    assert inspector.viewer.index == 5 and inspector.place == (5, 40, 60) and "region 1 of 2" in inspector.status.value and "probability 1.00" in inspector.status.value
    assert [f["title"].split(",")[0] for f in inspector.details.frames] == ["window", "co-occurrence"] and not inspector.controls["next"].disabled


def test_scrolling_and_clicking_move_the_window_but_never_run_the_network(inspector, monkeypatch):
    monkeypatch.setattr(Cascade, "heatmap", lambda *a, **k: pytest.fail("the network ran"))
    monkeypatch.setattr(Cascade, "inspect", lambda *a, **k: pytest.fail("the network ran"))
    before = inspector.details.frames
    inspector.viewer.controls["slice"].value = 14
    assert inspector.place == (14, 40, 60) and "slice 14" in inspector.status.value and all(a["png"] != b["png"] for a, b in zip(before, inspector.details.frames))
    inspector.viewer.screen._handle_custom_msg({"kind": "click", "pane": 0, "x": 120.5 / 192, "y": 100.5 / 160}, [])
    assert inspector.place == (14, 100, 120) and "y, x = 100, 120" in inspector.status.value
    inspector.viewer.plane = "coronal"
    assert inspector.viewer.index == 100 and inspector.place == (14, 100, 120)
    inspector.details._handle_custom_msg({"kind": "step", "n": 3}, []) # the wheel over the right-hand pictures
    assert inspector.viewer.index == 103


def test_next_region_goes_round(inspector):
    inspector.controls["next"].click()
    assert inspector.place == (9, 100, 120) and inspector.viewer.index == 9 and "region 2 of 2" in inspector.status.value
    inspector.controls["next"].click()
    assert inspector.place == (5, 40, 60)
    press(inspector, "p")
    assert inspector.place == (9, 100, 120)
    press(inspector, "n", inspector.details)
    assert inspector.place == (5, 40, 60)
    inspector.viewer.plane = "sagittal"
    press(inspector, "n")
    assert inspector.viewer.index == 120


def test_keys_move_the_sliders_within_their_ends(inspector):
    sheet = inspector.viewer.screen.frames[0]["sheets"][0]
    for _ in range(3): press(inspector, "]")
    assert inspector.controls["threshold"].value == .4 and inspector.viewer.screen.frames[0]["sheets"][0] != sheet
    for _ in range(30): press(inspector, "[")
    for _ in range(30): press(inspector, ".")
    assert (inspector.controls["threshold"].value, inspector.controls["opacity"].value) == (0, 1)
    press(inspector, ",")
    press(inspector, "x") # means nothing
    assert inspector.controls["opacity"].value == .95


def test_truth_is_hidden_until_asked_for(inspector, scan, report):
    assert "truth" not in inspector.status.value and inspector.viewer.screen.frames[0]["voxel_sheets"] == 1
    press(inspector, "t")
    assert inspector.controls["truth"].value and inspector.viewer.screen.frames[0]["voxel_sheets"] == 2 and "unchanged slice" in inspector.status.value # slice 5: the report is wrong there
    inspector.go()
    assert "changed in this slice" in inspector.status.value
    press(inspector, "t")
    assert inspector.viewer.screen.frames[0]["voxel_sheets"] == 1 and "truth" not in inspector.status.value
    honest = HeatmapInspector(replace(scan, meta={}), report, size=80)
    press(honest, "t")
    assert honest.controls["truth"].disabled and not honest.controls["truth"].value
    mask = np.zeros(SHAPE, bool)
    mask[5] = True
    given = HeatmapInspector(scan, report, truth=mask, size=80)
    press(given, "t")
    assert "changed in this slice" in given.status.value
    with pytest.raises(UsageError, match="must agree"): HeatmapInspector(scan, report, truth=mask[1:])


def test_without_regions_it_opens_at_the_hottest_window(scan, report):
    quiet = HeatmapInspector(scan, replace(report, regions=[]), size=80)
    assert quiet.place == hottest_voxel(report) and quiet.controls["next"].disabled
    press(quiet, "n")
    assert quiet.place == hottest_voxel(report)
    flat = HeatmapInspector(scan, replace(report, regions=[], heatmap=np.zeros_like(report.heatmap)), size=80)
    assert flat.place == (0, 16, 16) and "outside the circle" in flat.status.value
    assert HeatmapInspector(scan, report, at=(3, 50, 50), size=80).place == (3, 50, 50)
    flat.viewer.at = None
    assert flat.place[1:] == (16, 16)


def test_a_report_of_another_scan_is_refused(scan, report):
    for other in (Scan(scan.hu[:5], scan.spacing), Scan(scan.hu[:, :128], scan.spacing)):
        with pytest.raises(UsageError, match="the scan that was inspected"): HeatmapInspector(other, report)
    with pytest.raises(UsageError, match="Report or a Cascade"): HeatmapInspector(scan, {"regions": []})


def test_a_cascade_inspects_first(scan, report, monkeypatch):
    cascade = Cascade.__new__(Cascade)
    monkeypatch.setattr(Cascade, "inspect", lambda self, scan: report)
    assert HeatmapInspector(scan, cascade, size=80).report is report


def test_the_still_shows_all_three_pictures(inspector):
    import io
    from PIL import Image
    file = inspector.still()
    assert len(file) <= 95_000 and Image.open(io.BytesIO(file)).width > 230 + 2 * 192
    data = inspector._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"} and "2 regions" in data["text/plain"] # nobody is there to see it live
