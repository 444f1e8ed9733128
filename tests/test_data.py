"""Edges and properties of `mits_nb.data`: manifests, downloads with faults, importers on replicas, findings, splits, lung mask, places, cubes."""
import contextlib
import functools
import hashlib
import http.server
import json
import math
import shutil
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mits_nb import data
from mits_nb.core import DataError, PlaceError, UsageError
from mits_nb.scan import Scan, read_scan, write_scan

MANIFESTS = Path(__file__).parent.parent / "data_manifests"
OTHERS = {"schema", "published", "published-schema"}


# ---------------------------------------------------------------- manifests
@pytest.fixture(scope="module")
def schema():
    return json.loads((MANIFESTS / "schema.json").read_text(encoding="utf-8"))


def test_schema_is_a_schema(schema):
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("file", sorted(MANIFESTS.glob("*.json")), ids=lambda f: f.stem)
def test_manifest_follows_schema(schema, file):
    if file.stem in OTHERS: return
    manifest = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(manifest)
    assert manifest["name"] == file.stem
    assert data.load_manifest(file.stem) == manifest


def test_every_data_set_has_a_manifest():
    assert {"luna16", "lidc-idri", "ctgan-tampered", "m3dsynth", "btd", "squeezenet", "phantom"} == set(data.manifest_names())


def test_schema_refuses_a_direct_file_without_checksum(schema):
    manifest = data.load_manifest("squeezenet")
    del manifest["files"][0]["sha256"]
    with pytest.raises(jsonschema.ValidationError): jsonschema.Draft202012Validator(schema).validate(manifest)


@pytest.mark.parametrize("name,part,key", [("squeezenet", ("files", 0), "note"), ("ctgan-tampered", ("licence",), "note"), ("luna16", ("size",), "note"), ("lidc-idri", ("layout", 0), "note"), ("phantom", (), "derived_from")])
def test_schema_refuses_a_null_without_a_reason(schema, name, part, key):
    manifest = data.load_manifest(name)
    jsonschema.Draft202012Validator(schema).validate(manifest)
    inner = manifest
    for step in part: inner = inner[step]
    del inner[key]
    with pytest.raises(jsonschema.ValidationError): jsonschema.Draft202012Validator(schema).validate(manifest)


def test_manifests_name_each_other():
    for name in data.manifest_names():
        assert set(data.load_manifest(name)["derived_from"]) <= set(data.manifest_names())


@pytest.mark.parametrize("name", sorted(p.stem for p in MANIFESTS.glob("*.json") if p.stem not in OTHERS))
def test_describe_tells_what_a_reader_needs(name):
    text, manifest = data.describe(name), data.load_manifest(name)
    for words in (manifest["title"], manifest["licence"]["name"], manifest["access"]["how"], manifest["citation"][0], manifest["layout"][0]["path"]): assert words in text
    assert any(line.startswith(f"{name} ") and manifest["title"] in line for line in data.list_manifests())


def test_describe_a_short_manifest(tmp_path):
    (tmp_path / "own.json").write_text('{"name": "a", "access": {"kind": "direct", "how": "a file somewhere"}}')
    assert "a file somewhere" in data.describe(tmp_path / "own.json")

@pytest.mark.parametrize("name", ["nothing", "schema", "published", "published-schema", "../settings", ""])
def test_unknown_manifest(name):
    with pytest.raises(DataError, match="no manifest named"): data.load_manifest(name)


def test_own_manifest_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match="does not exist"): data.load_manifest(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"): data.load_manifest(tmp_path / "broken.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "a", "access": {"kind": "direct", "how": "a file somewhere"}, "files": "x"}', '{"name": "a", "access": {"kind": "direct", "how": "a file somewhere"}, "files": [{"name": "b", "bytes": "many"}]}', '{"name": "a"}', '{"name": "../a", "access": {"kind": "direct", "how": "x"}}', '{"name": 3, "access": {"kind": "direct", "how": "x"}}'])
def test_own_manifest_that_is_none(tmp_path, content):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(DataError, match="is not a (valid )?manifest"): data.load_manifest(tmp_path / "own.json")


