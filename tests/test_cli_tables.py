"""The command mits_tables: what it cannot do ends with exit code 2 and one sentence, and nothing finished is lost."""
import errno
import logging
import os

import pytest

from mits_nb import cli, evaluate as ev
from mits_nb.core import write_json


@pytest.fixture
def quick(monkeypatch):
    "Two cells instead of all tables: the command is tested, not the science."
    calls = []
    def table(name): return ev.Cell(f"table/cascade/{name}", lambda _: calls.append(name) or ev.detector_table("Table 1", {f"slices/{p}": {"probability": [.9, .1], "tampered": [True, False], "action": ["inject"] * 2} for p in "ab"}, {}, "x", 5), {"name": name})
    monkeypatch.setattr(ev, "table_cells", lambda bench, trained=None: [table("Table 1"), table("Table 3")])
    monkeypatch.setattr(ev.Bench, "data_cell", lambda self, name: ev.Cell(f"data/{name}", lambda _: {"voxels": name, "shape": [1, 2, 3], "spacing": [1., 1., 1.]}))
    return calls


def fails(argv, capsys, *expected):
    assert cli.mits_tables([str(a) for a in argv]) == 2
    shown = capsys.readouterr().err
    sentence = shown.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and "Traceback" not in shown
    for word in expected: assert word in sentence, sentence


def test_it_writes_page_and_json_and_the_second_run_computes_nothing(quick, tmp_path, capsys):
    assert cli.mits_tables(["--out", str(tmp_path)]) == 0
    said, first = capsys.readouterr().out, (tmp_path / "tables.json").read_bytes()
    assert "2 tables" in said and "tables.html" in said and quick == ["Table 1", "Table 3"]
    assert cli.mits_tables(["--out", str(tmp_path)]) == 0
    assert quick == ["Table 1", "Table 3"] and (tmp_path / "tables.json").read_bytes() == first


def test_unknown_data_set(tmp_path, capsys):
    fails(["--data", "lunar16", "--out", tmp_path], capsys, "unknown data set 'lunar16'", "luna16", "folder of scans")


def test_data_set_that_is_not_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MITS_CACHE", str(tmp_path / "cache"))
    fails(["--data", "luna16", "--out", tmp_path], capsys, "luna16 is not on this machine", "mits_data")


def test_a_scan_that_the_weights_do_not_fit(tmp_path, capsys, phantom):
    from dataclasses import replace
    from mits_nb.scan import write_scan
    write_scan(replace(phantom[0], spacing=(2.5, 5., 5.)), tmp_path / "coarse.mha")
    fails(["--data", tmp_path / "coarse.mha", "--out", tmp_path / "out"], capsys, "coarse has pixels of 5 mm", "resample")
    write_scan(replace(phantom[0], hu=phantom[0].hu[:3], spacing=(2.5, 1., 1.)), tmp_path / "thin.mha")
    fails(["--data", tmp_path / "thin.mha", "--out", tmp_path / "out"], capsys, "thin has 3 x 160 x 160 voxels")


def test_weights_that_are_not_there_or_are_something_else(tmp_path, capsys):
    fails(["--weights", "cascade=/nowhere", "--out", tmp_path], capsys, "no weights at /nowhere")
    with pytest.raises(SystemExit): cli.mits_tables(["--weights", "detector=x"])
    assert "ROLE=NAME" in capsys.readouterr().err


def test_a_results_folder_of_another_version(quick, tmp_path, capsys):
    write_json(tmp_path / "cells" / "store.json", ev.STORE | {"version": 0})
    fails(["--out", tmp_path], capsys, "version 0", "--out")
    assert quick == []


def test_a_corrupt_cell_is_computed_again_and_said_so(quick, tmp_path, capsys):
    cli.mits_tables(["--out", str(tmp_path)])
    next(p for p in (tmp_path / "cells").glob("*.json") if '"table/cascade/Table 3"' in p.read_text()).write_text("{")
    before = (tmp_path / "tables.json").read_bytes()
    capsys.readouterr()
    assert cli.mits_tables(["--out", str(tmp_path)]) == 0
    assert "Table 3 is computed again" in capsys.readouterr().err and quick == ["Table 1", "Table 3", "Table 3"] and (tmp_path / "tables.json").read_bytes() == before


def test_no_room_on_disk(quick, tmp_path, capsys, monkeypatch):
    real = os.fsync
    def full(file):
        if len(quick) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        real(file)
    monkeypatch.setattr(os, "fsync", full)
    fails(["--out", tmp_path], capsys, "No space left on device")
    monkeypatch.setattr(os, "fsync", real)
    assert cli.mits_tables(["--out", str(tmp_path)]) == 0
    assert quick == ["Table 1", "Table 3", "Table 3"]  # the first table was kept


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(["--out", tmp_path / "file"], capsys, "cannot write", "--out")
