"""Pictures pixel by pixel, clicks voxel by voxel, and the widget's logic without a browser."""
import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import traitlets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mits_nb import viewer as viewer_module
from mits_nb.core import PlaceError, ScanError, UsageError
from mits_nb.scan import LUNG, SOFT, Scan, window
from mits_nb.viewer import (PLANES, Boxes, Difference, Heat, Marks, Pane, Ruler, Screen, SliceViewer, Tint, bundle, has_front_end, layers, look, on_event, paint, png_bytes, set_state,
                            still, take_plane, viewer_view)

ROOT = Path(__file__).resolve().parent.parent


def decode(data, mode=None):
    picture = Image.open(io.BytesIO(data))
    return np.asarray(picture.convert(mode) if mode else picture)


@pytest.fixture
def scan():
    hu = np.random.default_rng(0).integers(-1024, 1500, (12, 30, 40)).astype(np.int16)
    return Scan(hu, (2.5, 1.0, 1.0))


@pytest.fixture
def viewer(scan):
    return SliceViewer([Pane(scan, "one"), Pane(scan.with_hu(scan.hu + 50), "two")], size=200)


grids = st.tuples(*[st.integers(1, 24)] * 3)
lengths = st.tuples(*[st.floats(0.3, 6)] * 3)


# ---- geometry

def test_planes_are_head_up():
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert (take_plane(volume, "axial", 1) == volume[1]).all()
    assert (take_plane(volume, "coronal", 2) == volume[::-1, 2]).all()
    assert (take_plane(volume, "sagittal", 3) == volume[::-1, :, 3]).all()


@settings(max_examples=60, deadline=None)
@given(grids, lengths, st.sampled_from(list(PLANES)), st.integers(8, 400), st.sampled_from([1, 2, 4]), st.randoms(use_true_random=False))
def test_every_drawn_voxel_is_found_again(shape, spacing, plane, size, zoom, random):
    at = tuple(random.randrange(n) for n in shape)
    view = look(shape, spacing, plane, size=size, zoom=zoom, centre=at)
    assert max(view.height, view.width) == size
    u, v = view.pixel(at)
    assert 0 < u < view.width and 0 < v < view.height, "the place that the view is centred on is on the screen"
    assert view.voxel(u, v) == at
    volume = np.zeros(shape)
    volume[at] = 1
    cut = view.cut(volume)
    row, col = np.argwhere(cut)[0]
    assert (int(v * cut.shape[0] / view.height), int(u * cut.shape[1] / view.width)) == (row, col), "it is drawn where the array has it"


@settings(max_examples=30, deadline=None)
@given(grids, st.sampled_from(list(PLANES)), st.integers(20, 300), st.floats(0, 1), st.floats(0, 1))
def test_every_click_on_the_picture_gives_a_voxel_of_the_slice(shape, plane, size, x, y):
    view = look(shape, (2.5, 0.7, 0.7), plane, size=size)
    at = view.voxel(x * view.width, y * view.height)
    assert all(0 <= c < n for c, n in zip(at, shape)) and at[PLANES[plane][0]] == view.index


def test_click_coordinates_by_hand():
    view = look((10, 20, 30), (3.0, 1.0, 1.0), "coronal", index=7, size=300)  # 30 mm high, 30 mm wide
    assert (view.height, view.width) == (300, 300)
    assert view.voxel(0, 0) == (9, 7, 0) and view.voxel(299.9, 299.9) == (0, 7, 29)
    assert view.voxel(10, 29.9) == (9, 7, 1) and view.voxel(9.9, 30) == (8, 7, 0)  # columns are 10 pixels wide, rows 30 high
    assert view.pixel((9, 7, 0)) == (5, 15)
    view = look((10, 20, 30), (3.0, 1.0, 1.0), "sagittal", index=4, size=300)  # 30 mm high, 20 mm wide
    assert (view.height, view.width) == (300, 200) and view.voxel(199, 0) == (9, 19, 4)
    view = look((10, 20, 30), (3.0, 1.0, 1.0), "axial", index=4, size=300)
    assert (view.height, view.width) == (200, 300) and view.voxel(299, 0) == (4, 0, 29)