# ---------------------------------------------------------------- published figures
def test_published_figures_follow_their_schema():
    schema, stored = (json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("published-schema", "published"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(stored)
    for t in stored["tables"]:
        assert t["paper"] in stored["papers"]
        assert all(len(row) == len(t["columns"]) for row in t["rows"].values()), t["table"]
        assert set(t["units"]) <= set(t["columns"]) or set(t["units"]) == set(t["rows"]), t["table"]


def test_published_figures_are_all_there():
    cells = data.published_cells()
    counts = {}
    for c in cells: counts[c["paper"], c["table"]] = counts.get((c["paper"], c["table"]), 0) + 1
    assert {t: n for (p, t), n in counts.items() if p == "mits-gan"} == {"Table 1": 16, "Table 2": 16, "Table 3": 20}
    assert {t: n for (p, t), n in counts.items() if p == "cascade"} == {"Table 1": 20, "Table 2": 8, "Table 3": 28, "Table 4": 24 * 9, "Table 4, 3D": 36, "Section 5": 4}
    assert all(c["unit"] for c in cells) and len({(c["paper"], c["table"], c["row"], c["column"]) for c in cells}) == len(cells)
    assert data.published("mits-gan", "Table 2")["PSNR"]["MITS-GAN tampered"] == 11.289
    assert data.published("cascade", "Table 3")["Ours-DCT"] == {"accuracy": .8383, "precision": .8512, "recall": .8200, "f1": .8353}
    assert data.published("m3dsynth", "TruFor")["diffusion"]["pd_at_1_percent"] == .97


def test_published_figures_agree_with_each_other():
    one, three = data.published("cascade", "Table 1"), data.published("cascade", "Table 3")
    assert one["Ours-SW"] == three["Ours-W"] and one["Ours"] == three["Ours"]
    for c in data.published_cells():
        if c["unit"] == "1" and c["value"] is not None: assert 0 <= c["value"] <= 1, c
    for name, row in data.published("cascade", "Table 4").items():  # only this row's scores were copied from another one
        if row["f1"] is not None: assert (abs(2 * row["tp"] / (2 * row["tp"] + row["fp"] + row["fn"]) - row["f1"]) > .006) == (name == "REM2/XceptionNet"), name


def test_unknown_published_table():
    with pytest.raises(DataError, match="Table 9.*use one of mits-gan, Table 1"): data.published("mits-gan", "Table 9")


# ---------------------------------------------------------------- fetching, from a server on this machine
class Server(http.server.BaseHTTPRequestHandler):
    """A server with faults. `mode` names the fault; `ranges` records from which byte each request asked."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def reply(self, status, headers, body=b"", wait=0):
        self.send_response(status)
        for key, value in headers.items(): self.send_header(key, str(value))
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            self.wfile.flush()
            if wait: self.state.released.wait(wait)  # stalls until the test is over
        self.close_connection = True

    def do_GET(self):
        state, mode, asked = self.state, self.state.mode, self.headers.get("Range")
        file = state.root / self.path.strip("/")
        start = int(asked.split("=")[1].rstrip("-")) if asked else 0
        state.ranges.append(start)
        if not file.is_file(): return self.reply(404, {"Content-Length": 0})
        body = file.read_bytes()
        if mode == "error": return self.reply(503, {"Content-Length": 0})
        if mode == "error once" and len(state.ranges) == 1: return self.reply(503, {"Content-Length": 0})
        if mode == "hangs up, then another range" and asked: return self.reply(206, {"Content-Range": f"bytes {start + 7}-{len(body) - 1}/{len(body)}", "Content-Length": len(body) - start - 7}, body[start + 7:])
        if mode == "ignores range" or not asked: start, status, headers = 0, 200, {}
        elif mode == "other range": return self.reply(206, {"Content-Range": f"bytes {start + 7}-{len(body) - 1}/{len(body)}", "Content-Length": len(body) - start - 7}, body[start + 7:])
        elif mode == "earlier range": start, status, headers = start // 2, 206, {"Content-Range": f"bytes {start // 2}-{len(body) - 1}/{len(body)}"}
        elif mode == "no content range": start, status, headers = start, 206, {}
        elif start >= len(body) or mode == "says 416": return self.reply(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": 0})
        else: status, headers = 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        rest = body[start:]
        if mode == "hangs up": return self.reply(status, headers | {"Content-Length": len(rest)}, rest[:state.portion])
        if mode in ("hangs up once", "hangs up, then another range") and len(state.ranges) == 1: return self.reply(status, headers | {"Content-Length": len(rest)}, rest[:state.portion])
        if mode == "stalls": return self.reply(status, headers | {"Content-Length": len(rest)}, b"" if start else rest[:state.portion], wait=20)
        if mode == "ends early": return self.reply(status, headers | {"Content-Length": len(rest) - 100}, rest[:-100])
        if mode == "promises more": return self.reply(status, headers | {"Content-Length": len(rest) + 100}, rest)
        if mode == "no length": return self.reply(status, headers, rest[:state.portion] if state.portion else rest)
        if mode == "endless": return self.reply(status, headers, rest * 50)
        self.reply(status, headers | {"Content-Length": len(rest)}, rest)


@pytest.fixture
def served(tmp_path, monkeypatch):
    "Folder that is served, manifest of one file in it, and the state of the server."
    monkeypatch.delenv("MITS_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()
    content = bytes(range(256)) * 400  # 102,400 bytes
    (root / "table.bin").write_bytes(content)
    state = SimpleNamespace(root=root, mode="", ranges=[], portion=30_000, released=threading.Event(), content=content, cache=tmp_path / "cache", path=tmp_path / "local.json")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Server,), {"state": state}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    state.manifest = {"name": "local", "access": {"kind": "direct", "how": "a file that a test serves"},
                      "files": [{"name": "table.bin", "about": "bytes", "url": f"{state.url}/table.bin", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]}
    def save(**changes):
        state.manifest["files"][0].update(changes)
        state.path.write_text(json.dumps(state.manifest))
    state.save = save
    save()
    def get(**options): return data.fetch(state.path, "table.bin", state.cache, **{"timeout": 5, "tries": 3, "pause": 0, **options})
    state.get = get
    yield state
    state.released.set()
    server.shutdown()
    server.server_close()


def files_in(folder):
    return [f for f in folder.rglob("*") if f.is_file()] if folder.exists() else []


def partial(served):
    "The one partial file, which never has the name of the whole."
    (part,) = files_in(served.cache)
    assert part.name.endswith(".part") and part.name.startswith(".")
    return part


def test_fetch_once_then_from_cache(served):
    first = served.get()
    assert first.read_bytes() == served.content and served.ranges == [0]
    assert served.get() == first and served.ranges == [0]
    assert files_in(served.cache) == [first]


def test_fetch_mends_a_damaged_cache(served):
    served.get().write_bytes(b"half")
    assert served.get().read_bytes() == served.content


def test_fetch_goes_on_where_the_line_broke(served):
    served.mode = "hangs up"
    assert served.get().read_bytes() == served.content
    assert served.ranges == [0, 30_000, 60_000, 90_000]
    assert [f.name for f in files_in(served.cache)] == ["table.bin"]


def test_fetch_goes_on_in_a_later_call(served):
    served.mode, served.portion = "stalls", 45_000
    with pytest.raises(DataError, match="kB of 102 kB are kept.*network"):
        data.fetch(served.path, "table.bin", served.cache, timeout=0.2, tries=1, pause=0)
    kept = partial(served).read_bytes()
    assert kept == served.content[:len(kept)] and 35_000 < len(kept) <= 45_000 and served.ranges == [0, len(kept)]
    served.mode = ""
    served.ranges.clear()
    assert served.get().read_bytes() == served.content and served.ranges == [len(kept)]


def test_fetch_gives_up_without_progress(served):
    served.mode, served.portion = "hangs up", 0
    with pytest.raises(DataError, match="3 times without progress.*nothing arrived"): served.get()
    assert len(served.ranges) == 3 and [f for f in files_in(served.cache) if f.stat().st_size] == []


def test_fetch_with_a_server_that_ignores_ranges(served):
    half = served.cache / "local" / f".table.bin.{served.manifest['files'][0]['sha256'][:16]}.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"x" * 50_000)
    served.mode = "ignores range"
    assert served.get().read_bytes() == served.content and served.ranges == [50_000]


@pytest.mark.parametrize("mode", ["other range", "earlier range", "no content range", "says 416"])
def test_fetch_with_a_wrong_answer_to_a_range(served, mode):
    half = served.cache / "local" / f".table.bin.{served.manifest['files'][0]['sha256'][:16]}.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(served.content[:50_000])
    served.mode = mode
    assert served.get().read_bytes() == served.content
    assert served.ranges == ([50_000] if mode == "earlier range" else [50_000, 0])


def test_fetch_never_joins_what_does_not_fit(served):
    "The same fault within one call, where no second chance from zero would mend it."
    served.mode = "hangs up, then another range"
    assert served.get().read_bytes() == served.content and served.ranges == [0, 30_000, 0]


@pytest.mark.parametrize("old", [b"y" * 50_000, b"y" * 102_400, b"y" * 200_000])
def test_fetch_forgets_a_part_that_does_not_belong(served, old):
    half = served.cache / "local" / f".table.bin.{served.manifest['files'][0]['sha256'][:16]}.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(old)
    assert served.get().read_bytes() == served.content
    assert [f.name for f in files_in(served.cache)] == ["table.bin"]


def test_fetch_refuses_wrong_bytes(served):
    (served.root / "table.bin").write_bytes(served.content[:-1] + b"x")
    with pytest.raises(DataError, match="checksum"): served.get()
    assert files_in(served.cache) == []


@pytest.mark.parametrize("size", [len(bytes(range(256)) * 400), None])
def test_fetch_refuses_a_truncated_file(served, size):
    "The server announces less than there is: seen at once where the size is known, by the checksum where it is not."
    served.save(bytes=size, note="a test of unknown size")
    served.mode = "ends early"
    with pytest.raises(DataError, match="102,300 bytes where 102,400" if size else "checksum"): served.get()
    assert files_in(served.cache) == []


@pytest.mark.parametrize("size", [102_400, None])
def test_fetch_refuses_a_server_that_promises_more(served, size):
    served.save(bytes=size, note="a test of unknown size")
    served.mode = "promises more"
    with pytest.raises(DataError, match="102,500 bytes where" if size else "without progress"): served.get()
    assert [f for f in files_in(served.cache) if not f.name.endswith(".part")] == []


def test_fetch_stops_an_endless_answer(served):
    served.mode = "endless"
    with pytest.raises(DataError, match="sends more than the 102,400"): served.get()
    assert [f.name for f in files_in(served.cache) if f.stat().st_size > 102_400 + 65_536] == []


def test_fetch_without_length(served):
    served.mode, served.portion = "no length", 0
    served.save(bytes=None, note="a test of unknown size")
    assert served.get().read_bytes() == served.content
    (served.cache / "local" / "table.bin").unlink()
    served.portion = 50_000  # closed early, which HTTP without a length cannot show: the checksum does
    with pytest.raises(DataError, match="checksum"): served.get()
    assert files_in(served.cache) == []


def test_fetch_counts_on_its_bar(served, monkeypatch):
    "The bar stands where the partial file ends, and arrives at the size of the file."
    bars = []
    class Bar:
        def __init__(self, desc, total, **more): self.n, self.total, self.seen = 0, total, []; bars.append(self)
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def update(self, n): self.n += n; self.seen.append(self.n)
    monkeypatch.setattr(data, "progress", lambda *a, **k: Bar(**k))
    served.mode = "hangs up"
    served.get()
    (bar,) = bars
    assert bar.n == bar.total == 102_400 and bar.seen == sorted(bar.seen)


def test_fetch_by_two_processes(served):
    fcntl = pytest.importorskip("fcntl")
    part = served.cache / "local" / f".table.bin.{served.manifest['files'][0]['sha256'][:16]}.part"
    part.parent.mkdir(parents=True)
    with open(part, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="table.bin.*another process"): served.get()
    assert served.get().read_bytes() == served.content


def test_fetch_tries_again_after_a_server_error(served):
    served.mode = "error once"
    assert served.get().read_bytes() == served.content and len(served.ranges) == 2
    (served.cache / "local" / "table.bin").unlink()
    served.mode = "error"
    with pytest.raises(DataError, match="status 503"): served.get()


def test_fetch_missing_on_server(served):
    (served.root / "table.bin").unlink()
    with pytest.raises(DataError, match="cannot be fetched .*404"): served.get()
    assert len(served.ranges) == 1  # asking again would not help


def test_fetch_unreachable(served):
    served.save(url="http://127.0.0.1:9/table.bin")
    with pytest.raises(DataError, match="check the network"): served.get()


def test_fetch_checks_the_disk_before(served, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    with pytest.raises(DataError, match="102 kB.*20.0 MB free"): served.get()
    assert files_in(served.cache) == []
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_200_000))
    served.get()


def test_fetch_to_a_place_that_cannot_be_written(served, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cannot be stored"): served.get()


def test_fetch_offline(served, monkeypatch):
    monkeypatch.setenv("MITS_OFFLINE", "1")
    with pytest.raises(DataError, match="MITS_OFFLINE"): served.get()
    assert served.ranges == []
    monkeypatch.setenv("MITS_OFFLINE", "0")
    served.get()
    monkeypatch.setenv("MITS_OFFLINE", "1")
    assert served.get().read_bytes() == served.content
    served.get().write_bytes(b"half")
    with pytest.raises(DataError, match="MITS_OFFLINE"): served.get()
    assert len(served.ranges) == 1


def test_fetch_unknown_file_and_data_on_request():
    with pytest.raises(DataError, match="has no file"): data.fetch("squeezenet", "other.pth")
    with pytest.raises(DataError, match="has no file"): data.fetch("lidc-idri", "x.dcm")
    with pytest.raises(DataError, match="cannot be fetched by itself"): data.fetch("m3dsynth", "cycle.tgz")


@pytest.mark.parametrize("name", ["../../evil.bin", "/etc/evil.bin", "..", "a\\b"])
def test_fetch_stays_in_its_folder(served, name):
    served.manifest["files"][0]["name"] = name
    served.save()
    with pytest.raises(DataError, match="name|valid manifest"): data.fetch(served.path, name, served.cache)
    assert files_in(served.cache) == [] and served.ranges == []


def zenodo(served, record):
    "A manifest whose facts come from the server, and the server's answer."
    (served.root / "17").write_text(json.dumps(record) if not isinstance(record, str) else record)
    served.path.write_text(json.dumps({"name": "zen", "access": {"kind": "zenodo", "how": "an archive that a test imitates", "records": ["17"], "api": served.url}, "files": []}))


def entry(served, **changes):
    return {"key": "table.bin", "checksum": f"md5:{hashlib.md5(served.content).hexdigest()}", "size": len(served.content), "links": {"self": f"{served.url}/table.bin"}, **changes}


def test_zenodo_answers_with_size_and_checksum(served, monkeypatch):
    zenodo(served, {"files": [entry(served)]})
    assert served.get().read_bytes() == served.content
    with pytest.raises(DataError, match="has no file"): data.fetch(served.path, "subset0.zip", served.cache)
    monkeypatch.setenv("MITS_OFFLINE", "1")  # what the archive said is remembered beside the file
    asked = len(served.ranges)
    assert served.get().read_bytes() == served.content and len(served.ranges) == asked
    served.get().write_bytes(b"half")
    with pytest.raises(DataError, match="MITS_OFFLINE"): served.get()


def test_zenodo_resumes_and_knows_the_size(served):
    zenodo(served, {"files": [entry(served)]})
    served.mode = "hangs up"
    assert served.get().read_bytes() == served.content
    zenodo(served, {"files": [entry(served, size=5)]})
    (served.cache / "zen" / "table.bin").unlink()
    with pytest.raises(DataError, match="102,400 bytes where 5 are expected"): served.get()


@pytest.mark.parametrize("answer", [{"unexpected": 1}, [1], {"files": [{"key": "table.bin"}]}, {"files": {"a": 1}}, "<html>busy</html>", {"files": [{"key": "t", "checksum": None, "size": 1, "links": {}}]}])
def test_zenodo_answers_nonsense(served, answer):
    zenodo(served, answer)
    with pytest.raises(DataError, match="lacks|cannot be asked"): served.get()
    assert files_in(served.cache) == []


def test_zenodo_is_down(served):
    zenodo(served, {"files": []})
    served.mode = "error"
    with pytest.raises(DataError, match="cannot be asked"): served.get()


# ---------------------------------------------------------------- the other ways to data
def test_download_says_how_each_set_is_had(served):
    assert [p.name for p in data.download(served.path, folder=served.cache)] == ["table.bin"]
    for name in ("ctgan-tampered", "btd", "m3dsynth"):
        with pytest.raises(DataError, match="cannot be fetched by a program: .*(Kaggle|GRIP)"): data.download(name)
    with pytest.raises(DataError, match="say which files of luna16.*subset9"): data.download("luna16")
    with pytest.raises(DataError, match="patient ids"): data.download("lidc-idri")
    for wrong in ("x", "-1", "1.5"):
        with pytest.raises(DataError, match="not the seed"): data.download("phantom", [wrong])


class Client:
    "Stands in for idc_index.IDCClient: the same call shape, no network."
    calls: list = []
    complete = True

    def __init__(self):
        import pandas
        rows = [("lidc_idri", "LIDC-IDRI-0001", "CT", "1.2.1", 5.0, 3), ("lidc_idri", "LIDC-IDRI-0001", "SEG", "1.2.2", 1.0, 1),
                ("lidc_idri", "LIDC-IDRI-0002", "CT", "1.2.3", 5.0, 3), ("other", "X-1", "CT", "1.2.4", 5.0, 3)]
        self.index = pandas.DataFrame(rows, columns=["collection_id", "PatientID", "Modality", "SeriesInstanceUID", "series_size_MB", "instanceCount"])

    @classmethod
    def client(cls): return cls()

    def download_from_selection(self, downloadDir, dry_run=False, collection_id=None, patientId=None, studyInstanceUID=None, seriesInstanceUID=None, **more):
        Client.calls.append(seriesInstanceUID)
        for uid in seriesInstanceUID:
            where = Path(downloadDir) / "lidc_idri" / "LIDC-IDRI-0001" / "1.2" / f"CT_{uid}"
            where.mkdir(parents=True)
            for k in range(3 if Client.complete else 2): (where / f"{k}.dcm").touch()


@pytest.fixture
def idc(monkeypatch):
    monkeypatch.delenv("MITS_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "idc_index", SimpleNamespace(IDCClient=Client))
    Client.calls, Client.complete = [], True


def test_idc_takes_the_ct_series_of_a_patient(idc, tmp_path):
    (place,) = data.download("lidc-idri", ["LIDC-IDRI-0001"], tmp_path)
    assert Client.calls == [["1.2.1"]] and place.name == "CT_1.2.1" and len(list(place.iterdir())) == 3


def test_idc_faults(idc, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no patient 'LIDC-IDRI-9999'"): data.download("lidc-idri", ["LIDC-IDRI-9999"], tmp_path)
    Client.complete = False
    with pytest.raises(DataError, match="2 of 3 slices"): data.download("lidc-idri", ["LIDC-IDRI-0001"], tmp_path)
    monkeypatch.setattr(Client, "download_from_selection", lambda self, **k: 1 / 0)
    with pytest.raises(DataError, match="could not download.*ZeroDivisionError"): data.download("lidc-idri", ["LIDC-IDRI-0002"], tmp_path)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match="5.0 MB"): data.download("lidc-idri", ["LIDC-IDRI-0002"], tmp_path)
    monkeypatch.setenv("MITS_OFFLINE", "1")
    with pytest.raises(DataError, match="MITS_OFFLINE"): data.download("lidc-idri", ["LIDC-IDRI-0002"], tmp_path)


def test_idc_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.delenv("MITS_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "idc_index", None)
    with pytest.raises(DataError, match=r"pip install idc-index"): data.download("lidc-idri", ["LIDC-IDRI-0001"], tmp_path)


def zipped(path, **files):
    import zipfile
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items(): out.writestr(name, content)
    return path


def test_unpack(tmp_path):
    archive = zipped(tmp_path / "subset0.zip", **{"subset0/a.mhd": "head", "subset0/a.raw": b"0" * 1000})
    assert sorted(f.name for f in data.unpack(archive).rglob("*.*")) == ["a.mhd", "a.raw"]
    assert data.match_layout(data.load_manifest("luna16"), data._paths_below(tmp_path))["subset[0-9]/*.mhd"] == ["subset0/subset0/a.mhd"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:evil"])
def test_unpack_writes_nowhere_else(tmp_path, name):
    archive = zipped(tmp_path / "in" / "a.zip" if (tmp_path / "in").mkdir() is None else None, **{"good": "1", name: "2"})
    with pytest.raises(DataError, match="outside its folder"): data.unpack(archive)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["a.zip"]


def test_unpack_of_damaged_archives(tmp_path, monkeypatch):
    good = zipped(tmp_path / "a.zip", a=bytes(range(256)) * 100).read_bytes()
    for content in (b"", b"nonsense", good[:-30], good[:200] + b"xxxx" + good[204:]):
        (tmp_path / "b.zip").write_bytes(content)
        with pytest.raises(DataError, match="cannot be unpacked"): data.unpack(tmp_path / "b.zip")
        assert not (tmp_path / "b").exists()
    with pytest.raises(DataError, match="does not exist"): data.unpack(tmp_path / "c.zip")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_010_000))
    with pytest.raises(DataError, match="25.6 kB"): data.unpack(tmp_path / "a.zip")


# ---------------------------------------------------------------- replicas of every data set's folder
SPACING = (2.0, 0.8, 0.7)


@pytest.fixture(scope="module")
def tiny():
    "A scan with an odd origin and unequal spacing."
    hu = np.random.default_rng(0).integers(-1000, 200, (5, 40, 48)).astype(np.int16)
    return Scan(hu, SPACING, (-100.5, -80.25, -300.0))


def write_series(scan, folder, patient, uid, names="{}.dcm"):
    "A DICOM series with names that count from 0 upwards in z, as CT-GAN's authors name them."
    import pydicom
    with_names = folder.parent / f".tmp-{uid}"
    write_scan(scan, with_names)
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted((pydicom.dcmread(f) for f in with_names.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    for k, slice_ in enumerate(files):
        slice_.PatientID, slice_.SeriesInstanceUID = patient, uid
        slice_.save_as(folder / names.format(k))
    shutil.rmtree(with_names)
    return folder


def circle_xml(scan, readers, uid="1.2.3", extra=""):
    """LIDC's XML. `readers`: for each a list of (centre (k, y, x), radius in mm, holes), drawn as the first pixels outside."""
    from scipy import ndimage as ndi
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(scan.shape, scan.spacing)), indexing="ij")
    def outline(centre, radius, inclusion):
        inside = (z - centre[0] * scan.spacing[0])**2 + (y - centre[1] * scan.spacing[1])**2 + (x - centre[2] * scan.spacing[2])**2 <= radius**2
        for k in np.flatnonzero(inside.any((1, 2))):
            edge = np.argwhere(ndi.binary_dilation(inside[k], np.ones((3, 3))) & ~inside[k])
            order = np.argsort(np.arctan2(*(edge - np.argwhere(inside[k]).mean(0)).T))
            points = "".join(f"<edgeMap><xCoord>{c}</xCoord><yCoord>{r}</yCoord></edgeMap>" for r, c in edge[order])
            yield f"<roi><imageZposition>{scan.voxel_to_world((k, 0, 0))[2]:.3f} </imageZposition><inclusion>{inclusion}</inclusion>{points}</roi>"
    sessions = []
    for nodules in readers:
        text = ""
        for centre, radius, *holes in nodules:
            rois = "".join(outline(centre, radius, "TRUE")) + "".join(r for hole in holes for r in outline(centre, hole, "FALSE"))
            text += f"<unblindedReadNodule><noduleID>n</noduleID>{rois}</unblindedReadNodule>"
        sessions.append(f"<readingSession>{text}{extra}</readingSession>")
    return f"<?xml version='1.0'?><LidcReadMessage xmlns='http://www.nih.gov'><ResponseHeader><SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>{''.join(sessions)}</LidcReadMessage>"


