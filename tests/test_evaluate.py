"""The store of cells, the tables and the arena of chapter 20."""
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mits_nb import evaluate as ev
from mits_nb.core import DataError, OutputError, PlaceError, UsageError, from_preset, rng, write_json
from mits_nb.data import published
from mits_nb.scan import Scan


# ---------------------------------------------------------------- the store
def chain(calls, noise=1, more=0):
    "Three cells in a row, and one beside them; `calls` receives the names of those that run."
    def run(name, make): return lambda got: calls.append(name) or make(got)
    a = ev.Cell("a", run("a", lambda _: {"x": np.arange(6.).reshape(2, 3), "n": 1}))
    b = ev.Cell("b", run("b", lambda got: {"sum": float(got["a"]["x"].sum()) * noise}), {"noise": noise}, (a,))
    c = ev.Cell("c", run("c", lambda got: {"twice": 2 * got["b"]["sum"] + more}), {"more": more}, (b,))
    d = ev.Cell("d", run("d", lambda got: {"shape": list(got["a"]["x"].shape)}), {}, (a,))
    return [c, d]


def test_a_second_run_computes_nothing_and_gives_the_same(tmp_path):
    first, second = [], []
    one = ev.CellStore(tmp_path).compute(chain(first))
    files = {p.name: p.read_bytes() for p in (tmp_path / "cells").iterdir()}
    two = ev.CellStore(tmp_path).compute(chain(second))
    assert first == ["a", "b", "c", "d"] and second == [] and one == two == {"c": {"twice": 30.0}, "d": {"shape": [2, 3]}}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "cells").iterdir()}


def test_a_setting_recomputes_only_what_depends_on_it(tmp_path):
    ev.CellStore(tmp_path).compute(chain([]))
    for changes, expected in (({"noise": 2}, ["b", "c"]), ({"more": 1}, ["c"]), ({"noise": 2, "more": 1}, ["c"]), ({}, [])):
        calls = []
        ev.CellStore(tmp_path).compute(chain(calls, **changes))
        assert calls == expected, changes


def test_one_store_asked_for_other_settings_does_not_answer_with_the_old_ones(tmp_path):
    store, calls = ev.CellStore(tmp_path), []
    assert [store.compute(chain(calls, noise=n))["c"]["twice"] for n in (1, 2, 1)] == [30., 60., 30.]
    assert calls == ["a", "b", "c", "d", "b", "c"], "each is computed once, and read again"


def test_needs_count_by_their_result_and_not_by_their_origin(tmp_path):
    def pair(path, value, calls):
        data = ev.Cell("data", lambda _: calls.append("data") or {"voxels": value}, {"path": path})
        return [ev.Cell("use", lambda got: calls.append("use") or got["data"], {}, (data,))]
    for path, value, expected in (("here", 5, ["data", "use"]), ("there", 5, ["data"]), ("there", 5, []), ("elsewhere", 6, ["data", "use"])):
        calls = []
        assert ev.CellStore(tmp_path).compute(pair(path, value, calls))["use"] == {"voxels": value} and calls == expected


@pytest.mark.parametrize("damage", ["cut", "changed", "no arrays", "wrong arrays", "not json"])
def test_a_damaged_cell_is_computed_again_and_said_so(tmp_path, caplog, damage):
    ev.CellStore(tmp_path).compute(chain([]))
    file = next(p for p in (tmp_path / "cells").glob("*.json") if '"cell": "a"' in p.read_text())
    text = file.read_text()
    if damage == "cut": file.write_text(text[:len(text) // 2])
    elif damage == "changed": file.write_text(text.replace('"n": 1', '"n": 2'))
    elif damage == "not json": file.write_bytes(b"\xff\x00")
    elif damage == "no arrays": file.with_suffix(".npz").unlink()
    else: np.savez(file.with_suffix(".npz"), x=np.zeros((2, 3)))
    calls = []
    with caplog.at_level(logging.WARNING, "mits_nb"): got = ev.CellStore(tmp_path).compute(chain(calls))
    assert calls == ["a"] and got["c"] == {"twice": 30.0}  # same result, so what depends on it stays
    assert len(caplog.records) == 1 and "a is computed again" in caplog.text


def test_a_store_of_another_version_is_refused(tmp_path):
    ev.CellStore(tmp_path)
    write_json(tmp_path / "cells" / "store.json", ev.STORE | {"version": 99})
    with pytest.raises(DataError, match=f"version 99.*keeps version {ev.STORE['version']}.*--out"): ev.CellStore(tmp_path)
    write_json(tmp_path / "cells" / "store.json", [])
    with pytest.raises(DataError, match="unknown"): ev.CellStore(tmp_path)
    (tmp_path / "other" / "cells").mkdir(parents=True)
    (tmp_path / "other" / "cells" / "mine.json").write_text("{}")
    with pytest.raises(DataError, match="no store.json"): ev.CellStore(tmp_path / "other")


def test_a_full_disk_loses_nothing_that_is_finished(tmp_path, monkeypatch):
    real, calls = os.fsync, []
    def full(file):
        if len(calls) >= 3: raise OSError(28, "No space left on device")  # while c is written
        real(file)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device.*free space"): ev.CellStore(tmp_path).compute(chain(calls))
    monkeypatch.undo()
    again = []
    ev.CellStore(tmp_path).compute(chain(again))
    assert calls == ["a", "b", "c"] and again == ["c", "d"]
    assert not list((tmp_path / "cells").glob(".tmp*"))


KILLED = """
import sys, time
from pathlib import Path
from mits_nb.evaluate import Cell, CellStore
out, stop = Path(sys.argv[1]), int(sys.argv[2])
def run(i):
    def made(got):
        with open(out / "calls", "a") as f: f.write(f"{i}\\n")
        if i == stop:
            (out / "ready").touch()
            while True: time.sleep(.05)
        return {"value": i + sum(v["value"] for v in got.values())}
    return made
cells = []
for i in range(8): cells.append(Cell(f"c{i}", run(i), {}, tuple(cells[-2:])))
print(CellStore(out).compute(cells))
"""


def test_kill_9_in_the_middle_and_no_cell_is_computed_twice(tmp_path):
    def start(out, stop): return subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(stop)], stdout=subprocess.PIPE, text=True)
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "whole", -1).communicate()[0]
    process = start(tmp_path, 5)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path, -1).communicate()[0] == whole
    calls = (tmp_path / "calls").read_text().split()
    assert calls == ["0", "1", "2", "3", "4", "5", "5", "6", "7"]  # 5 was never finished, all others ran once
    names = lambda folder: sorted(p.name for p in (folder / "cells").glob("[!.]*"))
    assert names(tmp_path) == names(tmp_path / "whole")