def test_circles_stay_round():
    for plane, (_, r, c) in PLANES.items():
        spacing = (5.0, 0.8, 0.6)
        view = look((40, 200, 200), spacing, plane, size=500)
        per_mm = view.height / ((view.rows[1] - view.rows[0]) * spacing[r]), view.width / ((view.cols[1] - view.cols[0]) * spacing[c])
        assert per_mm[0] == pytest.approx(per_mm[1], rel=0.01)


def test_zoom_stays_inside_and_keeps_the_place():
    for at in ((0, 0, 0), (9, 19, 29), (5, 10, 15)):
        for plane in PLANES:
            view = look((10, 20, 30), (1, 1, 1), plane, size=100, zoom=4, centre=at)
            assert 0 <= view.rows[0] < view.rows[1] and 0 <= view.cols[0] < view.cols[1]
            assert view.voxel(*view.pixel(at)) == at


@pytest.mark.parametrize("bad, error", [(dict(plane="oblique"), UsageError), (dict(index=12), PlaceError), (dict(index=-1), PlaceError), (dict(size=0), UsageError), (dict(zoom=0.5), UsageError)])
def test_look_refuses(bad, error):
    with pytest.raises(error):
        look((12, 30, 40), (1, 1, 1), **bad)


def test_off_the_picture_is_an_error(scan):
    view = look(scan.shape, scan.spacing, size=100)
    for u, v in ((-1, 5), (5, -0.1), (view.width + 1, 5), (5, view.height + 1)):
        with pytest.raises(PlaceError, match="click inside"):
            view.voxel(u, v)
    with pytest.raises(UsageError, match="axial"):
        take_plane(scan.hu, "transversal", 0)


# ---- pictures

def test_one_pixel_a_voxel_is_the_window_and_nothing_else(scan):
    for plane, index in (("axial", 3), ("coronal", 11), ("sagittal", 39)):
        cubes = Scan(scan.hu, (1, 1, 1))
        shape = take_plane(scan.hu, plane, index).shape
        view = look(cubes.shape, cubes.spacing, plane, index, size=max(shape))
        assert (paint(view, cubes.hu, *SOFT) == window(take_plane(scan.hu, plane, index), *SOFT)).all()


def test_whole_multiples_keep_flat_areas(scan):
    hu = np.full((1, 4, 4), -600, np.int16)
    view = look(hu.shape, (1, 1, 1), size=40)
    assert (paint(view, hu) == 128).all()


def test_tint_mixes_by_its_opacity_and_elsewhere_changes_nothing(scan):
    mask = np.zeros(scan.shape, bool)
    mask[3, 10:20, 5:9] = True
    view = look(scan.shape, scan.spacing, index=3, size=40)  # 30 x 40 voxels on 30 x 40 pixels
    plain, tinted = paint(view, scan.hu), paint(view, scan.hu, overlays=[Tint(mask, (255, 0, 0), 1.0)])
    assert (tinted[mask[3]] == (255, 0, 0)).all() and (tinted[~mask[3]] == plain[~mask[3]][:, None]).all()
    half = paint(view, scan.hu, overlays=[Tint(mask, (255, 0, 0), 0.5)]).astype(float)
    assert np.abs(half[mask[3]][:, 1] - plain[mask[3]] * (1 - 128 / 255)).max() <= 1.01
    assert (paint(look(scan.shape, scan.spacing, index=4, size=40), scan.hu, overlays=[Tint(mask)])[..., 0] == paint(look(scan.shape, scan.spacing, index=4, size=40), scan.hu)).all()