def luna16_replica(root, scan):
    for i, uid in enumerate(("1.3.6.1", "1.3.6.2", "1.3.6.3")):
        folder = root / f"subset{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{uid}.raw").write_bytes(scan.hu.tobytes())
        (folder / f"{uid}.mhd").write_text("ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
            f"Offset = {' '.join(map(str, scan.origin))}\nElementSpacing = {' '.join(map(str, scan.spacing[::-1]))}\nDimSize = {' '.join(map(str, scan.shape[::-1]))}\nElementType = MET_SHORT\nElementDataFile = {uid}.raw\n")
    (root / "CSVFILES").mkdir()
    (root / "CSVFILES" / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.3.6.1,-90.5,-70.25,-296.0,5.65\n1.3.6.2,-85,-60,-294.5,21.1\n")
    (root / "CSVFILES" / "candidates_V2.csv").write_text("seriesuid,coordX,coordY,coordZ,class\n1.3.6.1,-90.5,-70.25,-296.0,1\n1.3.6.1,-80.5,-70.25,-296.0,0\n")
    return root


def lidc_replica(root, scan):
    for patient, uid in (("LIDC-IDRI-0001", "1.3.6.1"), ("LIDC-IDRI-0002", "1.3.6.2"), ("LIDC-IDRI-0002", "1.3.6.9")):
        folder = write_series(scan, root / patient / "1.3" / uid, patient, uid, "1-{:03d}.dcm")
        (folder / "069.xml").write_text(circle_xml(scan, [[((2, 20, 24), 3.0)]] * 4, uid))
    xray = root / "LIDC-IDRI-0001" / "1.4" / "1.4.1"
    xray.mkdir(parents=True)
    shutil.copy(root / "LIDC-IDRI-0001/1.3/1.3.6.1/1-000.dcm", xray / "000000.dcm")
    import pydicom
    picture = pydicom.dcmread(xray / "000000.dcm")
    picture.Modality = "DX"
    picture.save_as(xray / "000000.dcm")
    (xray / "070.xml").write_text("<IdriReadMessage xmlns='http://www.nih.gov'><CXRreadingSession/></IdriReadMessage>")
    return root


def ctgan_replica(root, scan, kaggle=True):
    blind, open_ = ("CT_Scans/EXP1_blind", "CT_Scans/EXP2_open") if kaggle else ("Experiment 1 - Blind", "Experiment 2 - Open")
    for place, uuid in ((blind, "1280"), (blind, "4142"), (open_, "1280")): write_series(scan, root / place / uuid, uuid, f"1.2.{uuid}.{len(place)}")
    (root / "labels_exp1.csv").write_text("type,uuid,slice,x,y\nFB,1280,3,30,20\nFM,4142,0,10,12\nTB,4142,0,0,0\nTM,9999,1,2,3\n")
    (root / "labels_exp2.csv").write_text("type,uuid,z,x,y\nTM,1280,4,5,6\n")
    return root


def m3dsynth_replica(root, scan):
    from PIL import Image
    for mod, image in (("pix2pix", "rem_1"), ("pix2pix", "inj_2"), ("cycle", "rem_1")):
        for what in ("scan", "label"):
            folder = root / mod / what / image
            folder.mkdir(parents=True)
            for k in range(2): Image.fromarray((scan.hu[k] + 1024).astype(np.uint16)).save(folder / f"slide{k:04d}.tiff")
    (root / "data.csv").write_text("img_id,ty,mod,orig_id,sdir_id,coord_z,coord_y,coord_x\nrem_1,rem,pix2pix,LIDC-IDRI-0003,30,57,198,308\ninj_2,inj,pix2pix,LIDC-IDRI-0014,5,1,2,3\nrem_1,rem,cycle,LIDC-IDRI-0003,30,57,198,308\n")
    (root / "sets.csv").write_text("orig_id,set\nLIDC-IDRI-0003,train\nLIDC-IDRI-0014,test\n")
    return root


def btd_replica(root, scan):
    for what in ("injection", "removal"):
        (root / "CT" / what / "images").mkdir(parents=True)
        np.save(root / "CT" / what / "images" / "a_1.npy", scan.hu[0])
        (root / "CT" / what / f"CT_{what}.csv").write_text(f"path,x,y,type,CTGAN-CT-{what},SD-CT-{what}\nCT/{what}/images/a_1.npy,20,20,1,1,0\n")
    return root


def phantom_replica(root, scan):
    data.write_phantoms([3], root, shape=(4, 48, 48), spacing=(8.0, 7.5, 7.5))
    return root


def test_phantoms_share_one_table(replicas):
    folder = replicas["phantom"]
    before = data.read_findings(folder / "nodules.csv")
    files = data.write_phantoms([3], folder, shape=(4, 48, 48), spacing=(8.0, 7.5, 7.5))  # once more: nothing doubles
    assert data.read_findings(folder / "nodules.csv") == before and [f.name for f in files] == ["phantom-3.mha", "nodules.csv"]
    assert before and all(r.scan_id == "phantom-3" and r.placed for r in before)


def squeezenet_replica(root, scan):
    root.mkdir()
    (root / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"not the weights")
    return root


REPLICAS = {"luna16": luna16_replica, "lidc-idri": lidc_replica, "ctgan-tampered": ctgan_replica, "m3dsynth": m3dsynth_replica, "btd": btd_replica, "phantom": phantom_replica, "squeezenet": squeezenet_replica}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory, tiny):
    "One small folder per data set, in the layout of the real one, below one more folder as unpackers like to add."
    base = tmp_path_factory.mktemp("replicas")
    return {name: make(base / name / "unpacked" if name != "squeezenet" else base / name, tiny) for name, make in REPLICAS.items() if (base / name).mkdir() or name != "squeezenet" or (base / name).rmdir() is None}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MITS_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


