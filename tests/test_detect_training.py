"Training set of the detector: rounds of forgeries, patches, perturbations; the shipped weights against the forger on a real scan."
from dataclasses import replace

import numpy as np
import pytest
import torch

from mits_nb.core import TrainError, UsageError, from_preset
from mits_nb.detect.cascade import Cascade, slice_truth
from mits_nb.detect.cnn import FORGED, PAIRED
from mits_nb.detect.training import (CONTROLS, Source, TrainingConfig, build_patches, disguised, far_apart, forge_round, forge_set, forged_copy, forged_pair, forged_slices, honest_twin, lung_candidates, painted,
                                      passed_on, pasted_back, patches_of, perturbed_scan, place_scores, rescanned, score_at, summary, train_cascade)
from mits_nb.scan import Scan


class Forger:
    "Fills a cube with a constant: nothing is trained, everything is quick."
    def tamper(self, scan, at, action="inject", seed=0):
        from mits_nb.attack.tamper import tamper
        return tamper(scan, at, lambda cond: torch.full_like(cond, .1 if action == "inject" else -.3), action, seed=seed)


@pytest.fixture(scope="module")
def source(phantom):
    scan, nodules = phantom
    return Source.of("phantom", scan, [n.centre_voxel for n in nodules])


def test_truth_of_a_forged_scan(source):
    forged = forge_round(source.scan, Forger(), 1, 3, source.mask, np.zeros((0, 3), int))
    note, = [n for n in forged.history if n["kind"] == "forged"]
    truth = slice_truth(forged)
    changed = (forged.hu != source.scan.hu).any((1, 2))
    assert truth[round(note["at"][0])] and truth.sum() == 9 and (changed | ~truth).all() and not slice_truth(source.scan).any()


def test_places_of_a_round_do_not_touch(source):
    forged = forge_round(source.scan, Forger(), 4, 1, source.mask, source.nodules)
    places = np.array([n["at"] for n in forged.history if n["kind"] == "forged"])
    assert {n["action"] for n in forged.history} == {"inject", "remove"} and len(places) >= 2
    for i, a in enumerate(places):
        for b in places[:i]: assert (abs(a - b) * source.scan.spacing).max() >= 34
    assert len(far_apart(np.zeros((5, 3)), (1, 1, 1), 5)) == 1


def test_patches_pair_forged_with_honest(source):
    forged = forge_round(source.scan, Forger(), 2, 1, source.mask, source.nodules)
    patches = patches_of(source.scan, forged, 3, 0, source.mask)
    after, before = (patches.hu[patches.kind == k] for k in (FORGED, PAIRED))
    assert len(after) == len(before) > 0 and all((a != b).any() for a, b in zip(after, before))
    again = patches_of(source.scan, forged, 3, 0, source.mask)
    assert np.array_equal(again.hu, patches.hu) and np.array_equal(again.kind, patches.kind)


def test_perturbation_is_small_repeatable_and_spares_padding():
    hu = np.full((3, 64, 64), -850, np.int16)
    hu[:, :5] = -2048
    scan = Scan(hu, (2.5, .7, .7))
    a, b = perturbed_scan(scan, 4), perturbed_scan(scan, 4)
    difference = a.hu.astype(int) - hu
    assert np.array_equal(a.hu, b.hu) and a.hu.dtype == np.int16 and (difference[:, :5] == 0).all()
    assert difference.any((1, 2)).all() and abs(difference).max() < 40 and not np.array_equal(difference[0], difference[1])
    assert not np.array_equal(a.hu, perturbed_scan(scan, 5).hu)


def test_shipped_cascade_tells_forged_slices_of_a_real_scan(data_dir):
    "Part of a scan that was never trained on; both forgers that the training has met."
    from mits_nb.attack.ctgan import CTGAN
    from mits_nb.metrics import roc_auc
    from mits_nb.scan import read_scan
    scan, cascade = read_scan(data_dir / "LIDC-IDRI-0003.mha"), Cascade.from_pretrained("cascade-tiny")
    source = Source.of("part", replace(scan, hu=scan.hu[8:30], source=None), [])
    rows = place_scores(cascade, source, [CTGAN.from_pretrained(name) for name in ("ctgan-tiny", "ctgan-zeros-tiny")], 4)
    auc = {way: roc_auc([r[way] for r in rows], [r["tampered"] for r in rows]) for way in ("alone", "p")}
    assert auc["p"] > .9 and auc["alone"] > .8, auc


