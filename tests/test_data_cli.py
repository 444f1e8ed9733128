"""The command mits_data: every subcommand works, and bad input ends with exit code 2 and one sentence."""
import hashlib
import http.server
import json
import functools
import threading

import numpy as np
import pytest

from mits_nb.cli import mits_data
from mits_nb.data import manifest_names, open_dataset
from mits_nb.scan import Scan, write_scan


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache of this test only; nothing may reach the network."
    monkeypatch.setenv("MITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MITS_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def luna(tmp_path):
    "Two scans in LUNA16's layout, with a list of checksums."
    root = tmp_path / "luna" / "subset0"
    for uid in ("1.1", "1.2"):
        write_scan(Scan(np.zeros((3, 16, 16), np.int16), (2.0, 1.0, 1.0)), root / f"{uid}.mhd")
    (root.parent / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.1,1,2,3,4\n")
    return root.parent


def fails(words, capsys, *expected):
    "Run mits_data; it must end with code 2 and one sentence that has the expected words."
    assert mits_data(words) == 2
    shown = capsys.readouterr()
    sentence = shown.err.strip()
    assert sentence.startswith("error: ") and "\n" not in sentence and "Traceback" not in shown.err, shown.err
    for word in expected: assert word in sentence, sentence


def test_list_and_info(capsys):
    assert mits_data(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == manifest_names()
    for name in manifest_names():
        assert mits_data(["info", name]) == 0
        assert "licence" in capsys.readouterr().out


def test_fetch_from_a_server(cache, tmp_path, capsys):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.csv").write_bytes(b"1,2,3\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        file = {"name": "a.csv", "url": f"http://127.0.0.1:{server.server_port}/a.csv", "sha256": hashlib.sha256(b"1,2,3\n").hexdigest()}
        (tmp_path / "own.json").write_text(json.dumps({"name": "own", "access": {"kind": "direct", "how": "a file that a test serves"}, "files": [file]}))
        assert mits_data(["fetch", str(tmp_path / "own.json")]) == 0
        assert capsys.readouterr().out.strip() == str(cache / "own" / "a.csv")
        assert mits_data(["fetch", str(tmp_path / "own.json"), "a.csv", "--out", str(tmp_path / "here")]) == 0
        assert (tmp_path / "here" / "own" / "a.csv").read_bytes() == b"1,2,3\n"
        (tmp_path / "web" / "a.csv").write_bytes(b"1,2,4\n")
        capsys.readouterr()
        fails(["fetch", str(tmp_path / "own.json"), "--out", str(tmp_path / "there")], capsys, "a.csv", "checksum")
        assert not [f for f in (tmp_path / "there").rglob("*") if f.is_file()]
    finally:
        server.shutdown()
        server.server_close()


def test_import_and_verify(cache, luna, capsys):
    assert mits_data(["import", "luna16", str(luna)]) == 0
    shown = capsys.readouterr().out
    assert "2 scans of 2 patients, 1 tables" in shown and "2 of 888" in shown
    assert sorted(open_dataset("luna16").scans) == ["1.1", "1.2"]
    for target in ("luna16", str(luna)):
        assert mits_data(["verify", target, "--deep"]) == 0
        assert "nothing is damaged" in capsys.readouterr().out
    next(luna.rglob("1.1.*raw")).write_bytes(b"short")
    fails(["verify", "luna16", "--deep"], capsys, "damaged", "1.1")


@pytest.mark.parametrize("words,expected", [
    (["info", "luna17"], "luna17"), (["info", "none.json"], "none.json"), (["info", ""], "no manifest"),
    (["fetch", "luna17"], "luna17"), (["fetch", "luna16"], "subset0.zip"), (["fetch", "ctgan-tampered"], "Kaggle"), (["fetch", "btd"], "Kaggle"), (["fetch", "m3dsynth"], "GRIP"),
    (["fetch", "lidc-idri"], "patient ids"), (["fetch", "phantom"], "seeds"), (["fetch", "phantom", "one"], "one"), (["fetch", "squeezenet", "other.pth"], "other.pth"),
    (["fetch", "squeezenet", "../x"], "path"), (["fetch", "squeezenet", "--timeout", "0"], "--timeout"), (["fetch", "squeezenet", "--tries", "0"], "--tries"),
    (["verify", "no-such-folder"], "no-such-folder"), (["verify", "luna16"], "not on this machine"), (["verify", ""], ""),
    (["import", "luna16", "no-such-folder"], "no-such-folder"), (["import", "luna17", "."], "luna17")])
def test_bad_input(cache, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    fails(words, capsys, expected)


def test_fetch_offline(cache, monkeypatch, capsys):
    monkeypatch.setenv("MITS_OFFLINE", "1")
    for words in (["fetch", "luna16", "annotations.csv"], ["fetch", "squeezenet"], ["fetch", "lidc-idri", "LIDC-IDRI-0001"]): fails(words, capsys, "MITS_OFFLINE")


def test_lidc_without_its_package(cache, monkeypatch, capsys):
    import sys
    monkeypatch.setitem(sys.modules, "idc_index", None)
    fails(["fetch", "lidc-idri", "LIDC-IDRI-0001"], capsys, "pip install idc-index")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "a"}', '{"name": "a", "access": {"kind": "magic", "how": "nobody knows how"}}', '{"name": "a", "access": {"kind": "direct", "how": "somehow, some day"}, "layout": 3}',
                                     '{"name": "a", "access": {"kind": "direct", "how": "somehow, some day"}, "licence": "free"}', '{"name": "a", "access": {"kind": "direct", "how": 5}}'])
def test_broken_manifests(cache, tmp_path, capsys, content):
    (tmp_path / "own.json").write_text(content)
    for command in ("info", "fetch"): fails([command, str(tmp_path / "own.json")], capsys, "own.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"luna16": 3}', "\x00"])
def test_broken_notes_of_imports(cache, luna, capsys, content):
    "A damaged note in the cache is one sentence, not a trace, and an import mends it or says so."
    cache.mkdir()
    (cache / "imported.json").write_text(content)
    fails(["verify", "luna16"], capsys, "")
    assert mits_data(["import", "luna16", str(luna)]) == 0
    assert mits_data(["verify", "luna16"]) == 0


def test_wrong_words(capsys):
    for words in ([], ["bogus"], ["fetch"], ["verify"], ["import", "luna16"], ["list", "more"]):
        with pytest.raises(SystemExit) as stopped: mits_data(words)
        assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err