def test_two_cells_of_one_name_are_an_error(tmp_path):
    with pytest.raises(UsageError, match="two different cells"): ev.CellStore(tmp_path).compute([ev.Cell("a", lambda _: {}, {"k": 1}), ev.Cell("a", lambda _: {}, {"k": 2})])


def test_results_are_kept_as_json_gives_them_back(tmp_path):
    value = {"t": (1, 2), "nan": float("nan"), "np": np.float32(.5), "b": np.bool_(True), "path": Path("a")}
    got = ev.CellStore(tmp_path).compute([ev.Cell("a", lambda _: value)])["a"]
    assert got == {"t": [1, 2], "nan": None, "np": .5, "b": True, "path": "a"} == ev.CellStore(tmp_path).compute([ev.Cell("a", lambda _: value)])["a"]


# ---------------------------------------------------------------- data
def test_find_tests_phantoms_and_folders(tmp_path, monkeypatch, phantom):
    from mits_nb.scan import write_scan
    config = from_preset(ev.EvaluateConfig, "tiny", scans=2)
    assert [t.name for t in ev.find_tests("phantom", config)] == [f"phantom-{s}" for s in config.seeds] and all(s < 100 for s in config.seeds)
    for name in "abc": write_scan(phantom[0], tmp_path / f"{name}.mha")
    found = ev.find_tests(str(tmp_path), config)
    assert [t.name for t in found] == ["a", "b"] and found[0].origin != found[1].origin
    os.utime(tmp_path / "a.mha", (1, 1))
    assert ev.find_tests(str(tmp_path), config)[0].origin != found[0].origin
    assert [t.name for t in ev.find_tests(str(tmp_path / "b.mha"), config)] == ["b"]


def test_two_scans_of_one_name_stay_two_and_dicom_needs_no_suffix(tmp_path, phantom, monkeypatch):
    from mits_nb.scan import write_scan
    for patient in "ab":
        (tmp_path / patient).mkdir()
        write_scan(phantom[0], tmp_path / patient / "ct.mha")
        (tmp_path / patient / "ct_nodules.nii.gz").write_bytes(b"a mask")
        (tmp_path / patient / "notes").write_text("no DICOM")
    write_scan(phantom[0], tmp_path / "series")
    for file in (tmp_path / "series").iterdir(): file.rename(file.with_suffix(""))
    assert [t.name for t in ev.find_tests(str(tmp_path))] == ["a-ct", "b-ct", "series"]


def test_the_voxels_beside_a_header_count_for_the_origin(tmp_path, phantom):
    from mits_nb.scan import write_scan
    write_scan(phantom[0], tmp_path / "one.mha")
    (tmp_path / "two.mhd").write_text("ElementDataFile = two.raw")
    (tmp_path / "two.raw").write_bytes(b"1")
    before = {t.name: t.origin for t in ev.find_tests(str(tmp_path))}
    (tmp_path / "two.raw").write_bytes(b"22")
    after = {t.name: t.origin for t in ev.find_tests(str(tmp_path))}
    assert before["one"] == after["one"] and before["two"] != after["two"]


@pytest.mark.parametrize("data,words", [("lunar16", "unknown data set 'lunar16'.*luna16"), ("/nowhere/at/all", "unknown data set")])
def test_unknown_data(data, words):
    with pytest.raises(DataError, match=words): ev.find_tests(data)


