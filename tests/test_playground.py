"""The tamper playground without a browser: undo and redo bit by bit, errors in one line, the mark in every saved file."""
import numpy as np
import pytest

from mits_nb.attack.tamper import Forgeries, TamperPlayground, changed_box
from mits_nb.core import UsageError, WeightsError
from mits_nb.scan import Scan, read_scan

BALL = np.sqrt(sum(a ** 2 for a in np.ogrid[-2:3, -3:4, -3:4])) <= 3


@pytest.fixture
def scan():
    return Scan(np.random.default_rng(0).integers(-900, -800, (14, 40, 40)).astype(np.int16), (2.5, 1.0, 1.0))


def forger(scan, at, action, seed):
    "Sets a small ball, as a real forger would; near a border the ball is cut off."
    hu = scan.hu.copy()
    z, y, x = np.nonzero(BALL)
    places = np.stack([z, y, x], 1) - (2, 3, 3) + at
    places = places[((places >= 0) & (places < scan.shape)).all(1)]
    hu[tuple(places.T)] = (30 if action == "inject" else -850) + seed
    return scan.with_hu(hu, {"kind": "forged", "action": action, "at": list(map(float, at)), "seed": seed, "voxels_changed": len(places)})


@pytest.fixture
def playground(scan):
    lung = np.zeros(scan.shape, bool)
    lung[:, 5:35, 5:35] = True
    return TamperPlayground(scan, forger, at=(7, 20, 20), lung=lung, size=120)


def press(playground, name):
    playground.controls[name].click()


def test_changed_box_is_tight():
    before = np.zeros((5, 6, 7), np.int16)
    after = before.copy()
    assert changed_box(before, after) is None
    after[1, 2, 6] = after[3, 4, 0] = 1
    assert changed_box(before, after) == ((1, 4), (2, 5), (0, 7))


def test_undo_and_redo_are_exact(scan):
    work, states = Forgeries(scan), [scan]
    for i, at in enumerate([(3, 10, 10), (4, 12, 11), (0, 0, 0)]):  # overlapping, and at the corner
        work.add(forger(work.scan, at, "inject", i))
        states.append(work.scan)
    for state in states[-2::-1]:
        work.undo()
        assert np.array_equal(work.scan.hu, state.hu) and work.scan.history == state.history
    assert work.scan is scan, "all undone: the very scan, without a mark"
    with pytest.raises(UsageError, match="undo"):
        work.undo()
    for state in states[1:]:
        work.redo()
        assert np.array_equal(work.scan.hu, state.hu) and work.scan.history == state.history
    with pytest.raises(UsageError, match="redo"):
        work.redo()
    assert (work.before.hu == scan.hu).all() and not scan.history


def test_a_new_forgery_forgets_what_was_undone(scan):
    work = Forgeries(scan)
    work.add(forger(scan, (3, 10, 10), "inject", 0))
    work.undo()
    work.add(forger(scan, (9, 30, 30), "inject", 0))
    assert len(work.steps) == 1 and [n["at"] for n in work.scan.history] == [[9, 30, 30]]


def test_forgeries_refuse(scan):
    work = Forgeries(scan)
    with pytest.raises(UsageError, match="no voxel"):
        work.add(scan.with_hu(scan.hu, {"kind": "forged"}))
    for bad in (None, scan.hu, Scan(scan.hu[:5] + 1, scan.spacing)):
        with pytest.raises(UsageError, match="must give a Scan"):
            work.add(bad)
    assert work.scan is scan and not work.steps


def test_a_forger_that_leaves_no_mark_is_marked(scan):
    work = Forgeries(scan)
    work.add(scan.with_hu(scan.hu + np.int16(1)))
    assert work.scan.history[-1]["kind"] == "forged"


def test_buttons(playground, scan):
    assert playground.controls["undo"].disabled and playground.controls["save"].disabled
    playground.controls["seed"].value = 3
    press(playground, "inject")
    assert playground.scan.hu[7, 20, 20] == 33 and playground.scan.history[0]["seed"] == 3
    assert "inject at z, y, x = 7, 20, 20" in playground.message.value and "inject" in playground.log.value
    assert [f["title"] for f in playground.viewer.screen.frames] == ["before", "after", "difference"]
    before, after = (f["png"] for f in playground.viewer.screen.frames[:2])
    assert before != after
    press(playground, "undo")
    assert playground.scan is scan and "<s>" in playground.log.value and playground.controls["undo"].disabled and not playground.controls["redo"].disabled
    assert playground.viewer.screen.frames[1]["png"] == before
    press(playground, "redo")
    assert playground.viewer.screen.frames[1]["png"] == after
    press(playground, "remove")
    assert [n["action"] for n in playground.scan.history] == ["inject", "remove"] and not playground.viewer.screen.busy