def test_heat_cells_lie_where_they_say():
    values = np.zeros((5, 3, 4))
    values[2, 1, 2] = 1
    shape = (5, 40, 50)
    heat = Heat(values, start=(0, 16, 16), step=(1, 4, 4))
    for plane, index in (("axial", 2), ("coronal", 20), ("sagittal", 24)):
        view = look(shape, (1, 1, 1), plane, index, size=50)
        levels, table = heat.sheet(view)
        hot = np.argwhere(levels == 255)
        found = {view.voxel((c + 0.5) * view.width / levels.shape[1], (r + 0.5) * view.height / levels.shape[0]) for r, c in hot}
        expected = {(2, y, x) for y in range(18, 22) for x in range(22, 26)}  # cell (1, 2) is centred at (20, 24), between 17.5 and 21.5
        axis = PLANES[plane][0]
        assert found == {at for at in expected if at[axis] == index}
        assert table[0, 3] == 0 and (levels[0] == 0).all() or plane != "axial", "no cell near the border: transparent"
    none, _ = heat.sheet(look((9, 40, 50), (1, 1, 1), index=8, size=50))
    assert not none.any(), "a slice without a cell is transparent"


def test_heat_without_start_fills_the_volume_evenly():
    values = np.arange(8.0).reshape(2, 2, 2)
    levels, _ = Heat(values, 0, 7).sheet(look((4, 6, 8), (1, 1, 1), index=3, size=8))
    assert len(np.unique(levels[:3, :4])) == 1 and len(np.unique(levels)) == 4 and levels[0, 0] < levels[5, 7] == 255


def test_heat_takes_nan_flat_range_and_other_colours():
    values = np.full((1, 2, 2), np.nan)
    values[0, 0, 0] = 3
    levels, table = Heat(values, 3, 3, cmap="viridis", fade=False, alpha=0.4).sheet(look((1, 2, 2), (1, 1, 1), size=2))
    assert levels[1, 1] == 0 and levels[0, 0] >= 1 and (table[1:, 3] == 102).all()


def test_difference_is_red_above_blue_below_clear_elsewhere():
    before = np.full((1, 1, 5), -800, np.int16)
    after = before + np.array([0, 150, -150, 1, 4000], np.int16)
    view = look(before.shape, (1, 1, 1), size=5)
    picture = paint(view, before, overlays=[Difference(before, after)]).astype(int)[0]
    assert (picture[0] == paint(view, before)[0, 0]).all()
    assert picture[1, 0] > picture[1, 2] + 100 and picture[2, 2] > picture[2, 0] + 100 and picture[3, 0] > picture[3, 2] and (picture[4] == picture[1]).all()
    extreme = Difference(np.full((1, 1, 1), -32768, np.int16), np.full((1, 1, 1), 32767, np.int16))
    assert extreme.sheet(look((1, 1, 1), (1, 1, 1), size=1))[0][0, 0] == 255, "no overflow of int16"


@pytest.mark.parametrize("plane", PLANES)
def test_box_outline_surrounds_exactly_its_voxels(plane):
    shape, box = (12, 16, 20), ((3, 7), (4, 9), (6, 11))
    axis, rows, cols = PLANES[plane]
    view = look(shape, (1, 1, 1), plane, index=box[axis][0], size=10 * max(shape[rows], shape[cols]))
    picture = paint(view, np.full(shape, -2000, np.int16), overlays=[Boxes([box], (255, 0, 0))])
    v, u = np.nonzero(picture[..., 0] > 200)
    first, last = view.voxel(u.min() + 0.5, v.min() + 0.5), view.voxel(u.max() + 0.5, v.max() + 0.5)
    for a in (rows, cols):
        assert {first[a], last[a]} == {box[a][0], box[a][1] - 1}
    assert (u.max() - u.min() + 1, v.max() - v.min() + 1) == (10 * (box[cols][1] - box[cols][0]), 10 * (box[rows][1] - box[rows][0]))
    beyond = look(shape, (1, 1, 1), plane, index=box[axis][1], size=200)
    assert paint(beyond, np.full(shape, -2000, np.int16), overlays=[Boxes([box])]).max() == 0