def test_every_manifest_has_a_replica():
    assert set(REPLICAS) == set(data.manifest_names())


SCANS = {"luna16": ["1.3.6.1", "1.3.6.2", "1.3.6.3"], "lidc-idri": ["1.3.6.1", "1.3.6.2", "1.3.6.9"], "ctgan-tampered": ["exp1-1280", "exp1-4142", "exp2-1280"],
         "m3dsynth": ["cycle/rem_1", "pix2pix/inj_2", "pix2pix/rem_1"], "phantom": ["phantom-3"], "squeezenet": []}


@pytest.mark.parametrize("name", sorted(REPLICAS))
def test_import_recognises_each_data_set(replicas, own_cache, name):
    folder = replicas[name].parent if name != "squeezenet" else replicas[name]
    assert data.recognise(data._paths_below(folder))[0] == name
    found = data.import_folder(name, folder)
    if name != "btd": assert sorted(found.scans) == SCANS[name]
    else: assert len(found.scans) == 2
    assert all(path.exists() for path in found.scans.values()) and set(found.patients) == set(found.scans)
    again = data.open_dataset(name)  # remembered
    assert again.scans == found.scans and again.folder == found.folder
    assert data.dataset_folder(name) == folder.resolve()


@pytest.mark.parametrize("name", ["luna16", "lidc-idri", "ctgan-tampered", "phantom"])
def test_scans_of_a_replica_can_be_read(replicas, tiny, name):
    for path in data.open_dataset(name, replicas[name]).scans.values():
        scan = read_scan(path)
        if name != "phantom": assert np.array_equal(scan.hu, tiny.hu) and np.allclose(scan.spacing, tiny.spacing) and np.allclose(scan.origin, tiny.origin)


def test_import_says_what_is_missing(tmp_path, tiny):
    root = luna16_replica(tmp_path / "luna", tiny)
    missing = "; ".join(data.open_dataset("luna16", root).missing)
    assert "subset[0-9]/*.mhd: 3 of 888" in missing and "annotations" not in missing
    (root / "subset0" / "1.3.6.1.raw").unlink()
    (root / "CSVFILES" / "annotations.csv").unlink()
    found = data.open_dataset("luna16", root)
    assert "1.3.6.1" not in found.scans and {"annotations.csv: none", "1 .mhd without their voxels"} <= set(found.missing) and found.findings() == []


def test_import_of_the_wrong_folder(replicas, tmp_path, own_cache):
    with pytest.raises(DataError, match="holds nothing of luna16.*it looks like lidc-idri"): data.import_folder("luna16", replicas["lidc-idri"])
    with pytest.raises(DataError, match="holds nothing of luna16"): data.import_folder("luna16", tmp_path)
    with pytest.raises(DataError, match="not a folder"): data.import_folder("luna16", tmp_path / "none")
    with pytest.raises(DataError, match="no manifest named"): data.import_folder("luna17", tmp_path)
    with pytest.raises(DataError, match="not on this machine.*import luna16"): data.open_dataset("luna16")
    assert not own_cache.exists()


def test_patients_of_replicas(replicas):
    patients = {name: data.open_dataset(name, replicas[name]).patients for name in REPLICAS}
    assert patients["lidc-idri"] == {"1.3.6.1": "LIDC-IDRI-0001", "1.3.6.2": "LIDC-IDRI-0002", "1.3.6.9": "LIDC-IDRI-0002"}
    assert patients["ctgan-tampered"]["exp1-1280"] == patients["ctgan-tampered"]["exp2-1280"]
    assert patients["m3dsynth"]["pix2pix/rem_1"] == patients["m3dsynth"]["cycle/rem_1"] == "LIDC-IDRI-0003"
    assert data.split(SCANS["luna16"], patients=patients["lidc-idri"]) == data.split(SCANS["lidc-idri"][:2] + ["1.3.6.3"], patients=patients["lidc-idri"])


@pytest.mark.parametrize("pattern,path,fits", [
    ("annotations.csv", "annotations.csv", True), ("annotations.csv", "a/b/annotations.csv", True), ("annotations.csv", "my_annotations.csv", False),
    ("subset[0-9]/*.mhd", "x/subset3/1.2.mhd", True), ("subset[0-9]/*.mhd", "subset10/1.mhd", False), ("subset[0-9]/*.mhd", "subset1/deeper/1.mhd", False),
    ("subset[0-9]/*.mhd", "subset1/1xmhd", False), ("[0-9]*/*.dcm", "EXP1_blind/1280/3.dcm", True), ("[0-9]*/*.dcm", "EXP1_blind/3.dcm", False)])
def test_layout_patterns_match_ends_of_paths(pattern, path, fits):
    assert bool(data._ending(pattern).search(path)) == fits


