"""Measuring protection: zeros that must be zero, intervals by patient, stored sweeps, and the slider without a browser."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mits_nb.core import DataError, PlaceError, UsageError
from mits_nb.protect.sweep import (AlphaSweep, CLEANING_TESTS, PAPER_ALPHAS, Scaled, Sweep, WIDER_ALPHAS, cleaning_table, decibels, forge_crop, front_figure, measure_protection,
                                   noise_spectra, patient_interval, pick_cleanings, protected_twin, protection_table, protector_name, side_effects, sweep, sweep_figure)
from mits_nb.scan import Scan

SPACING = (2.5, 1.0, 1.0)
PLACES = np.array([[7, 40, 40], [8, 44, 60]])


class Forger:
    "Sets a ball of 12 mm whose HU follow the mean of what lies around it; a removal writes that mean itself."

    def __init__(self):
        self.calls, self.places = 0, []

    def tamper_tensor(self, hu, at, spacing, action):
        self.calls, self.places = self.calls + 1, [*self.places, tuple(at)]
        far = sum((torch.arange(n).view([-1 if a == axis else 1 for a in range(3)]) - c).float().mul(s).square() for axis, (n, c, s) in enumerate(zip(hu.shape, at, spacing)))
        ball, rim = far < 36, (far >= 36) & (far < 150)
        level = hu[rim].mean() + 3 * (hu[rim] - hu[rim].mean()).std()
        return torch.where(ball, level + (900 if action == "inject" else 0), hu)


class Checks:
    "Adds a checkerboard: all of it dies in a blur of two pixels."
    name = "checks"

    def __init__(self, hu=40):
        self.hu, self.seeds = hu, []

    def protect(self, scan, seed=0):
        self.seeds.append(seed)
        board = np.indices(scan.shape[1:]).sum(0) % 2 * 2 - 1
        return scan.with_hu(scan.hu + (self.hu * board).astype(scan.hu.dtype), {"kind": "protected"})


class Nothing:
    name = "nothing"

    def protect(self, scan, seed=0):
        return scan


@pytest.fixture(scope="module")
def scan():
    return Scan(np.random.default_rng(0).normal(-850, 20, (15, 90, 100)).round().astype(np.int16), SPACING)


@pytest.fixture(scope="module")
def result(scan):
    return sweep({f: Scaled(Checks(), f) for f in (0.5, 1.0, 2.0)}, Forger(), scan, PLACES, ("nothing", "blur 0.7"), knob="strength", edge=32)


def test_rows_for_every_combination_and_nothing_loses_nothing(scan):
    forger = Forger()
    rows = measure_protection([Nothing(), Checks()], forger, scan, PLACES, ("blur 0.7", "noise"), patient="p", extra={"attacker": "toy"})
    assert len(rows) == 2 * 2 * 3 * 2 and {r["cleaning"] for r in rows} == {"nothing", "blur 0.7", "noise"} and {r["attacker"] for r in rows} == {"toy"}
    assert forger.calls == 2 * 3 * 2 * (1 + 2), "the unprotected forgery is made once for both protectors"
    for r in rows:
        if r["protector"] == "nothing": assert r["lost_db"] == r["from_goal_hu"] == 0 and r["slice_psnr_db"] == 99 and r["slice_ssim"] == 1 and r["lesion"] == r["lesion_unprotected"]
        else: assert r["slice_rmse_hu"] == pytest.approx(40) and r["slice_psnr_db"] == pytest.approx(20 * np.log10(4096 / 40), abs=0.01)
        assert r["place_psnr_db"] == (99 if r["protector"] == "nothing" else pytest.approx(r["slice_psnr_db"], abs=0.01))
        assert r["lost_db"] == pytest.approx(r["unprotected_db"] - r["protected_db"]) and (r["lesion"] is None) == (r["action"] == "remove")
    worst = [r["lost_db"] for r in rows if r["protector"] == "checks" and r["cleaning"] == "nothing" and r["action"] == "remove"]
    cleaned = [r["lost_db"] for r in rows if r["protector"] == "checks" and r["cleaning"] == "blur 0.7" and r["action"] == "remove"]
    assert min(worst) > 1 > 0.5 > max(np.abs(cleaned)), "a blur removes a checkerboard, and with it the protection"


def test_the_row_says_what_the_metrics_say(scan):
    from mits_nb.metrics import psnr, square

    row = next(r for r in measure_protection(Checks(), Forger(), scan, PLACES[:1]) if r["action"] == "inject")
    at = tuple(PLACES[0])
    fake = [Forger().tamper_tensor(torch.from_numpy(s.hu.astype(np.float32)), tuple(map(float, at)), SPACING, "inject").round().numpy() for s in (scan, Checks().protect(scan))]
    where = square(at, scan.shape)
    real = scan.hu[where].astype(np.float32)
    before, after = (psnr(real, f[where], float(np.ptp(real))) for f in fake)
    assert row["unprotected_db"] == pytest.approx(before, abs=0.05) and row["protected_db"] == pytest.approx(after, abs=0.05)
    assert row["lesion_unprotected"] is True


def test_same_as_the_smaller_measurement_of_chapter_11(scan):
    from mits_nb.protect.mitsgan import evaluate_protection

    small = evaluate_protection(Checks().protect, Forger(), scan, PLACES[:1])
    large = measure_protection(Checks(), Forger(), scan, PLACES[:1])
    for a, b in zip(small, large): assert a["action"] == b["action"] and a["lost_db"] == pytest.approx(b["lost_db"], abs=0.02) and a["from_goal_hu"] == pytest.approx(b["from_goal_hu"], abs=0.6)


def test_measurement_depends_on_the_seed_alone_and_hands_it_on(scan):
    protector = Checks()
    first, again, other = (measure_protection(protector, Forger(), scan, PLACES[:1], ("noise",), seed=s) for s in (1, 1, 2))
    assert first == again != other and protector.seeds == [1, 1, 2]


def test_shift_moves_the_place_and_not_the_picture(scan):
    forger = Forger()
    measure_protection(Checks(), forger, scan, PLACES[:1], ("shift",), actions=("remove",))
    plain, moved = forger.places[:2], forger.places[2:]
    assert plain[0] == plain[1] and moved[0] == moved[1] != plain[0] and np.abs(np.subtract(plain[0], moved[0])).max() <= 0.5
    edge = np.zeros((3, 20, 20), np.float32)
    start, _ = forge_crop(Forger(), edge, (0.0, 0.0, 19.0), SPACING, ("remove",), CLEANING_TESTS["shift"], torch.Generator().manual_seed(1))
    assert np.array_equal(start, edge)


def test_own_cleanings_and_functions_as_protectors(scan):
    def double(s): return Checks(80).protect(s)
    rows = measure_protection(double, Forger(), scan, PLACES[:1], {"flat": lambda hu, spacing, generator: hu * 0 - 850}, actions=("remove",))
    assert [r["cleaning"] for r in rows] == ["nothing", "flat"] and rows[1]["lost_db"] == 0 and rows[0]["protector"] == "double"


@pytest.mark.parametrize("call, error, words", [
    (lambda s: measure_protection([], Forger(), s, PLACES), UsageError, "nothing to measure"),
    (lambda s: measure_protection(Checks(), Forger(), s, PLACES[:0]), UsageError, "nothing to measure"),
    (lambda s: measure_protection(3, Forger(), s, PLACES), UsageError, "no protector"),
    (lambda s: measure_protection(lambda scan: scan.hu, Forger(), s, PLACES), UsageError, "must give a Scan"),
    (lambda s: measure_protection(lambda scan: Scan(scan.hu[:3], SPACING), Forger(), s, PLACES), UsageError, "same shape"),
    (lambda s: measure_protection(Checks(), Forger(), s, PLACES, ("bleach",)), UsageError, "'bleach'"),
    (lambda s: measure_protection(Checks(), Forger(), s, [[99, 0, 0]]), PlaceError, "outside"),
    (lambda s: sweep({}, Forger(), s, PLACES), UsageError, "at least one protector"),
    (lambda s: Scaled(Checks(), -1), UsageError, "-1"),
    (lambda s: Scaled(Checks(), float("nan")), UsageError, "nan"),
    (lambda s: protection_table([]), UsageError, "no row"),
    (lambda s: noise_spectra([s], []), DataError, "noise spectrum")])
def test_mistakes_are_one_sentence(scan, call, error, words):
    with pytest.raises(error, match=words): call(scan)


def test_scaled_changes(scan):
    one = protected_twin(Checks(), scan).hu.astype(int) - scan.hu
    assert Scaled(Checks(), 0).protect(scan) is scan, "nothing was changed, so nothing is claimed"
    for factor in (0.5, 2.5):
        twin = Scaled(Checks(), factor).protect(scan)
        assert np.array_equal(twin.hu, np.maximum(scan.hu + np.rint(factor * one), -1024)) and twin.hu.dtype == scan.hu.dtype and twin.history[-1]["kind"] == "protected"
    padded = Scan(np.where(np.arange(100) < 5, -2048, scan.hu).astype(np.int16), SPACING)
    inside = lambda s, seed=0: s.with_hu(np.where(s.hu < -1024, s.hu, s.hu - 100).astype(np.int16))
    twin = Scaled(inside, 4.0).protect(padded)
    assert (twin.hu[..., :5] == -2048).all() and twin.hu[..., 5:].min() == -1024, "padding stays, and air does not become padding"
    assert protector_name(Scaled(Checks(), 2)) == "checks x2"


def test_identical_counts_as_99_db():
    a = np.zeros((8, 8), np.float32)
    assert decibels(a, a, 4096.0) == 99 and decibels(a, a + 1, 0.0) < 99


# ---- intervals and tables

def test_interval_by_patient_is_the_mean_of_means_and_wider_than_the_naive_one():
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(6), [10, 10, 10, 10, 10, 200])
    values = random.normal(0, 3, 6)[patients] + random.normal(0, 0.3, len(patients))
    found, naive = patient_interval(values, patients), patient_interval(values, np.zeros(len(values)))
    assert found["value"] == pytest.approx(np.mean([values[patients == p].mean() for p in range(6)])) and found["patients"] == 6 and found["places"] == 250
    assert found["low"] < found["value"] < found["high"] and found["high"] - found["low"] > 4 * (naive["high"] - naive["low"])
    assert found == patient_interval(values, patients) != patient_interval(values, patients, seed=1)


def test_interval_of_a_ratio_draws_both_means_together():
    b = np.random.default_rng(0).uniform(1, 10, 40)
    found = patient_interval(np.stack([0.6 * b, b], 1), np.zeros(40), lambda m: float(m[0] / m[1]))
    assert found["low"] == pytest.approx(found["high"]) == pytest.approx(0.6)


def test_interval_refuses():
    with pytest.raises(UsageError, match="0 values"): patient_interval([], [])
    with pytest.raises(UsageError, match="3 values and 2"): patient_interval([1, 2, 3], [1, 2])


def test_tables(scan):
    rows = [r for p in ("a", "b") for r in measure_protection([Nothing(), Checks()], Forger(), scan, PLACES, ("blur 0.7",), patient=p)]
    table = protection_table(rows)
    assert list(table.index) == [(n, a) for a in ("inject", "remove") for n in ("nothing", "checks")], "lines in the order of their first row"
    assert table.loc[("nothing", "remove"), "lost [dB]"] == 0 and table.loc[("checks", "remove"), "patients"] == 2 and np.isnan(table.loc[("checks", "remove"), "lesion gone"])
    assert table.loc[("nothing", "inject"), "lesion gone"] == 0
    line = table.loc[("checks", "remove")]
    assert line["low"] <= line["lost [dB]"] <= line["high"]
    shares = cleaning_table([r for r in rows if r["protector"] == "checks"])
    assert shares.loc[("checks", "nothing"), "share left"] == 1 and abs(shares.loc[("checks", "blur 0.7"), "share left"]) < 0.5
    assert np.isnan(cleaning_table([r for r in rows if r["protector"] == "nothing"])["share left"]).all(), "nothing is left of nothing"


def test_cleanings_of_several_attackers_are_told_apart_or_refused(scan):
    class Blunt(Forger):
        def tamper_tensor(self, hu, at, spacing, action): return hu + 0.5 * (super().tamper_tensor(hu, at, spacing, action) - hu)

    measure = lambda forger, name: measure_protection(Checks(), forger, scan, PLACES, ("blur 0.7",), actions=("remove",), patient="p", extra={"attacker": name})
    one, other = measure(Forger(), "sharp"), measure(Blunt(), "blunt")
    with pytest.raises(UsageError, match="attacker"): cleaning_table(one + other)
    both = cleaning_table(one + other, by=("attacker", "protector"))
    for rows, name in ((one, "sharp"), (other, "blunt")):
        assert (both.loc[(name, "checks")].round(9) == cleaning_table(rows).loc["checks"].round(9)).all(axis=None), "together as alone"
    assert len(cleaning_table(one + one)) == 2, "the same rows twice contradict nothing"


def test_front_and_its_refusal(scan):
    rows = measure_protection([Nothing(), Checks(20), Checks(40)], Forger(), scan, PLACES[:1])
    figure = front_figure(rows, families={"checks": "board"})
    assert [a.get_title() for a in figure.axes] == ["inject, attacker cleans: nothing", "remove, attacker cleans: nothing"]
    assert "protected place" in front_figure(rows, price="place_psnr_db").axes[0].get_xlabel()
    with pytest.raises(UsageError, match="changes anything"): front_figure([r for r in rows if r["protector"] == "nothing"])


# ---- unforged scans

def test_side_effects_of_nothing_and_of_a_known_change(scan):
    hu = scan.hu.copy()
    z, y, x = np.ogrid[:15, :90, :100]
    hu[((z - 7) * 2.5) ** 2 + (y - 45) ** 2 + (x - 50) ** 2 < 36] = 40
    there, lung = Scan(hu, SPACING), np.ones(scan.shape, bool)
    none = side_effects(there, there, [((7, 45, 50), 12.0)], lung)
    assert none["nodules"][0]["change_percent"] == 0 and none["nodules"][0]["before_mm3"] == pytest.approx(905, rel=0.15)
    gone = side_effects(there, scan, [((7, 45, 50), 12.0)], lung)
    assert gone["nodules"][0]["change_percent"] == -100
    lighter = side_effects(there, there.with_hu(hu + np.int16(7)), [], lung)["lung"]
    assert lighter["mean"][1] - lighter["mean"][0] == pytest.approx(7) and lighter["sd"][0] == pytest.approx(lighter["sd"][1])


def test_spectra_show_added_noise(scan):
    noisy = scan.with_hu(scan.hu + np.random.default_rng(1).normal(0, 40, scan.shape).round().astype(np.int16))
    frequency, (plain, loud) = noise_spectra([scan, noisy], PLACES)
    upper = frequency > 0.2
    assert plain.shape == frequency.shape and loud[upper].mean() == pytest.approx(plain[upper].mean() * (20 ** 2 + 40 ** 2) / 20 ** 2, rel=0.25)


# ---- sweeps

def test_alphas_of_the_paper_are_among_the_wider_ones():
    assert PAPER_ALPHAS == (0.2, 0.4, 0.6, 0.8, 1.0) and set(PAPER_ALPHAS) < set(WIDER_ALPHAS) and max(WIDER_ALPHAS) > 1


def test_pick_cleanings():
    assert list(pick_cleanings("blur 0.7")) == ["nothing", "blur 0.7"] and list(pick_cleanings(("median", "nothing"))) == ["nothing", "median"]


def test_sweep_holds_rows_and_pictures(result, scan):
    assert len(result.rows) == 3 * 2 * 2 * 2 and result.forged.shape == (3, 2, 2, 2, 32, 32) and result.forged.dtype == np.int16
    assert np.array_equal(result.real[0], scan.hu[7, 24:56, 24:56]) and np.array_equal(result.protected[1, 0], Checks().protect(scan).hu[7, 24:56, 24:56])
    row = result.table[2, 1, "nothing", "inject"]
    assert row["value"] == 2.0 and row["place"] == 1 and row["at"] == PLACES[1].tolist()
    lost = [np.mean([r["lost_db"] for r in result.rows if r["value"] == v and r["cleaning"] == "nothing" and r["action"] == "remove"]) for v in (0.5, 1.0, 2.0)]
    assert lost[0] < lost[1] < lost[2], "stronger, more damage"
    assert len(sweep_figure(result).axes) == 3


def test_repeats_add_figures_and_no_pictures(result, scan):
    made = {v: Scaled(Checks(), v) for v in (0.5, 1.0, 2.0)}
    twice = sweep(made, Forger(), scan, PLACES, ("nothing", "blur 0.7"), knob="strength", edge=32, repeats=[{v: Scaled(Checks(), 2 * v) for v in made}])
    assert twice.rows[: len(result.rows)] == result.rows and len(twice.rows) == 2 * len(result.rows) and np.array_equal(twice.forged, result.forged)
    assert twice.table == result.table, "the pictures' own figures"
    price, remove = (sweep_figure(twice).axes[k] for k in (0, 2))
    mean = lambda n, v: np.mean([r["slice_psnr_db"] for r in twice.rows if (r["repeat"], r["value"], r["cleaning"]) == (n, v, "nothing")])
    assert price.lines[0].get_ydata()[1] == pytest.approx((mean(0, 1.0) + mean(1, 1.0)) / 2) and mean(0, 1.0) > mean(1, 1.0)
    low, high = price.collections[0].get_paths()[0].get_extents().intervaly
    assert low == pytest.approx(mean(1, 2.0)) and high == pytest.approx(mean(0, 0.5)) and len(remove.collections) == 2
    assert not any(axis.collections for axis in sweep_figure(result).axes), "one training has no span"
    with pytest.raises(UsageError, match="at least one place"): sweep(made, Forger(), scan, PLACES[:0])
    with pytest.raises(UsageError, match="same values"): sweep(made, Forger(), scan, PLACES, repeats=[{0.5: Checks()}])


def test_stored_sweep_comes_back_and_holds_no_pickle(result, tmp_path):
    path = result.save(tmp_path / "deep" / "sweep.npz")
    back = Sweep.load(path)
    assert back.rows == result.rows and back.info == result.info and all(np.array_equal(getattr(back, n), getattr(result, n)) for n in ("real", "protected", "goal", "forged"))
    with np.load(path, allow_pickle=False) as stored: assert {stored[n].dtype.kind for n in stored.files} <= {"i", "u"}
    assert b"pickle" not in path.read_bytes()[:200] and list(tmp_path.joinpath("deep").iterdir()) == [path]


def test_broken_and_foreign_files_are_refused(result, tmp_path):
    with pytest.raises(DataError, match="missing.npz"): Sweep.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(DataError, match="not a stored sweep"): Sweep.load(tmp_path / "text.npz")
    np.savez(tmp_path / "evil.npz", json=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not a stored sweep"): Sweep.load(tmp_path / "evil.npz")
    whole = result.save(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError): Sweep.load(tmp_path / "cut.npz")
    with pytest.raises(DataError, match="rows"): Sweep(result.info, result.rows[:-1], result.real, result.protected, result.goal, result.forged)
    with pytest.raises(DataError, match="fit together"): Sweep(result.info, result.rows, result.real[:1], result.protected, result.goal, result.forged)


def test_train_alphas_trains_each_once_and_loads_the_rest(tmp_path, monkeypatch):
    from mits_nb.protect import sweep as module
    from mits_nb.protect.mitsgan import MitsGAN, Protector

    asked = []
    def train(preset, out, attacker, **options):
        asked.append((preset, options))
        mitsgan = MitsGAN(Protector(8, blocks=1, wave=(.25, .125)))
        if out is not None: mitsgan.save_pretrained(out)
        return mitsgan
    monkeypatch.setattr(module, "train_mitsgan", train)
    first = module.train_alphas((0.2, 1), Forger(), tmp_path, steps=3)
    assert list(first) == [0.2, 1.0] and asked == [("tiny", {"alpha": 0.2, "steps": 3}), ("tiny", {"alpha": 1.0, "wave": (.25, .125), "steps": 3})]
    again = module.train_alphas((0.2, 1, 5), Forger(), tmp_path)
    assert len(asked) == 3 and again[0.2].name == "alpha-0.2"


# ---- the slider

def test_slider_keys_and_wheel(result):
    explorer = AlphaSweep(result, value=0, size=80)
    titles = [f["title"] for f in explorer.screen.frames]
    assert titles[:3] == ["real, forged", "protected", "protected, forged"] and len(titles) == 5 and explorer.state == (0, 0, 0, 0)
    first = [f["png"] for f in explorer.screen.frames]
    explorer.on_event({"kind": "step", "n": 1})
    second = [f["png"] for f in explorer.screen.frames]
    assert explorer.state == (1, 0, 0, 0) and first[0] == second[0] and first[1] != second[1], "the unprotected forgery knows nothing of the knob"
    explorer.on_event({"kind": "step", "n": 100000})
    assert explorer.state[0] == 2
    explorer.on_event({"kind": "step", "n": -100000})
    assert [f["png"] for f in explorer.screen.frames] == first
    for key, place in (("c", 2), ("p", 1), ("a", 3)):
        explorer.on_event({"kind": "key", "key": key})
        assert explorer.state[place] == 1
        explorer.on_event({"kind": "key", "key": key})
        assert explorer.state[place] == 0, "round and round"
    explorer.on_event({"kind": "key", "key": "x"})
    explorer.on_event({"kind": "click", "pane": 0, "x": 0.5, "y": 0.5})
    assert explorer.state == (0, 0, 0, 0)


def test_metrics_follow_the_controls(result):
    explorer = AlphaSweep(result, size=60)
    for names in ((0, 1, 1, 1), (2, 0, 0, 0)):
        for name, index in zip(("value", "place", "cleaning", "action"), names): explorer.controls[name].value = index
        row = result.table[names[0], names[1], result.info["cleanings"][names[2]], result.info["actions"][names[3]]]
        assert f"{row['protected_db']:.1f} dB" in explorer.status.value and f"{row['from_goal_hu']:.0f} HU" in explorer.status.value
        assert ("lesion test" in explorer.status.value) == (row["action"] == "inject") and f"strength <b>{result.info['values'][names[0]]:g}" in explorer.status.value
        real = result.real[names[1]]
    assert not np.array_equal(real, result.protected[2, 0])


def test_heatmaps_are_sheets_on_the_voxel_grid(result):
    explorer = AlphaSweep(result, size=96)
    assert [f["voxel_sheets"] for f in explorer.screen.frames] == [0, 0, 0, 1, 1] and all(len(f["sheets"]) == f["voxel_sheets"] for f in explorer.screen.frames)
    assert {(f["width"], f["height"]) for f in explorer.screen.frames} == {(96, 96)} and all(f["alt"] for f in explorer.screen.frames)


def test_still_picture_without_a_front_end(result):
    explorer = AlphaSweep(result)
    data = explorer._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"} and "strength, 3 values" in data["text/plain"] and len(explorer.still()) < 100_000
    json.dumps(data)


# --- benchmarks/protection.py ---

@pytest.fixture
def script():
    import importlib.util
    spec = importlib.util.spec_from_file_location("protection_script", Path(__file__).parents[1] / "benchmarks" / "protection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_report_keeps_what_is_stored_and_replaces_what_is_measured_again(script, scan, tmp_path):
    def rows(name, hu):
        checks = Checks(hu); checks.name = name
        return measure_protection([checks], Forger(), scan, PLACES, ("nothing", "blur 0.7"), patient="phantom", extra={"attacker": "known"})
    nothing, stored = {key: [] for key in script.KINDS}, tmp_path / "protection.json"
    def tables():
        found = json.loads(stored.read_text(encoding="utf-8"))
        return {title: {tuple(row[:len(found["keys"][title])]): dict(zip(table["columns"], row)) for row in table["data"]} for title, table in found["tables"].items()}
    script.report(nothing | {"rows": rows("weak", 10) + rows("strong", 60)}, stored)
    first = tables()["cost and effect, phantoms"]
    script.report(nothing | {"rows": rows("strong", 90)}, stored)
    second = tables()["cost and effect, phantoms"]
    assert list(second) and set(second) == set(first) and {key[1] for key in second} == {"weak", "strong"}
    assert all(second[key] == first[key] for key in first if key[1] == "weak") and all(second[key] != first[key] for key in first if key[1] == "strong")
    script.report(nothing | {"others": [r | {"attacker": "unknown"} for r in rows("strong", 90)]}, stored)
    others, cost = tables()["attackers not trained against, phantoms"], tables()["cost and effect, phantoms"]
    assert cost == second
    for action in ("inject", "remove"): # the same rows against the stored ones of the same attacker: a share of one
        assert abs(cost[("known", "strong", action)]["lost [dB]"]) > .1
        assert others[("unknown", "strong", action)]["share of the loss against the known attackers"] == pytest.approx(1, abs=.01)


@pytest.mark.parametrize("part, kind", [("cost", "rows"), ("cleanings", "cleanings"), ("others", "others"), ("effects", "effects")])
def test_each_part_of_the_benchmark_fills_its_own_key(part, kind, script, scan, monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setattr(script, "measure_protection", lambda protectors, *rest, **how: [{"protectors": len(protectors)}])
    monkeypatch.setattr(script, "clear_places", lambda *args, **how: PLACES)
    monkeypatch.setattr(script, "lung_mask", lambda s: np.ones(s.shape, bool))
    monkeypatch.setattr(script, "side_effects", lambda *args: {"nodules": []})
    monkeypatch.setattr(script, "noise_spectra", lambda scans, places: (np.array([.05, .3]), np.ones((2, 2))))
    monkeypatch.setattr(script.MitsGAN, "from_pretrained", classmethod(lambda cls, name: Checks()))
    a = SimpleNamespace(places=2, few=1, weights=["x"], tafim="", noise=5.0, factors=[], bounds=[], climb=1, parts=[part], cleanings=["median"])
    found = script.measure_scan(a, SimpleNamespace(name="phantom", scan=scan, nodules=[]), {"known": Forger()}, {"unknown": Forger()})
    assert found[kind] and not any(rows for key, rows in found.items() if key not in (kind, "spectra" if part == "effects" else kind))