def test_mark_points_at_the_voxel_without_covering_it_and_fades():
    hu, at = np.full((30, 40, 40), -2000, np.int16), (10, 20, 9)
    def drawn(index): return paint(look(hu.shape, (2, 1, 1), index=index, size=400), hu, overlays=[Marks([at])])
    v, u = np.nonzero(drawn(10).any(2))
    assert (round((u.min() + u.max()) / 2), round((v.min() + v.max()) / 2)) == (95, 205)
    assert not drawn(10)[200:210, 90:100].any(), "the voxel itself stays free"
    assert 0 < drawn(12).max() < drawn(10).max() and drawn(20).max() == 0


def test_ruler_has_the_right_length_and_letters_follow_the_direction():
    hu = np.full((4, 200, 200), -2000, np.int16)
    view = look(hu.shape, (2, 0.5, 0.5), size=400)  # 4 pixels a mm
    picture = paint(view, hu, overlays=[Ruler()])
    assert 199 <= (picture[390:393, :, 0] == 200).any(0).sum() <= 201 or 79 <= (picture[390:393, :, 0] == 200).any(0).sum() <= 81  # 50 or 20 mm
    plain, turned = (paint(view, hu, overlays=[Ruler(d)]) for d in (np.eye(3), np.diag([-1.0, -1.0, 1.0])))
    assert (plain[:, :30] != turned[:, :30]).any() and (plain[:30] != turned[:30]).any()


def test_tiny_pictures_are_drawn_without_ruler():
    assert not paint(look((1, 3, 3), (1, 1, 1), size=20), np.full((1, 3, 3), -2000, np.int16), overlays=[Ruler(np.eye(3))]).any()


def test_window_without_width_is_refused(scan):
    with pytest.raises(ScanError, match="width"):
        paint(look(scan.shape, scan.spacing), scan.hu, 40, 0)


# ---- PNG

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 3, 4]), st.integers(0, 99))
def test_png_is_exact(height, width, channels, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, channels) if channels else (height, width), dtype=np.uint8)
    assert (decode(png_bytes(picture)) == picture).all()


def test_png_of_levels_has_their_colours():
    rng = np.random.default_rng(0)
    levels, table = rng.integers(0, 7, (9, 5), dtype=np.uint8), rng.integers(0, 256, (7, 4), dtype=np.uint8)
    assert (decode(png_bytes(levels, table), "RGBA") == table[levels]).all()
    assert (decode(png_bytes(levels[:, ::-1], table), "RGBA") == table[levels[:, ::-1]]).all(), "views of arrays too"


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8)])
def test_png_refuses(bad):
    with pytest.raises(UsageError, match="uint8"):
        png_bytes(bad)


def test_layers_laid_over_each_other_are_paint(scan):
    overlays = [Tint(scan.hu > 0), Heat(np.random.default_rng(1).random((12, 15, 20))), Boxes([((0, 12), (3, 9), (5, 9))]), Ruler(np.eye(3))]
    view = look(scan.shape, scan.spacing, index=5, size=160)
    grey, sheets, pens = layers(view, scan.hu, *LUNG, overlays)
    picture = Image.open(io.BytesIO(png_bytes(grey))).convert("RGBA")
    for levels, table in sheets:
        picture.alpha_composite(Image.open(io.BytesIO(png_bytes(levels, table))).convert("RGBA").resize(picture.size, Image.Resampling.NEAREST))
    picture.alpha_composite(Image.open(io.BytesIO(png_bytes(pens))))
    assert (np.asarray(picture.convert("RGB")) == paint(view, scan.hu, *LUNG, overlays)).all()


def test_stills_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    data = still([noise] * 3, ["a", "b"])
    assert len(data) < 100_000 and decode(data, "RGB").shape[2] == 3


# ---- the widget without a browser