# ---------------------------------------------------------------- verify
def test_verify_finds_damage(tmp_path, tiny):
    root = luna16_replica(tmp_path / "luna", tiny)
    (root / "SHA256SUMS").write_text("".join(f"{hashlib.sha256((root / f).read_bytes()).hexdigest()}  {f}\n" for f in ("subset0/1.3.6.1.raw", "CSVFILES/annotations.csv")) + f"{'0' * 64} *gone.csv\n")
    states = {c.file: c.state for c in data.verify(root, deep=True)}
    assert states["1.3.6.1.mhd"] == states["subset0/1.3.6.1.raw"] == states["1.3.6.1"] == "ok" and states["gone.csv"] == "missing"
    raw = root / "subset0" / "1.3.6.1.raw"
    raw.write_bytes(raw.read_bytes()[:-2])
    checks = {c.file: c for c in data.verify(root, deep=True)}
    assert checks["subset0/1.3.6.1.raw"].state == checks["1.3.6.1.mhd"].state == checks["1.3.6.1"].state == "damaged"
    assert "19,198 bytes, 19,200 expected" in checks["1.3.6.1.mhd"].why
    with pytest.raises(DataError, match="3 of 1[0-9] files.*damaged"): data.verdict(root, list(checks.values()))


@pytest.mark.parametrize("text", ["zz  a.csv\n", "only-one-word\n", "\xff\xfe"])
def test_verify_of_a_broken_list(tmp_path, text):
    (tmp_path / "SHA256SUMS").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="SHA256SUMS"): data.verify(tmp_path)


def test_verify_of_fetched_and_of_nothing(served, tmp_path, own_cache, replicas):
    with pytest.raises(DataError, match="nothing that can be verified"): data.verify(tmp_path)
    with pytest.raises(DataError, match="not on this machine"): data.verify("squeezenet")
    checks = data.verify(replicas["squeezenet"])
    assert [(c.file, c.state) for c in checks] == [("squeezenet1_1-b8a52dc0.pth", "damaged")]


# ---------------------------------------------------------------- findings
def test_luna_tables(replicas):
    root = replicas["luna16"] / "CSVFILES"
    rows = data.read_findings(root / "annotations.csv")
    assert rows[0] == data.Finding("1.3.6.1", -90.5, -70.25, -296.0, 5.65, "nodule", "LUNA16 annotations.csv") and len(rows) == 2
    assert [(r.label, r.diameter_mm) for r in data.read_findings(root / "candidates_V2.csv")] == [("nodule", None), ("candidate", None)]


def test_ctgan_labels_become_millimetres(replicas, tiny, caplog):
    found = {(r.scan_id, r.label): r for r in data.open_dataset("ctgan-tampered", replicas["ctgan-tampered"]).findings()}
    assert len(found) == 4 and "exp1-9999" in caplog.text  # the row of an absent scan is left out, and said
    for key, voxel in ((("exp1-1280", "FB"), (3, 20, 30)), (("exp1-4142", "FM"), (0, 12, 10)), (("exp2-1280", "TM"), (4, 6, 5))):
        assert np.allclose(found[key].centre, tiny.voxel_to_world(voxel), atol=1e-6) and found[key].diameter_mm is None
    assert not found["exp1-4142", "TB"].placed and all(r.placed for k, r in found.items() if k[1] != "TB")


def test_ctgan_layout_of_uci(tmp_path, tiny):
    root = ctgan_replica(tmp_path / "Tampered Scans", tiny, kaggle=False)
    assert sorted(data.open_dataset("ctgan-tampered", tmp_path).scans) == SCANS["ctgan-tampered"]
    assert len(data.read_findings(root / "labels_exp2.csv")) == 1


@pytest.mark.parametrize("text,words", [("type,uuid,slice,x,y\nXX,1280,1,2,3\n", "type 'XX'"), ("type,uuid,slice,x,y\nFM,1280,50,2,3\n", "names slice 50"), ("type,uuid,slice,x,y\nFM,1280,a,2,3\n", "line 2.*'a' as slice"),
                                        ("type,uuid,slice,x,y\nFM,1280,1,2\n", "another number of columns"), ("type,uuid,slice,x,y\nFM,1280,1,2,nan\n", "as y")])
def test_ctgan_labels_with_faults(replicas, tmp_path, text, words):
    (tmp_path / "labels_exp1.csv").write_text(text)
    with pytest.raises(DataError, match=words): data.read_findings(tmp_path / "labels_exp1.csv", data.open_dataset("ctgan-tampered", replicas["ctgan-tampered"]))