# --- twins, treatments, controls ---

def test_another_scanner_is_another_grid_of_the_same_place(source):
    moved = next(r for r in (rescanned(source, s) for s in range(20)) if r.scan.shape != source.scan.shape)
    assert moved.scan.shape[0] == source.scan.shape[0] and moved.mask.shape == moved.scan.shape and moved.scan.hu.dtype == np.int16
    extent = [n * s for n, s in zip(source.scan.shape, source.scan.spacing)]
    assert np.allclose([n * s for n, s in zip(moved.scan.shape, moved.scan.spacing)], extent, rtol=1e-6)
    inside = moved.scan.hu[moved.mask].mean(), source.scan.hu[source.mask].mean()
    assert abs(inside[0] - inside[1]) < 40 and not moved.scan.history
    for nodule, old in zip(moved.nodules, source.nodules): assert np.allclose(nodule * moved.scan.spacing, old * source.scan.spacing, atol=2)
    assert np.array_equal(moved.scan.hu, rescanned(source, next(s for s in range(20) if rescanned(source, s).scan.shape == moved.scan.shape)).scan.hu)


def test_twins_come_in_their_shares(source):
    class Wall:
        name = "wall"
        def protect(self, scan, seed, again=False): return scan.with_hu(scan.hu + 7)
    shares = dict(perturbed=0., rescanned=0., protected=0.)
    def twin(**changes): return honest_twin(source, from_preset(TrainingConfig, "tiny", **(shares | changes)), [Wall()], 3)
    assert twin() is source
    assert 1 <= abs(twin(protected=1.).scan.hu.astype(int) - source.scan.hu).max() <= 7
    assert np.array_equal(twin(perturbed=1.).scan.hu, perturbed_scan(source.scan, 3, 60).hu) and np.array_equal(twin(rescanned=1.).scan.hu, rescanned(source, 3).scan.hu)


def test_what_is_passed_on_is_treated_alike_and_keeps_its_history(source):
    forged = forge_round(source.scan, Forger(), 1, 3, source.mask, np.zeros((0, 3), int))
    box, = [tuple(slice(*b) for b in n["box"]) for n in forged.history]
    for seed in range(6): # every kind of treatment
        before, after = passed_on(source.scan, seed).hu.copy(), passed_on(forged, seed)
        assert after.history == forged.history and (after.hu != forged.hu).any()
        different = before != after.hu
        different[tuple(slice(max(0, b.start - 4), b.stop + 4) for b in box)] = False
        assert not different.any()


def test_before_and_after_differ_by_the_forgery_alone(source):
    config = from_preset(TrainingConfig, "tiny", disguised=0.)
    for seed in range(5):
        before, after = forged_pair(source, [Forger()], config, seed, places=2)
        different = before.scan.hu != after.hu
        assert different.any() and len([n for n in after.history if n["kind"] == "forged"]) == 2
        for n in after.history:
            if n["kind"] == "forged": different[tuple(slice(max(0, a - 4), b + 4) for a, b in n["box"])] = False
        assert not different.any()


def test_a_disguise_leaves_the_forger_as_it_is():
    from mits_nb.attack.ctgan import CTGAN
    forger = CTGAN.from_pretrained("ctgan-tiny")
    seen = {(d.settings.mask, d.settings.paste, d.settings.touch_up) for d in (disguised(forger, s) for s in range(20))}
    assert len(seen) == 5 and forger.settings.mask == 20 and forger.settings.touch_up == "ours"