def test_no_place_no_forgery(scan):
    playground = TamperPlayground(scan, forger, lung=np.ones(scan.shape, bool), size=60)
    press(playground, "inject")
    assert "No place is chosen" in playground.message.value and playground.forgeries.done == 0
    playground.controls["z"].value, playground.controls["y"].value, playground.controls["x"].value = 7, 20, 21
    press(playground, "inject")
    assert playground.viewer.at == (7, 20, 21) and playground.scan.history[0]["at"] == [7, 20, 21]


def test_views(playground):
    press(playground, "inject")
    for show in ("before", "after", "difference"):
        playground.controls["show"].value = show
        assert [f["title"] for f in playground.viewer.screen.frames] == [show]
    playground.controls["show"].value = "all"
    assert len(playground.viewer.screen.frames) == 3


def test_place_outside_the_lung_warns_and_still_works(playground):
    playground.viewer.at = (7, 2, 2)
    assert "Warning" in playground.message.value and "outside the lung" in playground.message.value
    assert [playground.controls[c].value for c in "zyx"] == [7, 2, 2]
    press(playground, "inject")
    assert playground.forgeries.done == 1 and "outside the lung" in playground.message.value
    playground.viewer.at = (7, 20, 20)
    assert playground.message.value == ""


@pytest.mark.parametrize("name, value", [("z", 14), ("y", -1), ("x", 4000)])
def test_place_outside_the_volume_is_one_line(playground, name, value):
    playground.controls[name].value = value
    assert "Error" in playground.message.value and "outside the volume" in playground.message.value
    press(playground, "inject")
    assert "Error" in playground.message.value and "Traceback" not in playground.message.value and playground.forgeries.done == 0
    assert not playground.viewer.screen.busy and not playground.controls["inject"].disabled


@pytest.mark.parametrize("error, words", [(WeightsError("the weights are cut short"), "the weights are cut short"), (RuntimeError("out of memory\nsecond line"), "out of memory"), (RuntimeError(), "no details")])
def test_a_forger_that_fails_is_one_line(scan, error, words):
    def fails(scan, at, action, seed): raise error
    playground = TamperPlayground(scan, fails, at=(7, 20, 20), lung=np.ones(scan.shape, bool), size=60)
    press(playground, "inject")
    assert words in playground.message.value and "second line" not in playground.message.value and playground.scan is scan
    assert not playground.viewer.screen.busy and not playground.controls["inject"].disabled and playground.controls["undo"].disabled


def test_busy_while_the_forger_works(scan):
    seen = []
    def slow(scan, at, action, seed):
        seen.append((playground.viewer.screen.busy, playground.controls["inject"].disabled, playground.message.value))
        return forger(scan, at, action, seed)
    playground = TamperPlayground(scan, slow, at=(7, 20, 20), lung=np.ones(scan.shape, bool), size=60)
    press(playground, "inject")
    assert seen[0][:2] == (True, True) and "Injecting" in seen[0][2] and not playground.viewer.screen.busy


@pytest.mark.parametrize("name", ["series", "forged.mha", "forged.nii.gz"])
def test_saved_scans_carry_the_mark(playground, tmp_path, name):
    press(playground, "inject")
    playground.controls["path"].value = str(tmp_path / name)
    press(playground, "save")
    assert "Saved" in playground.message.value and "marked" in playground.message.value
    back = read_scan(tmp_path / name)
    assert np.array_equal(back.hu, playground.scan.hu) and "forge" in str(back.meta["marker"]).lower()


def test_saving_problems_are_one_line(playground, tmp_path):
    with pytest.raises(UsageError, match="nothing to save"):
        playground.save(tmp_path / "x.mha")
    press(playground, "inject")
    (tmp_path / "file").write_text("in the way")
    playground.controls["path"].value = str(tmp_path / "file" / "below.mha")
    press(playground, "save")
    assert "Error" in playground.message.value and "Traceback" not in playground.message.value


def test_objects_with_tamper_and_bad_forgers(scan):
    class Network:
        def tamper(self, scan, at, action="inject", seed=0): return forger(scan, at, action, seed)
    playground = TamperPlayground(scan, Network(), lung=np.ones(scan.shape, bool), size=60)
    assert playground.run("inject", (5, 10, 10)).hu[5, 10, 10] == 30 and playground.viewer.at == (5, 10, 10)
    with pytest.raises(UsageError, match="forger"):
        TamperPlayground(scan, 3)
    with pytest.raises(UsageError, match="mask"):
        TamperPlayground(scan, forger, lung=np.ones((2, 2, 2), bool))


def test_output_is_a_picture_without_a_front_end(playground):
    assert set(playground._repr_mimebundle_()) == {"text/plain", "image/png"}