@pytest.mark.parametrize("text,words", [("", r"columns \(none\)"), ("a,b\n1,2\n", "columns a, b"), ("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,1,2,x,4\n", "line 2.*'x' as coordZ"),
                                        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,1,2,3,\n", "'' as diameter_mm"), ("seriesuid,coordX,coordY\n1,2,3\n", "no column 'coordZ'"),
                                        ("seriesuid,coordX,coordY,coordZ,class\n1.2,1,2,3,2\n", "class '2'"), ("scan_id,x_mm,y_mm,z_mm,diameter_mm\nA,1,2,inf,3\n", "'inf' as z_mm"),
                                        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,1,2,3,4,5\n", "number of columns"), ("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2,1,2\n", "number of columns"), ('seriesuid,coordX\n"a', "not a csv|no column")])
def test_tables_with_faults(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=words): data.read_findings(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"seriesuid,coordX,coordY,coordZ,diameter_mm\n\xff,1,2,3,4\n"])
def test_tables_in_no_encoding(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match="not a csv table|columns"): data.read_findings(tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot be read"): data.read_findings(tmp_path / "none.csv")


def test_tables_of_windows_and_empty_tables(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffseriesuid,coordX,coordY,coordZ,diameter_mm\r\n1.2,1,2,3,4\r\n".encode())
    assert data.read_findings(tmp_path / "t.csv")[0].centre == (1, 2, 3)
    (tmp_path / "t.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    assert data.read_findings(tmp_path / "t.csv") == []


coordinate = st.floats(-1e4, 1e4, allow_nan=False)
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(lambda t: t.strip() == t)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(data.Finding, text, coordinate, coordinate, coordinate, st.none() | st.floats(0.1, 200), text, text, st.none() | st.integers(1, 4)), max_size=8))
def test_own_table_comes_back_as_it_was(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("own") / "findings.csv"
    assert data.read_findings(data.write_findings(path, rows)) == rows


def test_own_table_keeps_statements_without_a_place(tmp_path):
    row = data.Finding("a", math.nan, math.nan, math.nan, None, "TB", "test")
    (back,) = data.read_findings(data.write_findings(tmp_path / "f.csv", [row]))
    assert not back.placed and back.label == "TB"


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    "A finer scan, 24 x 64 x 64, as a series; returns a function that reads an XML laid beside it."
    scan = Scan(np.full((24, 64, 64), -850, np.int16), (1.25, 0.8, 0.7), (-20.0, 30.0, -100.0))
    folder = write_series(scan, tmp_path_factory.mktemp("reading") / "s", "LIDC-IDRI-0001", "1.2.3")
    def read(text):
        (folder / "1.xml").write_text(text)
        return data.read_findings(folder / "1.xml")
    return scan, read


def test_lidc_four_readers_are_one_nodule(reading):
    scan, read = reading
    (row,) = read(circle_xml(scan, [[((12, 30, 33), r)] for r in (5.0, 6.0, 6.0, 7.0)]))
    assert row.readers == 4 and row.label == "nodule" and row.scan_id == "1.2.3"
    assert abs(row.diameter_mm - 12) < 0.4 and np.abs(row.centre - scan.voxel_to_world((12, 30, 33))).max() < 0.1


def test_lidc_outline_is_outside(reading):
    "The nodule is what the outline encloses, without the outline: filling it whole would make a ball of 4 mm too large by more than a pixel."
    scan, read = reading
    for radius in (2.0, 4.0, 8.0):
        z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(scan.shape, scan.spacing)), indexing="ij")
        count = ((z - 12 * 1.25)**2 + (y - 30 * 0.8)**2 + (x - 33 * 0.7)**2 <= radius**2).sum()
        (row,) = read(circle_xml(scan, [[((12, 30, 33), radius)]]))
        assert row.diameter_mm == pytest.approx((6 / math.pi * count * 1.25 * 0.8 * 0.7) ** (1 / 3), rel=1e-6)


def test_lidc_nodules_apart_holes_and_majority(reading):
    scan, read = reading
    rows = read(circle_xml(scan, [[((6, 15, 15), 4.0), ((18, 45, 45), 5.0)], [((6, 15, 15), 4.0)], [((6, 15, 15), 6.0)]]))
    assert sorted((r.readers, round(r.diameter_mm)) for r in rows) == [(1, 10), (3, 8)]  # two of three decide
    solid, = read(circle_xml(scan, [[((12, 30, 33), 7.0)]]))
    shell, = read(circle_xml(scan, [[((12, 30, 33), 7.0, 4.0)]]))
    assert shell.diameter_mm**3 == pytest.approx(solid.diameter_mm**3 - 8.0**3, rel=0.05)


def test_lidc_points(reading):
    scan, read = reading
    z = scan.voxel_to_world((5, 0, 0))[2]
    points = (f"<unblindedReadNodule><roi><imageZposition>{z}</imageZposition><inclusion>TRUE</inclusion><edgeMap><xCoord>10</xCoord><yCoord>20</yCoord></edgeMap></roi></unblindedReadNodule>"
              f"<nonNodule><imageZposition>{z}</imageZposition><locus><xCoord>40</xCoord><yCoord>50</yCoord></locus></nonNodule>")
    found = {r.label: r for r in read(circle_xml(scan, [[]], extra=points))}
    assert np.allclose(found["small nodule"].centre, scan.voxel_to_world((5, 20, 10)), atol=1e-3) and found["small nodule"].diameter_mm is None
    assert np.allclose(found["non-nodule"].centre, scan.voxel_to_world((5, 50, 40)), atol=1e-3)


@pytest.mark.parametrize("text,words", [("<a>", "well-formed"), ("<!DOCTYPE x [<!ENTITY a 'b'>]><LidcReadMessage/>", "entities"), ("", "well-formed"),
    ("<LidcReadMessage><readingSession><unblindedReadNodule><roi><edgeMap><xCoord>1</xCoord></edgeMap></roi></unblindedReadNodule></readingSession></LidcReadMessage>", "not a complete"),
    ("<LidcReadMessage><readingSession><unblindedReadNodule><roi><imageZposition>900</imageZposition><edgeMap><xCoord>1</xCoord><yCoord>1</yCoord></edgeMap></roi></unblindedReadNodule></readingSession></LidcReadMessage>", "no slice lies"),
    ("<LidcReadMessage><readingSession><nonNodule/></readingSession></LidcReadMessage>", "not a complete")])
def test_lidc_xml_with_faults(reading, text, words):
    with pytest.raises(DataError, match=words): reading[1](text)


def test_lidc_without_its_series(tmp_path, tiny):
    (tmp_path / "1.xml").write_text("<LidcReadMessage/>")
    with pytest.raises(DataError, match="no .dcm files"): data.read_findings(tmp_path / "1.xml")
    (tmp_path / "1.dcm").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no readable position"): data.read_findings(tmp_path / "1.xml")


def test_slices_follow_the_scan_also_obliquely(tmp_path, tiny):
    "Eq. 1 agrees with the scan's own voxel_to_world, which was checked against SimpleITK."
    for i, turn in enumerate((0.0, 0.3)):
        direction = np.array([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
        scan = Scan(tiny.hu, tiny.spacing, tiny.origin, direction)
        slices = data.Slices.of(write_series(scan, tmp_path / f"s{i}", "p", f"1.2.{i}"))
        for voxel in ((0, 0, 0), (4, 39, 47), (2.5, 10, 30.25)): assert np.allclose(slices.world(*voxel), scan.voxel_to_world(voxel), atol=1e-4)


def test_own_table_of_the_real_scans(data_dir):
    rows = data.read_findings(data_dir / "nodules.csv")
    assert len(rows) == 6 and {r.label for r in rows} == {"nodule", "tumour"} and [r.readers for r in rows] == [4, 4, 4, 4, 1, 1]
    scan = read_scan(data_dir / "LIDC-IDRI-0003.mha")
    labels = read_scan(data_dir / "LIDC-IDRI-0003_nodules.nii.gz").hu
    for value, row in enumerate((r for r in rows if r.scan_id == "LIDC-IDRI-0003"), 1):
        assert labels[tuple(np.rint(scan.world_to_voxel(row.centre)).astype(int))] == value
        assert (6 / math.pi * (labels == value).sum() * np.prod(scan.spacing)) ** (1 / 3) == pytest.approx(row.diameter_mm, abs=0.05)


def test_lidc_reading_beside_a_real_series(data_dir, tmp_path):
    "The consensus of the real nodule, drawn again as an LIDC outline over the real slices, gives the place and size that the data's own table states."
    from scipy import ndimage as ndi
    folder = tmp_path / "s"
    folder.mkdir()
    for file in (data_dir / "dicom" / "LIDC-IDRI-0001").glob("*.dcm"): (folder / file.name).symlink_to(file)
    labels, (row,) = read_scan(data_dir / "LIDC-IDRI-0001_nodules.nii.gz"), [r for r in data.read_findings(data_dir / "nodules.csv") if r.scan_id == "LIDC-IDRI-0001"]
    rois = []
    for k in np.flatnonzero((labels.hu > 0).any((1, 2))):
        inside = ndi.binary_fill_holes(labels.hu[k] > 0)
        edge = np.argwhere(ndi.binary_dilation(inside, np.ones((3, 3))) & ~inside)
        order = np.argsort(np.arctan2(*(edge - np.argwhere(inside).mean(0)).T))
        points = "".join(f"<edgeMap><xCoord>{c}</xCoord><yCoord>{r}</yCoord></edgeMap>" for r, c in edge[order])
        rois.append(f"<roi><imageZposition>{labels.voxel_to_world((k, 0, 0))[2]:.6f} </imageZposition><inclusion>TRUE</inclusion>{points}</roi>")
    (folder / "069.xml").write_text(f"<LidcReadMessage xmlns='http://www.nih.gov'><readingSession><unblindedReadNodule>{''.join(rois)}</unblindedReadNodule></readingSession></LidcReadMessage>")
    (found,) = data.read_findings(folder / "069.xml")
    assert np.linalg.norm(np.subtract(found.centre, row.centre)) < 1.0 and found.diameter_mm == pytest.approx(row.diameter_mm, rel=0.05)


# ---------------------------------------------------------------- splits
ids = st.lists(st.builds("LIDC-IDRI-{:04d}".format, st.integers(0, 1100)) | st.text(min_size=1, max_size=8), max_size=40)
shares = st.sampled_from([{"train": 0.8, "test": 0.2}, {"train": 0.7, "val": 0.1, "test": 0.2}, {"a": 1.0}, {"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 0.5, "c": 0.0}])


@settings(max_examples=100, deadline=None)
@given(ids, ids, shares, st.sampled_from(["mits_nb", "other"]))
def test_split_is_disjoint_complete_and_stable(first, more, shares, salt):
    parts = data.split(first, shares, salt=salt)
    flat = [scan for scans in parts.values() for scan in scans]
    assert sorted(flat) == sorted(set(first)) and list(parts) == list(shares)  # complete, nobody twice
    assert all(not scans for part, scans in parts.items() if shares[part] == 0)
    later = data.split(more + first, shares, salt=salt)
    assert all(set(parts[part]) <= set(later[part]) for part in shares)  # nobody moves when others come
    owners = {part: {data.patient_of(s) for s in scans} for part, scans in later.items()}
    assert sum(map(len, owners.values())) == len(set().union(*owners.values()))  # patients are disjoint, too


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.sampled_from("ABCDEFG"), max_size=30))
def test_split_keeps_a_patient_together(patients):
    parts = data.split(patients, patients=patients)
    assert not {patients[s] for s in parts["train"]} & {patients[s] for s in parts["test"]}


def test_split_hits_its_shares_and_nests():
    lidc = [f"LIDC-IDRI-{i:04d}" for i in range(1, 1011)]
    two, three = data.split(lidc), data.split(lidc, {"train": 0.7, "val": 0.1, "test": 0.2})
    assert abs(len(two["test"]) / len(lidc) - 0.2) < 3 * math.sqrt(0.16 / len(lidc))
    assert abs(len(three["val"]) / len(lidc) - 0.1) < 3 * math.sqrt(0.09 / len(lidc))
    assert three["test"] == two["test"] and two["test"] != data.split(lidc, salt="another")["test"]


def test_split_never_changes():
    "The rule is written in published results: these patients stay where they are."
    assert [data.split_of(f"LIDC-IDRI-{i:04d}") for i in (1, 2, 3, 4, 5, 6, 7, 8)] == FROZEN


FROZEN = ["train", "test", "train", "train", "train", "train", "train", "train"]


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.2, "b": -0.2}])
def test_split_refuses_odd_shares(shares):
    with pytest.raises(UsageError, match="add up to 1"): data.split_of("a", shares)


def test_patient_in_a_path():
    assert data.patient_of("x/LIDC-IDRI-0012/1.2/3") == "LIDC-IDRI-0012" and data.patient_of("LIDC-IDRI-00123") == "LIDC-IDRI-00123" and data.patient_of("1.2.3") == "1.2.3"


# ---------------------------------------------------------------- folders
def test_data_folder(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "nbs").mkdir(parents=True)
    monkeypatch.delenv("MITS_DATA", raising=False)
    monkeypatch.chdir(checkout / "nbs")
    assert data.data_folder() is None and data.development_scans() == {}
    shared = tmp_path / "shared" / "data"
    shared.mkdir(parents=True)
    assert data.data_folder() == shared
    monkeypatch.chdir(checkout)
    assert data.data_folder() == shared and data.development_scans() == {}
    (shared / "LIDC-IDRI-0003.mha").touch()
    assert data.development_scans() == {"LIDC-IDRI-0003": shared / "LIDC-IDRI-0003.mha"}
    monkeypatch.setenv("MITS_DATA", str(tmp_path / "nowhere"))
    assert data.data_folder() is None


# ---------------------------------------------------------------- lung mask
def as_scan(hu, spacing=(2.5, 2.2, 2.2)):
    return SimpleNamespace(hu=hu, spacing=spacing)


@pytest.fixture(scope="module")
def masked(phantom_small):
    scan, nodules = phantom_small
    return scan, nodules, data.lung_mask(scan)


@pytest.fixture(scope="module")
def phantom_small(request):
    return request.getfixturevalue("phantom")


def test_lung_mask_holds_lung_and_nodules(masked):
    scan, nodules, mask = masked
    assert mask.shape == scan.shape and mask.dtype == bool
    assert 0.05 < mask.mean() < 0.35
    assert -950 < np.median(scan.hu[mask]) < -700
    inside = [n for n in nodules if n.attached != "pleura"]  # at the pleura, in a corner wider than the coin, half of a nodule may stay out
    assert inside and all(mask[tuple(np.round(n.centre_voxel).astype(int))] for n in inside)
    assert not mask[:, :8].any() and not mask[:, :, :8].any() and not mask[:, :, -8:].any()  # no room air


def test_lung_mask_has_two_lungs(masked):
    from scipy import ndimage as ndi
    scan, _, mask = masked
    pieces, n = ndi.label(mask)
    sizes = np.sort(np.bincount(pieces.ravel())[1:])[::-1]
    assert n >= 2 and sizes[1] > 0.4 * sizes[0]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_lung_mask_of_few_slices(masked, keep):
    scan, _, mask = masked
    few = data.lung_mask(as_scan(scan.hu[10:10 + keep]))
    assert (few & mask[10:10 + keep]).sum() / (few | mask[10:10 + keep]).sum() > 0.97


def test_lung_mask_ignores_padding_and_dtype(masked):
    scan, _, mask = masked
    hu = scan.hu.copy()
    hu[:, :6], hu[:, :, -6:] = -3024, -2048
    assert (data.lung_mask(as_scan(hu)) == mask).mean() > 0.9999
    assert (data.lung_mask(as_scan(scan.hu.astype(np.float32))) == mask).all()


def test_lung_mask_does_not_touch_its_input(phantom):
    scan, _ = phantom
    before = scan.hu.copy()
    data.lung_mask(scan)
    assert (scan.hu == before).all()


@pytest.mark.parametrize("value", [-1000, 40, -3024])
def test_lung_mask_without_a_lung_is_empty(value):
    assert not data.lung_mask(as_scan(np.full((3, 60, 60), value, np.int16))).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (1, 33, 50)])