def test_a_move_draws_once(viewer, monkeypatch):
    drawn = []
    original = viewer_module.viewer_frames
    monkeypatch.setattr(viewer_module, "viewer_frames", lambda v: drawn.append(v.index) or original(v))
    for change, count in ((lambda: setattr(viewer.controls["slice"], "value", 2), 1), (lambda: setattr(viewer, "index", 7), 1), (lambda: setattr(viewer, "plane", "coronal"), 1),
                          (lambda: setattr(viewer.controls["plane"], "value", "sagittal"), 1), (lambda: setattr(viewer, "zoom", 2), 1), (lambda: setattr(viewer, "at", (3, 4, 5)), 1),
                          (lambda: setattr(viewer.controls["window"], "value", "bone"), 1), (lambda: setattr(viewer, "window", SOFT), 1), (lambda: setattr(viewer, "index", viewer.index), 0)):
        drawn.clear()
        change()
        assert len(drawn) == count


def test_panes_show_the_same_slice_of_their_own_volume(viewer):
    viewer.index = 4
    view = viewer_view(viewer, viewer.size)
    for pane, frame in zip(viewer.panes, viewer.screen.frames):
        assert (decode(frame["png"]) == paint(view, pane.scan.hu)).all()
        assert frame["title"] in ("one", "two") and "slice 4 of 12" in frame["alt"] and (frame["width"], frame["height"]) == (view.width, view.height)
    assert viewer.screen.frames[0]["png"] != viewer.screen.frames[1]["png"]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("zoom", [1, 2, 4])
def test_click_reaches_state_and_callback(scan, plane, zoom):
    seen = []
    viewer = SliceViewer(scan, plane=plane, zoom=zoom, at=(3, 14, 22), size=231, on_click=seen.append)
    axis, rows, cols = PLANES[plane]
    target = list((3, 14, 22))
    target[cols] += 1
    view = viewer_view(viewer, viewer.size)
    u, v = view.pixel(target)
    on_event(viewer, {"kind": "click", "pane": 0, "x": u / view.width, "y": v / view.height})
    assert seen == [tuple(target)] and viewer.at == tuple(target)
    assert ", ".join(map(str, target)) in viewer.status.value and f"{scan.hu[tuple(target)]} HU" in viewer.status.value


def test_click_outside_by_rounding_is_the_border(viewer):
    on_event(viewer, {"kind": "click", "pane": 0, "x": 1.002, "y": -0.001})
    assert viewer.at == (viewer.index, 0, 39)


def test_keys_and_wheel(viewer):
    viewer.index = 5
    on_event(viewer, {"kind": "step", "n": 2})
    assert viewer.index == 7 == viewer.controls["slice"].value
    on_event(viewer, {"kind": "step", "n": 100000})
    assert viewer.index == 11
    on_event(viewer, {"kind": "step", "n": -100000})
    assert viewer.index == 0
    for key, zoom in (("+", 2), ("=", 4), ("+", 4), ("-", 2), ("-", 1), ("-", 1), ("q", 1)):
        on_event(viewer, {"kind": "key", "key": key})
        assert viewer.zoom == zoom
    on_event(viewer, {"kind": "key", "key": "s"})
    assert viewer.plane == "sagittal" and viewer.controls["slice"].max == 39 and viewer.index == 19


def test_a_plane_opens_at_the_marked_place(viewer):
    viewer.at = (2, 9, 33)
    for plane, index in (("coronal", 9), ("sagittal", 33), ("axial", 2)):
        viewer.plane = plane
        assert viewer.index == index == viewer.controls["slice"].value


def test_linked_viewers(scan):
    one, two = SliceViewer(scan, size=60), SliceViewer(scan, size=60)
    traitlets.link((one, "index"), (two, "index"))
    one.controls["slice"].value = 9
    assert two.index == 9 and "slice 9" in two.screen.frames[0]["alt"]


def test_a_window_without_a_name_can_be_set(viewer, scan):
    viewer.window = (0, 100)
    assert viewer.controls["window"].value is None and viewer.window == (0, 100)
    viewer.controls["window"].value = "lung"
    assert viewer.window == LUNG
    assert "0 / 100" in SliceViewer(scan, window=(0, 100), size=50).controls["window"].options