def test_as_many_candidates_as_asked_for(source):
    assert len(lung_candidates(source.scan, source.mask, 0)) <= 60
    assert len(lung_candidates(source.scan, source.mask, 0, 3)) == 3 and len(lung_candidates(source.scan, source.mask, 0, 90)) in (90, 60, 20, 5, 1)


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_changes_the_grain_of_one_cuboid_only(source, kind):
    from mits_nb.attack.tamper import cuboid_box
    at = tuple(int(v) for v in lung_candidates(source.scan, source.mask, 0)[0])
    control = pasted_back(source.scan, at, kind)
    different = control.hu != source.scan.hu
    assert different.any() and np.array_equal(control.hu, pasted_back(source.scan, at, kind).hu)
    different[tuple(slice(*b) for b in cuboid_box(at, source.scan.spacing, source.scan.shape, 32))] = False
    assert not different.any()
    with pytest.raises(UsageError, match="not known"): pasted_back(source.scan, at, "soft")


def test_slices_come_in_pairs(source):
    slices = forged_slices([("a", lambda: source, 3), ("b", lambda: source, 1)], [Forger()], seed=2, slices=3)
    assert slices.tampered.tolist() == [True, False] * (len(slices) // 2) and set(slices.scan) == {0, 1}
    assert (slices.action[~slices.tampered] == "").all() and set(slices.action[slices.tampered]) == {"inject", "remove"}
    inject, remove = slices.only("inject"), slices.only("remove")
    assert len(inject) + len(remove) == len(slices) and set(inject.action) == {"inject", ""} and inject.tampered.mean() == .5
    again = forged_slices([("a", lambda: source, 3), ("b", lambda: source, 1)], [Forger()], seed=2, slices=3)
    assert all(np.array_equal(x, y) for x, y in zip(slices.hu, again.hu))
    brighter = forged_slices([("a", lambda: source, 1)], [Forger()], 2, 3, treat=lambda scan, seed: scan.with_hu(scan.hu + 1))
    assert all(np.array_equal(x, y + 1) for x, y in zip(brighter.hu, slices.hu))


def test_slices_are_judged_alone_and_with_their_neighbours(source):
    class Judge:
        "Sees how many voxels of a slice are brighter than in the scan that was never forged."
        from mits_nb.detect.cascade import CascadeConfig
        config = CascadeConfig(depth_mm=2.5 * 3)
        def heatmap(self, hu):
            self.asked = getattr(self, "asked", 0) + len(hu)
            known = {one.tobytes() for one in source.scan.hu}
            return np.array([.01 if one.tobytes() in known else .9 for one in hu], np.float32)[:, None, None] * np.ones((1, 3, 3), np.float32)
        def slice_probability(self, maps): return maps.max((1, 2))
    judge = Judge()
    rows = place_scores(judge, source, [Forger()], 4, slices=3)
    assert len(rows) == 24 and [r["tampered"] for r in rows] == [True, False] * 12 and {r["action"] for r in rows} == {"inject", "remove"}
    forged = [r for r in rows if r["tampered"]]
    assert all(r["alone"] > .8 and r["p"] > .8 for r in forged) and all(r["alone"] < .1 and r["p"] < .1 for r in rows if not r["tampered"])
    assert judge.asked < len(source.scan.hu) + 4 * 13 # the honest scan once, and of each forged copy the slices around the place
    assert rows == place_scores(Judge(), source, [Forger()], 4, slices=3)


def test_a_summary_counts_every_way_and_adds_scans_up():
    def scan(p, tp, fp, fn, called): return {"scan": p, "regions": {"tp": tp, "fp": fp, "fn": fn}, "alarms": {"untouched": [called, 10, fp]}}
    paired = [{"alone": a, "p": p, "tampered": t} for a, p, t in ((.9, .8, True), (.2, .7, True), (.6, .3, False), (.1, .1, False))]
    found = summary([scan([(.9, True), (.1, False)], 1, 0, 0, 2), scan([(.2, True), (.6, False)], 0, 1, 1, 3)], paired)
    assert found["paired"] == {"accuracy": 1., "precision": 1., "recall": 1., "f1": 1., "auc": 1., "slices": 4}
    assert found["alone"] == {"accuracy": .5, "precision": .5, "recall": .5, "f1": .5, "auc": .75, "slices": 4}
    assert found["scan"] == {"accuracy": .5, "precision": .5, "recall": .5, "f1": .5, "auc": .75, "slices": 4}
    assert found["regions"] == {"tp": 1, "fp": 1, "fn": 1} and found["alarms"] == {"untouched": {"slices_called": 5, "slices": 20, "regions": 1}}


def test_no_forger_does_not_mean_the_shipped_ones(tmp_path):
    with pytest.raises(UsageError, match="no forger to make the set"): forge_set("all", tmp_path / "s", attackers=[])
    with pytest.raises(UsageError, match="no forger to learn from"): train_cascade("tiny", tmp_path / "c", attackers=[], protectors=[], data=())


def test_lessons_and_strangers_have_their_share_of_coarse_phantoms(tmp_path, monkeypatch):
    from mits_nb.detect import training
    class Enough(Exception): pass
    met = []
    monkeypatch.setattr(training, "phantom_source", lambda seed, shape, coarse: met.append((seed, coarse)))
    def first(learn, attackers, config, first, seed, work, protectors, strangers):
        for _, load, *_ in [*learn, *strangers]: load()
        raise Enough
    monkeypatch.setattr(training, "train_first_stage", first)
    with pytest.raises(Enough): train_cascade("tiny", tmp_path / "c", attackers=[Forger()], protectors=[], data=(), phantoms=10, strangers=5)
    assert len({seed for seed, _ in met}) == 15 and sum(coarse for _, coarse in met[:10]) == 4 and sum(coarse for _, coarse in met[10:]) == 2
    monkeypatch.undo()
    fine, coarse = (training.phantom_source(8, (4, 128, 128), coarse=c).scan for c in (False, True))
    assert coarse.shape == (4, 64, 64) and np.allclose(np.multiply(coarse.shape, coarse.spacing), np.multiply(fine.shape, fine.spacing)) and fine.shape == training.phantom_source(8, (4, 128, 128)).scan.shape


def test_score_and_mask_of_regions():
    regions = [{"centre_mm": (0., 0., 0.), "score": .7}, {"centre_mm": (10., 0., 0.), "score": .9}]
    assert score_at(regions, (1, 0, 0)) == .9 and score_at(regions, (-8, 0, 0)) == .7 and score_at(regions, (60, 0, 0)) == 0. == score_at([], (0, 0, 0))
    mask = painted([(5, 20, 20)], Scan(np.zeros((11, 40, 50), np.int16), (2.5, 1., 2.)), 20.)
    assert mask.sum() == 9 * 21 * 11 and mask[1:10, 10:31, 15:26].all()


def test_learning_from_scans_without_lung_is_an_error():
    empty = Source("air", Scan(np.full((6, 64, 64), -1000, np.int16), (2.5, 1., 1.)), np.zeros((6, 64, 64), bool), np.zeros((0, 3), int))
    plain = from_preset(TrainingConfig, "tiny", perturbed=0., rescanned=0., protected=0., passed_on=0.)
    with pytest.raises(TrainError, match="no place could be forged"): build_patches([("air", lambda: empty, 2)], [Forger()], plain)


def test_every_forger_removes_at_nodules_and_elsewhere_equally_often(source):
    class Named(Forger):
        def tamper(self, scan, at, action="inject", seed=0):
            seen.append((self, action, tuple(map(int, at)) in nodules))
            return super().tamper(scan, at, action, seed)
    nodules = {tuple(map(int, at)) for at in source.nodules}
    for n in (1, 2, 3, 4):
        seen, forgers = [], [Named() for _ in range(n)]
        for i in range(8 * n): forged_copy(source, i, forgers, 3)
        removed = [(forgers.index(who), where) for who, action, where in seen if action == "remove"]
        assert {(k, where): removed.count((k, where)) for k, where in removed} == {(k, where): 2 for k in range(n) for where in (True, False)}