def test_lung_mask_of_odd_shapes(shape):
    assert data.lung_mask(as_scan(np.full(shape, -500, np.int16))).shape == shape


def test_lung_mask_with_odd_size_and_block(masked):
    scan, _, mask = masked
    fine = scan.hu[9:11].repeat(2, 1).repeat(2, 2)[:, :-1, :-3]  # 319 x 317 pixels of 1.1 mm
    found = data.lung_mask(as_scan(fine, (2.5, 0.7, 0.7)))
    assert found.shape == fine.shape and found.any()


# ---------------------------------------------------------------- places
def test_places_are_deep_in_lung(masked):
    from scipy import ndimage as ndi
    scan, _, mask = masked
    places = data.lung_places(scan, 20, seed=3, mask=mask)
    depth = ndi.distance_transform_edt(mask, sampling=scan.spacing)
    assert places.shape == (20, 3) and places.dtype.kind == "i"
    assert len({tuple(p) for p in places}) == 20
    assert depth[tuple(places.T)].min() >= 8.0
    room = np.minimum(places, np.array(mask.shape) - 1 - places) * np.array(scan.spacing)
    assert room.min() >= 8.0


def test_places_depend_on_the_seed_only(masked):
    scan, _, mask = masked
    a, b, c = (data.lung_places(scan, 5, seed=s, mask=mask) for s in (1, 1, 2))
    assert (a == b).all() and not (a == c).all()
    assert (data.lung_places(scan, 5, seed=1) == a).all()  # the mask it makes itself is the same


def test_places_in_a_thin_volume(masked):
    scan, _, mask = masked
    for keep in (1, 2, 3):
        thin = as_scan(scan.hu[10:10 + keep])
        places = data.lung_places(thin, 4)
        assert (places[:, 0] == (keep - 1) // 2).all() or keep == 2


def test_places_that_do_not_exist(masked):
    scan, _, mask = masked
    with pytest.raises(DataError, match="lower margin_mm or n"): data.lung_places(scan, 3, margin_mm=80, mask=mask)
    with pytest.raises(DataError, match="no lung"): data.lung_places(scan, 1, mask=np.zeros_like(mask))
    with pytest.raises(DataError, match="no lung"): data.lung_places(as_scan(np.full((3, 60, 60), 40, np.int16)), 1)


def test_zero_places(masked):
    scan, _, mask = masked
    assert data.lung_places(scan, 0, mask=mask).shape == (0, 3)


# ---------------------------------------------------------------- candidates
def ball_volume(at=(12, 60, 60), diameter=10.0, spacing=(2.0, 1.5, 1.5), shape=(24, 120, 120), hu=40):
    "Lung with one ball and one long vessel."
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing)), indexing="ij")
    c = np.array(at) * spacing
    ball = np.clip(diameter / 2 - np.sqrt((z - c[0]) ** 2 + (y - c[1]) ** 2 + (x - c[2]) ** 2) + 0.5, 0, 1)
    vessel = np.clip(3 - np.sqrt((y - 40) ** 2 + (x - 130) ** 2) + 0.5, 0, 1)
    return as_scan((-850 + (hu + 850) * np.maximum(ball, vessel)).round().astype(np.int16), spacing)


@pytest.mark.parametrize("diameter", [5, 8, 12])
def test_candidates_find_a_ball_before_a_vessel(diameter):
    scan = ball_volume(diameter=diameter)
    found = data.nodule_candidates(scan, n=3, mask=np.ones(scan.hu.shape, bool))
    assert np.abs((np.array(found[0].at) - (12, 60, 60)) * scan.spacing).max() <= 2.5
    assert abs(found[0].diameter_mm - diameter) < 2.0
    assert found[0].contrast_hu > 600
    assert all(a.score >= b.score for a, b in zip(found, found[1:]))


def test_candidates_are_the_same_every_time_and_count_is_kept(masked):
    scan, nodules, mask = masked
    first = data.nodule_candidates(scan, n=6, mask=mask)
    assert first == data.nodule_candidates(scan, n=6, mask=mask)
    assert len(first) <= 6 and first[:2] == data.nodule_candidates(scan, n=2, mask=mask)
    assert all(mask[c.at] and 4 <= c.diameter_mm <= 15 for c in first)
    solid = [n for n in nodules if n.kind == "solid" and n.diameter_mm < 15]
    near = lambda n: min(np.linalg.norm((np.array(c.at) - n.centre_voxel) * scan.spacing) for c in first[:2])
    assert any(near(n) <= n.diameter_mm / 2 for n in solid)


def test_no_candidates_where_there_is_nothing():
    plain = as_scan(np.full((6, 60, 60), -850, np.int16))
    assert data.nodule_candidates(plain, mask=np.ones((6, 60, 60), bool)) == []
    assert data.nodule_candidates(plain, mask=np.zeros((6, 60, 60), bool)) == []


def test_candidates_in_one_slice():
    scan = ball_volume()
    single = as_scan(scan.hu[12:13], scan.spacing)
    found = data.nodule_candidates(single, n=2, mask=np.ones(single.hu.shape, bool))
    assert found and all(c.at[0] == 0 for c in found)


# ---------------------------------------------------------------- places for a forgery
def lung_block(shape=(60, 160, 160), spacing=(1.5, 1.0, 1.0)):
    "A scan that is all lung, and a mask that says so."
    scan = Scan(np.full(shape, -850, np.int16), spacing)
    return scan, np.ones(shape, bool)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.tuples(st.floats(0, 59), st.floats(0, 159), st.floats(0, 159)), st.floats(0, 30)), max_size=3), st.integers(0, 5))
def test_injections_keep_clear_of_findings(known, seed):
    scan, mask = lung_block()
    try: places = data.forgery_places(scan, "inject", 2, known, seed, mask)
    except DataError: return  # no room left is an answer
    for p in places:
        assert all(16 <= v * s and (n - 1 - v) * s >= 16 - 1e-9 for v, s, n in zip(p, scan.spacing, scan.shape))
        for at, mm in known:  # brute force: no sample of the finding's surface lies in the cube
            directions = np.random.default_rng(0).normal(size=(200, 3))
            ball = (np.array(at) - p) * scan.spacing + directions / np.linalg.norm(directions, axis=1)[:, None] * mm / 2 * 0.999
            assert (np.abs(ball).max(1) >= 16 - 1e-6).all() and np.abs((np.array(at) - p) * scan.spacing).max() >= 16 - 1e-6
    assert max(abs(a - b) * s for a, b, s in zip(*places, scan.spacing)) >= 36


def test_injections_avoid_a_large_finding():
    scan, mask = lung_block()
    for seed in range(25):
        (p,) = data.forgery_places(scan, "inject", 1, [((30, 80, 80), 30.0)], seed, mask)
        offset = np.maximum(np.abs(np.array(p) - (30, 80, 80)) * scan.spacing - 16, 0)
        assert np.linalg.norm(offset) >= 15


def test_removal_takes_what_fits():
    scan, mask = lung_block()
    fits, wide, edge, near = ((30, 80, 80), 12.0), ((30, 30, 120), 25.0), ((30, 80, 5), 8.0), ((30, 80, 100), 9.0)
    assert data.forgery_places(scan, "remove", 1, [wide, edge, fits], mask=mask) == [(30, 80, 80)]
    for known in ([wide], [edge], [fits, near]):
        with pytest.raises(DataError, match="only 0 of 1 places to remove"): data.forgery_places(scan, "remove", 1, known, mask=mask)
    with pytest.raises(DataError, match="places to remove"): data.forgery_places(scan, "remove", 1, [fits], mask=~mask)
    with pytest.raises(UsageError, match="unknown action"): data.forgery_places(scan, "forge")


def test_places_from_findings_in_millimetres_and_from_blobs(masked):
    scan, nodules, mask = masked
    rows = [data.Finding("p", *n.centre_mm, n.diameter_mm, n.kind, "test") for n in nodules] + [data.Finding("p", math.nan, math.nan, math.nan, None, "TB", "test")]
    voxels = [(n.centre_voxel, n.diameter_mm) for n in nodules]
    assert data.forgery_places(scan, "inject", 1, rows, 2, mask) == data.forgery_places(scan, "inject", 1, voxels, 2, mask)
    (blob,) = data.forgery_places(scan, "remove", 1, mask=mask)
    assert mask[blob]