def test_panes_can_be_exchanged(viewer, scan):
    viewer.panes = (Pane(scan, "only"),)
    assert [f["title"] for f in viewer.screen.frames] == ["only"]
    with pytest.raises(UsageError, match="grids"):
        viewer.panes = (Pane(scan), Pane(Scan(scan.hu[:5], scan.spacing)))


@pytest.mark.parametrize("bad", [[], np.zeros((3, 4, 5), np.int16), None, ["scan"]])
def test_viewer_refuses_what_is_no_scan(bad):
    with pytest.raises(UsageError, match="Scan"):
        SliceViewer(bad)


def test_viewer_refuses_bad_options(scan):
    with pytest.raises(PlaceError, match="outside"):
        SliceViewer(scan, at=(12, 0, 0))
    with pytest.raises(UsageError, match="axial"):
        SliceViewer(scan, plane="front")
    with pytest.raises(UsageError, match="1, 2 or 4"):
        SliceViewer(scan, zoom=3)
    with pytest.raises(ScanError, match="width"):
        SliceViewer(scan, window=(40, 0))


def test_panes_of_another_size_bring_their_own_slider(scan):
    viewer = SliceViewer(Pane(scan, "one"), size=100)
    last = viewer.controls["slice"].max
    viewer.at = tuple(n - 1 for n in scan.shape)
    viewer.panes = [Pane(scan.with_hu(scan.hu + 1), "same grid")]
    assert viewer.at is not None and viewer.controls["slice"].max == last
    viewer.panes = [Pane(Scan(scan.hu[:2, :30, :30], scan.spacing), "smaller")]
    assert viewer.at is None and viewer.controls["slice"].max == 1 and viewer.index <= 1 and len(viewer.screen.frames) == 1
    viewer.panes = [Pane(scan, "back")]
    assert viewer.controls["slice"].max == last
    for outside in ((99, 0, 0), (0, -1, 0)):
        with pytest.raises(PlaceError, match="outside the volume"): viewer.at = outside
    assert viewer.at is None


def test_one_slice_is_enough():
    viewer = SliceViewer(Scan(np.zeros((1, 20, 20), np.float32), (5, 1, 1)), size=60)
    assert viewer.controls["slice"].disabled and len(viewer.screen.frames) == 1
    viewer.plane = "coronal"
    assert viewer.controls["slice"].max == 19 and not viewer.controls["slice"].disabled


def test_titles_are_text(scan):
    viewer = SliceViewer(Pane(scan, "<script>alert(1)</script>"), at=(0, 0, 0), size=60)
    assert "<script>" not in viewer.status.value


def test_screen_answers_even_when_the_callback_fails(monkeypatch):
    screen, sent = Screen(), []
    monkeypatch.setattr(screen, "send", lambda content, buffers=None: sent.append(content))
    screen.listen(lambda event: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        screen._msg_callbacks.callbacks[0](screen, {"kind": "step", "n": 1}, [])
    assert sent == [{"kind": "done"}]


def test_output_without_a_front_end_is_a_picture(viewer):
    assert not has_front_end()
    data = viewer._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"} and decode(base64.b64decode(data["image/png"]), "RGB").shape[1] > 400


def test_output_with_a_front_end_has_both(monkeypatch, viewer):
    monkeypatch.setattr(viewer_module, "has_front_end", lambda: True)
    assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(viewer._repr_mimebundle_())
    assert bundle({}, b"x", "words") == {"text/plain": "words", "image/png": "eA=="}


@pytest.mark.parametrize("name", ["05_viewer", "08_attack.tamper"])
def test_chapters_with_widgets_show_pictures_and_no_dead_widget(name):
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    data = [o.get("data", {}) for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    assert not any("application/vnd.jupyter.widget-view+json" in d for d in data)
    assert any("needs a running kernel" in "".join(d.get("text/plain", "")) and "image/png" in d for d in data), "execute the chapter: its widget shows a still"