def test_a_data_set_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.setenv("MITS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="luna16 is not on this machine"): ev.find_tests("luna16")
    with pytest.raises(DataError, match="no scan found"): ev.find_tests(str(tmp_path))


@pytest.mark.parametrize("shape,spacing,words", [((20, 128, 128), (2.5, 5., 5.), "pixels of 5 mm"), ((20, 128, 128), (9., 1., 1.), "slices of 9 mm"), ((2, 128, 128), (2.5, 1., 1.), "2 x 128 x 128 voxels")])
def test_data_that_the_weights_do_not_fit(shape, spacing, words):
    with pytest.raises(DataError, match=words): ev.check_fit("a", SimpleNamespace(shape=shape, spacing=spacing))


def test_the_scan_digest_knows_voxels_and_geometry():
    hu = np.zeros((3, 4, 5), np.int16)
    one = ev.scan_digest(Scan(hu, (1., 1., 1.)))
    assert one == ev.scan_digest(Scan(hu.copy(), (1., 1., 1.))) and one != ev.scan_digest(Scan(hu, (2., 1., 1.)))
    hu = hu.copy()
    hu[1, 2, 3] = 1
    assert one != ev.scan_digest(Scan(hu, (1., 1., 1.)))


def test_weights_digest_follows_the_networks_and_not_the_card(tmp_path):
    (tmp_path / "card.md").write_text("a")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    one = ev.weights_digest(tmp_path)
    (tmp_path / "card.md").write_text("b")
    assert ev.weights_digest(tmp_path) == one
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert ev.weights_digest(tmp_path) != one


# ---------------------------------------------------------------- tables
def fidelity(v): return {"rmse_hu": v, "psnr_4096_db": 10 * v, "psnr_range_db": v, "ssim": v / 10, "lpips": None}


def test_fidelity_table_means_by_patient_beside_the_paper():
    rows = lambda *values: {"rows": [{f"{state} {part}": fidelity(v + (state == "forged")) for state in ("protected", "forged") for part in ("whole", "square")} for v in values]}
    got = {f"protection/{p}/{name}": r for p in ("mitsgan", "tafim") for name, r in (("a", rows(1., 1., 1.)), ("b", rows(4.)))}
    t = ev.fidelity_table(got, "square", 50)
    cell = t["rows"]["RMSE"]["MITS-GAN"]
    assert (cell["ours"], cell["n"], cell["patients"], cell["paper"]) == (2.5, 4, 2, published("mits-gan", "Table 2")["RMSE"]["MITS-GAN"])  # patients weigh the same
    assert t["rows"]["RMSE"]["TAFIM tampered"]["ours"] == 3.5 and cell["low"] <= 2.5 <= cell["high"]
    assert t["rows"]["LPIPS"]["MITS-GAN"]["ours"] is None and any("LPIPS is missing" in n for n in t["notes"])
    assert t["rows"]["PSNR, peak = range"]["MITS-GAN"]["paper"] == t["rows"]["PSNR, peak 4096 HU"]["MITS-GAN"]["paper"] == 26.682


def slices(n=8):
    truth = [i % 2 == 0 for i in range(n)]
    return {"probability": [.9 if t else .1 for t in truth[:-1]] + [.9], "tampered": truth, "action": ["inject" if i // 2 % 2 == 0 else "remove" for i in range(n)]}


def test_detector_table_takes_rows_from_where_they_are():
    got = {"slices/a": slices(), "slices/b": slices()}
    stored = {"Ours-GLCM": {"accuracy": .8, "precision": .7, "recall": .6, "f1": .65, "accuracy_interval": [.7, .9], "slices": 40, "scans": 5, "seeds": [0]}, "Ours": {"accuracy": .9, "precision": .9, "recall": .9, "f1": .9, "slices": 40, "scans": 5}}
    t = ev.detector_table("Table 1", got, stored, ev.MEASURED, 50)
    assert t["rows"]["Ours"]["accuracy"]["ours"] == 14 / 16 and t["rows"]["Ours"]["accuracy"]["paper"] == .935 and "this run" in t["rows"]["Ours"]["accuracy"]["how"]
    assert t["rows"]["Ours-GLCM"]["accuracy"] | {"low": .7, "high": .9, "ours": .8} == t["rows"]["Ours-GLCM"]["accuracy"] and "beforehand" in t["rows"]["Ours-GLCM"]["f1"]["how"]
    assert t["rows"]["Ours-Selu"]["f1"]["ours"] is None and "--train" in t["rows"]["Ours-Selu"]["f1"]["how"]
    assert t["rows"]["Ours, trained beside the other rows"]["f1"]["ours"] == .9
    two = ev.detector_table("Table 2", got, {}, ev.MEASURED, 50)
    assert two["rows"]["CTGAN-INJ, shipped detector"]["accuracy"]["n"] == 8 and two["rows"]["CTGAN-INJ"]["accuracy"]["ours"] is None


def test_the_page_shows_every_cell_and_is_self_contained():
    got = {"slices/a": slices(), "slices/b": slices()}
    tables = [ev.detector_table("Table 1", got, {}, ev.MEASURED, 20)]
    content = {"about": {"data": "<phantom>", "preset": "tiny", "scans": {"a": {"shape": [1, 2, 3], "spacing": [1, 1, 1], "voxels": "ff"}}, "weights": {}, "settings": {"seed": 0}}, "tables": tables}
    page = ev.tables_page(content, [{"paper": "cascade", "figure": "Figure 4", "caption": "A \"slice\"", "png": "AAAA"}])
    assert "0.875" in page and "0.935" in page and "not measured" in page and "&lt;phantom&gt;" in page and "prefers-color-scheme:dark" in page
    assert "<script" not in page and "http" not in page


# ---------------------------------------------------------------- the arena
def place(score, called=None, lost=3., **more):
    return {"at": [1, 2, 3], "action": "inject", "unprotected_db": 20., "protected_db": 20. - lost, "lost_db": lost, "square_ssim": .5, "lesion": True, "lesion_unprotected": True,
            "scores": {"cascade": score, "noise ratio": score / 2}, "called": score > .85 if called is None else called, "f1": score} | more


def arena():
    got = {}
    for p in "ab":
        for cleaning, high in (("nothing", .5), ("blur 0.7", .8)):
            got[f"honest/none/{cleaning}/{p}"] = {"slices_called": 1, "slices": 20, "regions": 0, "scores": {"cascade": [0.] * 99 + [high], "noise ratio": [.1] * 100}}
        got[f"honest/MITS-GAN/blur 0.7/{p}"] = {"slices_called": 20, "slices": 20, "regions": 3, "scores": {"cascade": [.85] * 100, "noise ratio": [.1] * 100}}
        got[f"honest/MITS-GAN/nothing/{p}"] = {"slices_called": 3, "slices": 20, "regions": 1, "scores": {"cascade": [0.] * 98 + [.6, .6], "noise ratio": [.1] * 100}}
        got[f"arena/plain/none/{p}"] = {"rows": [place(.9, lost=0.), place(.4, lost=0.)]}
        got[f"arena/plain/MITS-GAN/{p}"] = {"rows": [place(.9), place(.95)]}
        got[f"arena/blur first/none/{p}"] = {"rows": [place(.9, lost=0.), place(.9, lost=0.)]}
        got[f"arena/blur first/MITS-GAN/{p}"] = {"rows": [place(.2, lost=1.), place(.9, lost=1., lesion=False)]}
    return got


def test_arena_figures_by_hand():
    got = arena()
    cells = {(c["attacker"], c["protection"]): c for c in ev.arena_cells(got, 50)}
    one = cells["plain", "none"]
    assert one["detectors"]["cascade"]["pd"] == 1. and one["called"] == .5 and one["n"] == 4 and one["patients"] == 2  # 2 of 200 above: the threshold is 0
    assert one["detectors"]["cascade"]["auc"] == pytest.approx(((99 + 1) + 99) / 200, abs=1e-4)
    lone = {k: {"rows": v["rows"][:1] if k == "arena/plain/none/b" else v["rows"]} if k.startswith("arena/") else v for k, v in got.items()}
    lone["arena/plain/none/b"]["rows"] = [place(0., lost=0., called=False)]
    assert {(c["attacker"], c["protection"]): c for c in ev.arena_cells(lone, 50)}["plain", "none"]["detectors"]["cascade"]["pd"] == .5, "patients weigh the same, as in the interval beside it"
    assert cells["blur first", "MITS-GAN"]["lesion_gone"] == .5 and cells["blur first", "MITS-GAN"]["lost_db"] == 1.
    blurred = {p: cells["blur first", p]["detectors"]["cascade"] for p in ("none", "MITS-GAN")}
    assert blurred["none"]["fa"] == .01 and blurred["none"]["auc"] == 1., "against honest places of scans that were blurred, too"
    assert blurred["MITS-GAN"] | {"pd": 1., "fa": 1., "auc": .5} == blurred["MITS-GAN"], "everything is found, and so is all that is honest"
    answer = ev.headline(got, 50)
    gain = {(g["attacker"], g["protection"]): g for g in answer["gains"]}
    assert gain["plain", "MITS-GAN"] | {"value": .5, "n": 4, "patients": 2} == gain["plain", "MITS-GAN"] and gain["blur first", "MITS-GAN"]["value"] == -.5
    alarms = {a["protection"]: a for a in answer["alarms"]}
    assert alarms["MITS-GAN"]["share"] == .15 and alarms["MITS-GAN"]["difference"]["value"] == .1 and alarms["MITS-GAN"]["regions"] == 2
    said = " ".join(ev.findings(list(cells.values()), answer))
    assert "calls 5.0 % of the plain slices" in said and ev.findings(list(cells.values()), answer | {"alarms": answer["alarms"][::-1]}) == ev.findings(list(cells.values()), answer)
    assert "+50 points" in said and "more than 2 points under MITS-GAN (+10.0, 95 %: +10.0 to +10.0)" in said and "33% with blur first" in said


def test_findings_name_every_worst_case_and_every_clear_pair():
    got = arena()
    cells, answer = ev.arena_cells(got, 50), ev.headline(got, 50)
    for c in cells: c["detectors"]["cascade"]["pd"] = 0. if c["attacker"] == "blur first" or c["protection"] == "none" else 1.
    for g in answer["gains"]: g |= {"low": -.6, "high": -.2}
    said = " ".join(ev.findings(cells, answer))
    assert "finds least (0%): plain (protection: none); blur first (under every protection)." in said
    assert "Of the 1 other pairs" in said and "MITS-GAN against blur first (-50 points, -60 points to -20 points)" in said
    assert "AUC on unprotected scans lies below" not in said  # 0.5 and above here
    for c in cells: c["detectors"]["noise ratio"]["auc"] = .3
    assert "lies below one half for plain, blur first:" in " ".join(ev.findings(cells, answer))


def test_views_of_gains_and_alarms():
    answer = ev.headline(arena(), 50)
    gains, alarms = ev.gains_view(answer), ev.alarms_view(answer)
    assert gains["columns"] == ["attacker", "MITS-GAN"] and [r[0] for r in gains["rows"]] == ["plain", "blur first"] and gains["rows"][0][1].startswith("+50 (+")
    judges = ev.judges_view(result())
    assert judges["columns"][:3] == ["attacker", "protection", "places / patients"] and judges["columns"][3:] == ["cascade", "noise ratio"] and all(len(row) == 5 and ", " in row[3] for row in judges["rows"])
    assert alarms["rows"][0][:3] == ["none", "5.0 %", ""] and alarms["rows"][1][1] == "15.0 %" and alarms["rows"][1][3:] == ["40 / 2", "2"]


def test_unknown_names_in_the_arena():
    bench = ev.Bench(from_preset(ev.EvaluateConfig, "tiny"), [])
    with pytest.raises(UsageError, match="knows no 'diffusion'"): ev.arena_run(bench, ["diffusion"])
    with pytest.raises(UsageError, match="'none' among"): ev.arena_run(bench, ["plain"], ["noise"])


def test_a_folder_without_detectors(tmp_path):
    with pytest.raises(DataError, match="holds no detectors"): ev.detector_folders(tmp_path)
    for name in ("dct-1", "xception-whole-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert [p.name for p in ev.detector_folders(tmp_path)] == ["dct-1"]
    (tmp_path / "cascade").mkdir()
    (tmp_path / "cascade" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="of that name already"): ev.detector_folders(tmp_path)


def test_the_stored_arena_can_get_new_tables_and_sentences(tmp_path, monkeypatch):
    import importlib.util
    spec = importlib.util.spec_from_file_location("arena_script", Path(__file__).parents[1] / "benchmarks" / "arena.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    write_json(tmp_path / "stored" / "phantom.json", {"about": {"data": "phantom"}, "arena": result() | {"findings": ["old"]}, "tables": []})
    write_json(tmp_path / "tables" / "tables.json", {"tables": [{"table": "new"}], "about": {"scans": {"a": 1}}})
    monkeypatch.setattr(sys, "argv", ["arena.py", "--keep", "--tables", str(tmp_path / "tables"), "--store", str(tmp_path / "stored")])
    script.main()
    stored = json.loads((tmp_path / "stored" / "phantom.json").read_text())
    assert stored["tables"] == [{"table": "new"}] and stored["tables_about"] == {"scans": {"a": 1}, "data": "phantom"} and stored["about"] == {"data": "phantom"} and "old" not in stored["arena"]["findings"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--data", "/somewhere/scans"])
    script.main()
    alone = json.loads((tmp_path / "stored" / "scans.json").read_text())
    assert alone == {"tables": [{"table": "new"}], "tables_about": {"scans": {"a": 1}, "data": "scans"}}


def test_an_arena_is_stored_under_the_name_of_its_data(tmp_path, monkeypatch):
    import importlib.util
    from types import SimpleNamespace
    spec = importlib.util.spec_from_file_location("arena_script", Path(__file__).parents[1] / "benchmarks" / "arena.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "find_tests", lambda data, config: {})
    monkeypatch.setattr(script, "Bench", lambda config, tests: SimpleNamespace(weights={"cascade": "cascade-tiny"}, uses=lambda *roles: {r: "digest" for r in roles}, tests=tests))
    monkeypatch.setattr(script, "arena_run", lambda *args: None)
    monkeypatch.setattr(script, "CellStore", lambda folder: SimpleNamespace(compute=lambda cells, what: {"arena": result() | {"findings": []}}))
    for data, name in (("phantom", "phantom.json"), ("/somewhere/scans", "scans.json")):
        monkeypatch.setattr(sys, "argv", ["arena.py", "--out", str(tmp_path / name), "--data", data])
        script.main()
        assert [p.name for p in (tmp_path / name).iterdir()] == [name]
        assert json.loads((tmp_path / name / name).read_text())["about"]["weights"] == {"cascade-tiny": "digest"}
    stored = lambda: json.loads((tmp_path / "kept" / "phantom.json").read_text())
    write_json(tmp_path / "kept" / "phantom.json", {"arena": "old", "tables": ["kept"]})
    for words in (["--detectors", "networks"], []):
        monkeypatch.setattr(sys, "argv", ["arena.py", "--out", str(tmp_path / "again"), "--store", str(tmp_path / "kept"), *words])
        script.main()
        if words: assert stored()["arena"] == "old"
    assert stored()["rivals"]["cells"] == stored()["arena"]["cells"] and stored()["rivals"]["about"] == stored()["about"] and stored()["tables"] == ["kept"]


@pytest.fixture(scope="module")
def forger():
    from mits_nb.attack.ctgan import CTGAN
    return CTGAN.from_pretrained("ctgan-tiny")


def test_copy_move_copies_and_leaves_the_rest_alone(forger):
    numbers = rng(0, "copy-move")
    hu = np.rint(-850 + 20 * numbers.standard_normal((40, 96, 96))).astype(np.int16)
    hu[16:24, 66:76, 66:76] = 40  # the only bright thing
    scan = Scan(hu, (1.25, 1., 1.))
    attacker = ev.CopyMove(forger, {"inject": np.array([[20, 71, 71]]), "remove": np.zeros((0, 3))})
    out = attacker.tamper(scan, (20, 30, 30), "inject", 1)
    assert out.hu[20, 28:33, 28:33].mean() > -100 and (out.hu[:, 60:] == hu[:, 60:]).all() and out.history[-1]["kind"] == "forged"
    with pytest.raises(PlaceError, match="34 mm"): attacker.tamper(scan, (20, 60, 60), "inject")
    with pytest.raises(PlaceError): attacker.tamper(scan, (20, 30, 30), "remove")


def test_the_soap_film_takes_a_nodule_away(forger):
    hu = np.full((40, 80, 80), -850, np.int16)
    hu[17:23, 37:43, 37:43] = 30
    out = ev.SoapFilm(forger).tamper(Scan(hu, (1.25, 1., 1.)), (20, 40, 40))
    assert out.hu[17:23, 37:43, 37:43].max() < -700


def test_only_changed_slices_are_asked_again_and_the_answer_is_the_same():
    asked = []
    def maps(hu):
        asked.append(len(hu))
        return (hu[:, 14::4, 14::4] > 0).astype(np.float32)
    judge = ev.Judge("bright", maps, depth_mm=7.5)
    before = Scan(np.full((12, 96, 96), -900, np.int16), (2.5, 1., 1.))
    known, hu = judge.maps(before.hu), before.hu.copy()
    hu[3:9, 40:56, 40:56] = 30
    after = before.with_hu(hu)
    again = judge.again(after, before, known)
    assert asked == [12, 6] and (again == judge.maps(after.hu)).all() and not known.any()
    at = (6, 48, 48)
    assert judge.look(after, [at], again) == judge.look(after, [at]) and judge.look(after, [at])[0][0] > .8 and judge.look(before, [at])[0][0] < .01
    assert ev.Judge("noise ratio").again(after, before, None) is None


@pytest.fixture(scope="module")
def small_bench():
    config = from_preset(ev.EvaluateConfig, "tiny", seeds=(12,), shape=(14, 176, 176), spacing=(2.5, 1.9, 1.9), arena_places=1, honest_places=3, pgd_steps=1)
    return ev.Bench(config, ev.phantom_tests((12,), config))


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in ev.ATTACKERS.values()}))
def test_every_forger_of_the_arena_forges(small_bench, kind):
    scan = small_bench.source("phantom-12").scan
    action, at = ev.forged_places(small_bench, "phantom-12", 1)[0]
    out = ev.forger_of(small_bench, "phantom-12", kind).tamper(scan, at, action, seed=0)
    changed = np.argwhere(out.hu != scan.hu)
    assert len(changed) > 50 and (np.abs((changed - at) * scan.spacing).max(0) <= 24).all() and out.history[-1]["kind"] == "forged"


@pytest.mark.parametrize("protection", ev.PROTECTIONS)
def test_every_protection_of_the_arena_and_what_is_seen_under_it(small_bench, protection):
    judges = [ev.Judge("cascade", small_bench.model("cascade").heatmap, 7.5), ev.Judge("noise ratio")]
    scan, twin = small_bench.source("phantom-12").scan, ev.protected_by(small_bench, "phantom-12", protection)
    assert (twin.hu == scan.hu).all() == (protection == "none")
    honest = ev.honest_round(small_bench, judges, "phantom-12", protection)
    assert honest["slices"] == len(scan.hu) and {len(s) for s in honest["scores"].values()} <= {1, 3}
    (row,) = ev.arena_round(small_bench, judges, "phantom-12", "blur first", protection)["rows"]
    assert set(row["scores"]) == {"cascade", "noise ratio"} and 0 <= row["f1"] <= 1 and (row["lost_db"] == 0) == (protection == "none")


def test_trainings_for_other_scans_go_to_another_folder(tmp_path, monkeypatch):
    from mits_nb.detect import rivals
    folders = []
    monkeypatch.setattr(rivals, "ablation", lambda row, *sets, **_: folders.append((row, sets[-1])) or {"row": row})
    monkeypatch.setattr(ev.TrainingSets, "of", lambda self, row: (None, None, None))
    for seed, rows in ((12, ("Ours", "CycleGAN")), (13, ("Ours",)), (12, ("Ours",))):
        config = from_preset(ev.EvaluateConfig, "tiny", seeds=(seed,), shape=(8, 96, 96), spacing=(2.5, 1.9, 1.9))
        bench = ev.Bench(config, ev.phantom_tests((seed,), config))
        for cell in ev.training_cells(bench, tmp_path, rows=rows)[:-1]: cell.run({f"data/phantom-{seed}": {"voxels": str(seed)}})
    assert [row for row, _ in folders] == ["Ours", "CycleGAN", "Ours", "Ours"] and folders[0][1] == folders[3][1] and len({f for _, f in folders}) == 3


def test_a_corrected_published_figure_is_another_cell(monkeypatch):
    config = from_preset(ev.EvaluateConfig, "tiny")
    def settings(): return {c.name: c.settings for c in ev.table_cells(ev.Bench(config, ev.find_tests("phantom", config)))}
    before = settings()
    real = ev.published
    monkeypatch.setattr(ev, "published", lambda paper, table: {k: dict.fromkeys(v, 7) for k, v in real(paper, table).items()} if table == "Table 1" else real(paper, table))
    after = settings()
    assert {name for name in before if before[name] != after[name]} == {"table/mits-gan/Table 1", "table/cascade/Table 1"}


# ---------------------------------------------------------------- explorers
def result():
    got = arena()
    cells = ev.arena_cells(got, 20)
    return {"cells": cells, **ev.headline(got, 20)}


def test_arena_matrix_and_picture():
    rows, columns, values = ev.arena_matrix(result(), "called")
    assert rows == ["plain", "blur first"] and columns == ["none", "MITS-GAN"] and values.tolist() == [[.5, 1.], [1., .5]]
    one, two = (ev.paint_matrix(rows, columns, values, "called", chosen) for chosen in ((0, 0), (1, 1)))
    assert one.shape == two.shape and one.dtype == np.uint8 and (one != two).any()
    assert ev.heat_colour(1., 0., 1.) != ev.heat_colour(0., 0., 1.) and ev.heat_colour(float("nan"), 0, 1) == (225, 225, 225)
    ev.paint_matrix(["a"], ["b"], np.array([[np.nan]]), "lost_db")


def test_arena_explorer_follows_clicks_keys_and_menu():
    w = ev.ArenaExplorer(result(), "pd")
    before = w.screen.frames[0]["png"]
    height, width = w.picture().shape[:2] # the browser sends fractions
    w.on_event({"kind": "click", "pane": 0, "x": (118 + 104 + 50) / width, "y": (26 + 34 + 5) / height})
    assert w.chosen == (1, 1) and "blur first" in w.status.value and w.screen.frames[0]["png"] != before
    w.on_event({"kind": "step", "n": 1})
    assert w.measure == "fa"
    w.on_event({"kind": "step", "n": -5})
    assert w.measure == "pd"
    w.on_event({"kind": "click", "pane": 0, "x": 5 / width, "y": .999})
    assert w.chosen == (1, 0) and w.still()[:4] == b"\x89PNG"


def test_rows_of_mixed_units_have_scales_of_their_own():
    one = lambda ours, paper: {"x": {"ours": ours, "low": None, "high": None, "paper": paper}}
    mixed = {"units": {"RMSE": "HU"}, "rows": {"RMSE": one(30., 200.), "SSIM": one(.9, .45)}}
    assert ev.mixed_units(mixed, "x") and not ev.mixed_units(mixed | {"units": {}}, "x")
    blue = lambda picture: [int((line == (59, 111, 182)).all(1).sum()) for line in (picture[8 + 8], picture[8 + 36 + 8])] # pixels of ours in the first and the second row
    short, full = blue(ev.paint_bars(mixed, "x"))
    assert full > 200 and abs(short - full * .15) < 4
    assert blue(ev.paint_bars(mixed | {"units": {}}, "x"))[1] < 5


def test_ablation_explorer_follows_its_menus():
    got = {"slices/a": slices(), "slices/b": slices()}
    tables = [ev.detector_table(t, got, {}, ev.MEASURED, 20) for t in ("Table 1", "Table 2")]
    w = ev.AblationExplorer(tables)
    before = w.screen.frames[0]["png"]
    w.columns.value = "accuracy"
    assert w.screen.frames[0]["png"] != before and "this run" in w.status.value
    w.menu.value = 1
    assert w.column == "accuracy" and w.table["table"] == "Table 2" and w.still()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- all of it, small
@pytest.fixture(scope="module")
def small(tmp_path_factory, phantom):
    "One tiny scan in a folder, whose pixels the weights can take."
    from mits_nb.phantom import make_phantom
    from mits_nb.scan import write_scan
    folder = tmp_path_factory.mktemp("scans")
    write_scan(make_phantom(seed=2, shape=(16, 208, 208), spacing=(2.5, 1.7, 1.7))[0], folder / "one.mha")
    return folder


SMALL = dict(places=1, slice_places=2, slices=1, cycle_slices=1, arena_places=1, honest_places=3, pgd_steps=1, resamples=20)


def test_evaluate_twice_gives_the_same_bytes_and_loads_nothing(small, tmp_path, monkeypatch):
    content = ev.evaluate(tmp_path, str(small), **SMALL)
    assert [(t["paper"], t["table"]) for t in content["tables"]] == [("mits-gan", "Table 1"), ("mits-gan", "Table 2"), ("mits-gan", "Table 3"), ("cascade", "Table 1"), ("cascade", "Table 2"), ("cascade", "Table 3"), ("cascade", "Section 5"), ("cascade", "Table 4")]
    assert {(f["paper"], f["figure"]) for f in content["figures"]} == {("mits-gan", "Figure 6"), ("mits-gan", "Figure 7"), ("cascade", "Figure 4"), ("cascade", "Figure 7"), ("cascade", "Figure 8")}
    files = {name: (tmp_path / name).read_bytes() for name in ("tables.json", "tables.html")}
    assert json.loads(files["tables.json"]) == content
    def never(*_): raise AssertionError("the second run computes nothing")
    monkeypatch.setattr(ev.Bench, "source", never)
    monkeypatch.setattr(ev.Bench, "model", never)
    ev.evaluate(tmp_path, str(small), **SMALL)
    assert files == {name: (tmp_path / name).read_bytes() for name in files}


def test_every_published_figure_has_a_cell(small, tmp_path):
    shown = {}
    for number in ("Table 1", "Table 2", "Table 3", "Section 5"):
        t = ev.detector_table(number, {"slices/a": slices()} if number != "Section 5" else {"cycle/a": slices()}, {}, ev.MEASURED, 5)
        for row, columns in published("cascade", number).items():
            for column, value in columns.items(): assert t["rows"][row][column]["paper"] == value


def test_table_4_says_whether_a_rival_saw_the_same_scan():
    line = {c: 1. for c in ("spacing", "tp", "tn", "fp", "fn", "accuracy", "precision", "recall", "f1")} | {"regions": {"tp": 1, "fp": 0, "fn": 0}}
    got = {f"whole/{role}": {"row": line, "voxels": "a" + role, "places": []} for role in ("BEN", "INJ1")}
    stored = {"BEN": {"XceptionNet": line | {"voxels": "aBEN"}, "Ours": line | {"voxels": "aBEN"}}, "INJ1": {"XceptionNet": line | {"voxels": "other"}}}
    rows = ev.scan_table(got, {"BEN": "phantom-49-0", "INJ1": "phantom-52"}, stored)["rows"]
    assert rows["BEN/XceptionNet"]["tp"]["how"].endswith("on the same scan") and rows["INJ1/XceptionNet"]["tp"]["how"].endswith("on another scan")
    assert rows["BEN/ResNet50"]["tp"]["ours"] is None and "not shipped" in rows["BEN/ResNet50"]["tp"]["how"]
    assert "BEN/Ours, trained beside the rivals" in rows and not any(row.startswith("INJ1/Ours, trained") for row in rows)
    assert rows["INJ1/Ours-3D"]["recall"]["ours"] == 1 and rows["BEN/Ours-3D"]["recall"]["ours"] == 1


def test_whole_tests_of_phantoms_are_patients_of_their_own_and_others_take_turns(tmp_path):
    config = from_preset(ev.EvaluateConfig, "tiny")
    bench = ev.Bench(config, ev.find_tests("phantom", config))
    names = ev.whole_tests(bench)
    assert len(set(names.values())) == 8 and set(names.values()) <= set(bench.tests) and list(names)[:3] == ["BEN", "MAL", "INJ1"]
    (tmp_path / "one.nrrd").write_bytes(b"x")
    assert set(ev.whole_tests(ev.Bench(config, ev.find_tests(str(tmp_path), config))).values()) == {"one"}


def test_scans_keep_their_names_and_none_is_lost(tmp_path):
    for name in ("ct.mha", "ct.nrrd", "1.3.6.1.4.2.mhd", "b.nii.gz"): (tmp_path / name).write_bytes(b"x")
    assert set(ev.scans_below(tmp_path)) == {"ct.mha", "ct.nrrd", "1.3.6.1.4.2", "b"}
    assert [t.name for t in ev.find_tests(str(tmp_path / "1.3.6.1.4.2.mhd"))] == ["1.3.6.1.4.2"]


def test_a_kind_that_was_not_tested_is_a_blank_cell():
    assert ev.score_cells({"slices/a": slices(2)}, {"f1": .9}, "remove")["f1"] == {"ours": None, "low": None, "high": None, "paper": .9, "n": 0, "patients": 0}


def test_a_scan_that_cannot_be_used_says_so_every_time():
    bench = ev.Bench(from_preset(ev.EvaluateConfig, "tiny"), [ev.TestScan("thick", {}, lambda: SimpleNamespace(scan=Scan(np.zeros((8, 64, 64), np.int16), (9., 1., 1.))))])
    for _ in range(2):
        with pytest.raises(DataError, match="slices of 9 mm"): bench.source("thick")
    with pytest.raises(DataError, match="pixels of 0.3 mm"): ev.check_fit("odd", Scan(np.zeros((8, 64, 64), np.int16), (2., .3, .8)))


def test_a_broken_backbone_counts_as_none(tmp_path, monkeypatch):
    (tmp_path / "broken.pth").write_bytes(b"no")
    monkeypatch.setenv("MITS_LPIPS_BACKBONE", str(tmp_path / "broken.pth"))
    assert ev.lpips_backbone() is None
    monkeypatch.setenv("MITS_LPIPS_BACKBONE", str(tmp_path / "missing.pth"))
    assert ev.lpips_backbone() is None


def test_a_sweep_with_repeats_counts_places_and_not_trainings(tmp_path, monkeypatch):
    from mits_nb.protect.sweep import Sweep
    row = lambda value, repeat, db: {"value": value, "place": 0, "action": "remove", "cleaning": "nothing", "repeat": repeat, "square_rmse_hu": 1., "protected_4096_db": db, "protected_db": db, "square_ssim": .5}
    monkeypatch.setattr(Sweep, "load", classmethod(lambda cls, path: SimpleNamespace(info={"patient": "phantom 5"}, rows=[row(v, n, 10. + n) for v in (.2, .4, .6, .8, 1.) for n in (0, 1, 2)])))
    found = ev.sweep_rows("file")
    assert len(found["rows"]) == 5 and found["trainings"] == 3
    table = ev.alpha_table({"alpha/stored": found}, True, 20)
    assert table["rows"]["PSNR, peak = range"]["0.2"]["ours"] == 11. and table["rows"]["PSNR, peak = range"]["0.2"]["n"] == 1 and table["notes"][0].startswith("Means of 3 trainings per alpha")