def test_places_in_real_scans(data_dir):
    rows = data.read_findings(data_dir / "nodules.csv")
    scan, mask = real(data_dir / "LIDC-IDRI-0003.mha")
    mine = [r for r in rows if r.scan_id == "LIDC-IDRI-0003"]
    (place,) = data.forgery_places(scan, "remove", 1, mine, mask=mask)
    assert np.linalg.norm((place - scan.world_to_voxel(mine[1].centre)) * scan.spacing) < 2  # the 9 mm nodule: the only one with room around it
    labels = read_scan(data_dir / "LIDC-IDRI-0003_nodules.nii.gz").hu
    for p in data.forgery_places(scan, "inject", 3, mine, mask=mask):
        cube = tuple(slice(max(0, math.ceil(c - 16 / s)), math.floor(c + 16 / s) + 1) for c, s in zip(p, scan.spacing))
        assert mask[p] and labels[cube].max() == 0


# ---------------------------------------------------------------- cubes
def ramp(shape=(30, 60, 70), spacing=(2.5, 0.7, 0.8)):
    "HU that rise linearly, so that interpolation must be exact."
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing)), indexing="ij")
    return Scan((-500 + 3 * z + 2 * y - 4 * x).astype(np.float32), spacing)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.floats(7, 22), st.floats(24, 35), st.floats(21, 48)), st.integers(2, 32))
def test_cube_is_exact_on_a_ramp(at, edge):
    scan = ramp()
    cube = data.isotropic_cube(scan, at, edge)
    j = np.arange(edge) - (edge - 1) / 2
    z, y, x = (a * s + j for a, s in zip(at, scan.spacing))
    expected = -500 + 3 * z[:, None, None] + 2 * y[None, :, None] - 4 * x[None, None]
    assert cube.shape == (edge,) * 3 and cube.dtype == np.float32 and np.abs(cube - expected).max() < 0.01


def test_cube_agrees_with_the_attack():
    "The pipeline of chapter 8 cuts the same cube."
    torch = pytest.importorskip("torch")
    from mits_nb.attack.tamper import cut_cube
    scan = ramp()
    for at in ((15, 30, 35), (3.3, 10.2, 60.9)):
        assert np.abs(data.isotropic_cube(scan, at, pad_hu=None) - cut_cube(torch.as_tensor(scan.hu), at, scan.spacing).numpy()).max() < 0.02


def test_cube_at_the_border():
    scan = ramp()
    cube = data.isotropic_cube(scan, (0, 30, 35))
    assert (cube[:15] == -1000).all() and (cube[17] != -1000).all()
    assert (data.isotropic_cube(scan, (0, 30, 35), pad_hu=None) > -999).all()
    for at in ((-1, 5, 5), (30, 5, 5), (5, 5), (math.nan, 5, 5)):
        with pytest.raises(PlaceError, match="outside the volume"): data.isotropic_cube(scan, at)


def test_sixty_seven_copies():
    cube = np.random.default_rng(1).normal(-600, 200, (46, 46, 46)).astype(np.float32)
    copies = dict(data.augmented_copies(cube))
    assert list(copies) == data.copy_names() and len(copies) == 67 and {c.shape for c in copies.values()} == {(32, 32, 32)}
    middle = cube[7:39, 7:39, 7:39]
    assert np.array_equal(copies["as it is"], middle) and np.array_equal(copies["flip y"], middle[:, ::-1]) and np.array_equal(copies["flip x"], middle[:, :, ::-1])
    assert np.array_equal(copies["flip yx"], middle[:, ::-1, ::-1]) and np.array_equal(copies["shift +4 -4"], cube[7:39, 3:35, 11:43])
    assert np.abs(copies["turn 90"] - np.rot90(middle, 1, (1, 2))).max() < 0.01 or np.abs(copies["turn 90"] - np.rot90(middle, -1, (1, 2))).max() < 0.01
    assert min(c.min() for c in copies.values()) >= cube.min() and max(c.max() for c in copies.values()) <= cube.max()


def test_copies_as_released():
    "The released recipe, step by step with SciPy: 40, shift with zeros, spline turns with reflection, trim."
    from scipy import ndimage as ndi
    cube = np.random.default_rng(2).normal(-600, 200, (40, 40, 40)).astype(np.float32)
    copies = dict(data.augmented_copies(cube, variant="released"))
    for name, big in (("shift +4 -4", ndi.shift(cube, (0, 4, -4), mode="constant")), ("turn 36", ndi.rotate(cube, 36, axes=(1, 2), mode="reflect", reshape=False)), ("flip y", np.flip(cube, 1))):
        assert np.abs(copies[name] - big[4:36, 4:36, 4:36]).max() < 0.01, name


def test_copies_invent_nothing_from_46():
    "Everything outside the inscribed cylinder is marked; no mark may reach a copy."
    n = data.COPIES_EDGE
    assert n >= 32 * math.sqrt(2)
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    cube = np.where(np.hypot(y, x) > 23.9, 5000.0, 0.0)[None].repeat(n, 0).astype(np.float32)
    assert max(c.max() for name, c in data.augmented_copies(cube) if "turn" in name) == 0


@pytest.mark.parametrize("shape,variant", [((39, 46, 46), "ours"), ((46, 46), "ours"), ((46, 46, 46), "theirs")])
def test_copies_refuse(shape, variant):
    with pytest.raises(UsageError): next(data.augmented_copies(np.zeros(shape, np.float32), variant=variant))


def sources(alive, n=3):
    "Scans that are counted while they live."
    def load(i):
        scan = Scan(np.full((20, 60, 60), i, np.int16), (2.5, 1.0, 1.0))
        alive.add(scan)
        return scan
    return [data.CubeSource(f"s{i}", functools.partial(load, i), ((10, 30, 30), (10, 28, 33))) for i in range(n)]


def test_stream_holds_one_scan_at_a_time():
    alive, seen = weakref.WeakSet(), []
    for item in data.cube_stream(sources(alive), buffer=16):
        seen.append((item["scan_id"], item["at"], item["copy"]))
        assert len(alive) <= 1 and item["hu"].shape == (32, 32, 32) and (item["hu"] == int(item["scan_id"][1])).all()
    assert len(seen) == len(set(seen)) == 3 * 2 * 67
    assert [s for s, *_ in seen] != sorted(s for s, *_ in seen)  # dealt, not in order


def test_stream_is_lazy_and_the_same_for_a_seed():
    alive = weakref.WeakSet()
    assert next(data.cube_stream(sources(alive), copies=False, buffer=1))["copy"] == "as it is" and len(alive) <= 1
    order = [[(i["scan_id"], i["copy"]) for i in data.cube_stream(sources(alive, 1), buffer=32, seed=s)] for s in (1, 1, 2)]
    assert order[0] == order[1] != order[2]
    assert list(data.cube_stream([])) == []


def test_dataset_for_torch():
    torch = pytest.importorskip("torch")
    import pickle
    alive = weakref.WeakSet()
    dataset = data.cube_dataset(sources(alive), copies=False, buffer=1)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=4))
    assert [tuple(b["hu"].shape) for b in batches] == [(4, 1, 32, 32, 32), (2, 1, 32, 32, 32)] and batches[0]["hu"].dtype == torch.float32
    picklable = data.cube_dataset([data.CubeSource("a", Path, ())], copies=False)
    assert isinstance(pickle.loads(pickle.dumps(picklable)), torch.utils.data.IterableDataset)
    two = list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2))  # every scan in one worker, none twice
    assert sorted(i["scan_id"] for i in two) == ["s0", "s0", "s1", "s1", "s2", "s2"]


# ---------------------------------------------------------------- real scans
@functools.lru_cache(maxsize=None)
def real(path):
    "A real scan and its lung mask, read once for all tests."
    scan = read_scan(path)
    return scan, data.lung_mask(scan)


@pytest.mark.parametrize("name", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_real_nodules_are_in_the_mask(data_dir, name):
    scan, mask = real(data_dir / data.DEVELOPMENT[name])
    labels = read_scan(data_dir / f"{name}_nodules.nii.gz").hu
    for value in range(1, labels.max() + 1): assert mask[labels == value].mean() >= 0.98
    assert mask[labels > 0].mean() >= 0.98


@pytest.mark.parametrize("name", list(data.DEVELOPMENT))
def test_real_masks_hold_lung_and_nothing_outside(data_dir, name):
    from scipy import ndimage as ndi
    scan, mask = real(data_dir / data.DEVELOPMENT[name])
    litres = mask.sum() * np.prod(scan.spacing) / 1e6
    assert 1.2 < litres < 4 and -900 < np.median(scan.hu[mask]) < -800
    dense = scan.hu > -300  # the body by another road: large dense piece per slice, holes filled
    for k in range(scan.shape[0]):
        pieces, _ = ndi.label(ndi.binary_opening(dense[k], iterations=3))
        body = ndi.binary_fill_holes(pieces == 1 + np.bincount(pieces.ravel())[1:].argmax())
        assert (mask[k] & ~ndi.binary_dilation(body, iterations=3)).sum() <= 0.001 * mask[k].sum(), k
    assert (scan.hu[mask] > 300).mean() < 0.01 and (scan.hu[mask] > -400).mean() < 0.08  # bone and wall stay out; vessels and nodules are in
    assert not mask[:, :10].any() and not mask[:, -10:].any() and not mask[:, :, :10].any() and not mask[:, :, -10:].any()


def test_real_scan_mask_places_candidates(data_dir):
    scan, mask = real(data_dir / "LIDC-IDRI-0003.mha")
    found = data.nodule_candidates(scan, n=3, mask=mask)
    for centre, diameter in (((30.7, 198.0, 307.6), 9.4), ((31.7, 219.3, 221.3), 13.1)):
        assert min(np.linalg.norm((np.array(c.at) - centre) * scan.spacing) for c in found) <= diameter / 2
    assert mask[tuple(data.lung_places(scan, 30, mask=mask).T)].all()
