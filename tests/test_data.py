"""Edges and properties of `mits_nb.data`: manifests, fetching, lung mask, places, candidates."""
import contextlib
import functools
import hashlib
import http.server
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from mits_nb import data
from mits_nb.core import DataError

MANIFESTS = Path(__file__).parent.parent / "data_manifests"


# ---------------------------------------------------------------- manifests
@pytest.fixture(scope="module")
def schema():
    return json.loads((MANIFESTS / "schema.json").read_text(encoding="utf-8"))


def test_schema_is_a_schema(schema):
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("file", sorted(MANIFESTS.glob("*.json")), ids=lambda f: f.stem)
def test_manifest_follows_schema(schema, file):
    if file.stem == "schema": return
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


@pytest.mark.parametrize("name", ["nothing", "schema", "../settings", ""])
def test_unknown_manifest(name):
    with pytest.raises(DataError, match="no manifest named"): data.load_manifest(name)


def test_own_manifest_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match="does not exist"): data.load_manifest(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"): data.load_manifest(tmp_path / "broken.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "a"}', '{"name": "../a", "access": {"kind": "direct", "how": "x"}}', '{"name": 3, "access": {"kind": "direct", "how": "x"}}'])
def test_own_manifest_that_is_none(tmp_path, content):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(DataError, match="is not a manifest"): data.load_manifest(tmp_path / "own.json")


# ---------------------------------------------------------------- fetching, from a server on this machine
class Server(http.server.SimpleHTTPRequestHandler):
    hits = 0
    cut = False

    def log_message(self, *args): pass

    def do_GET(self):
        type(self).hits += 1
        if not self.cut: return super().do_GET()
        body = (Path(self.directory) / self.path.strip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])  # promises the whole, hangs up after one half


@pytest.fixture
def served(tmp_path, monkeypatch):
    "Folder that is served, manifest of one file in it, the handler class."
    monkeypatch.delenv("MITS_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()
    content = bytes(range(256)) * 400
    (root / "table.bin").write_bytes(content)
    handler = type("Handler", (Server,), {"hits": 0, "cut": False})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    manifest = {"name": "local", "access": {"kind": "direct", "how": "a test"},
                "files": [{"name": "table.bin", "url": f"{url}/table.bin", "sha256": hashlib.sha256(content).hexdigest()}]}
    path = tmp_path / "local.json"
    path.write_text(json.dumps(manifest))
    yield SimpleNamespace(root=root, manifest=manifest, path=path, handler=handler, url=url, content=content, cache=tmp_path / "cache")
    server.shutdown()
    server.server_close()


def files_in(folder):
    return [f for f in folder.rglob("*") if f.is_file()] if folder.exists() else []


def test_fetch_once_then_from_cache(served):
    first = data.fetch(served.path, "table.bin", served.cache)
    assert first.read_bytes() == served.content and served.handler.hits == 1
    assert data.fetch(served.path, "table.bin", served.cache) == first and served.handler.hits == 1
    assert files_in(served.cache) == [first]


def test_fetch_mends_a_damaged_cache(served):
    first = data.fetch(served.path, "table.bin", served.cache)
    first.write_bytes(b"half")
    assert data.fetch(served.path, "table.bin", served.cache).read_bytes() == served.content


def test_fetch_refuses_wrong_bytes(served):
    (served.root / "table.bin").write_bytes(served.content[:-1] + b"x")
    with pytest.raises(DataError, match="checksum"): data.fetch(served.path, "table.bin", served.cache)
    assert files_in(served.cache) == []


def test_fetch_keeps_nothing_of_a_cut_connection(served):
    served.handler.cut = True
    with pytest.raises(DataError): data.fetch(served.path, "table.bin", served.cache, timeout=5)
    assert files_in(served.cache) == []


def test_fetch_missing_on_server(served):
    (served.root / "table.bin").unlink()
    with pytest.raises(DataError, match="cannot be fetched"): data.fetch(served.path, "table.bin", served.cache)


def test_fetch_offline(served, monkeypatch):
    monkeypatch.setenv("MITS_OFFLINE", "1")
    with pytest.raises(DataError, match="MITS_OFFLINE"): data.fetch(served.path, "table.bin", served.cache)
    assert served.handler.hits == 0
    monkeypatch.setenv("MITS_OFFLINE", "0")
    data.fetch(served.path, "table.bin", served.cache)
    monkeypatch.setenv("MITS_OFFLINE", "1")
    assert data.fetch(served.path, "table.bin", served.cache).read_bytes() == served.content


def test_fetch_offline_with_a_damaged_cache(served, monkeypatch):
    file = data.fetch(served.path, "table.bin", served.cache)
    file.write_bytes(b"half")
    monkeypatch.setenv("MITS_OFFLINE", "1")
    hits = served.handler.hits
    with pytest.raises(DataError, match="MITS_OFFLINE"): data.fetch(served.path, "table.bin", served.cache)
    assert served.handler.hits == hits


def test_fetch_unknown_file_and_data_on_request():
    with pytest.raises(DataError, match="has no file"): data.fetch("squeezenet", "other.pth")
    with pytest.raises(DataError, match="has no file"): data.fetch("lidc-idri", "x.dcm")


@pytest.mark.parametrize("name", ["../../evil.bin", "/etc/evil.bin", "..", "a\\b"])
def test_fetch_stays_in_its_folder(served, name):
    served.manifest["files"][0]["name"] = name
    served.path.write_text(json.dumps(served.manifest))
    with pytest.raises(DataError, match="name"): data.fetch(served.path, name, served.cache)
    assert files_in(served.cache) == [] and served.handler.hits == 0


def test_zenodo_answers_with_checksums(served):
    digest = hashlib.md5(served.content).hexdigest()
    (served.root / "17").write_text(json.dumps({"files": [
        {"key": "table.bin", "checksum": f"md5:{digest}", "size": len(served.content), "links": {"self": f"{served.url}/table.bin"}}]}))
    (served.root / "18").write_text(json.dumps({"unexpected": 1}))
    manifest = {"name": "zen", "access": {"kind": "zenodo", "how": "a test", "records": ["17"], "api": served.url}, "files": []}
    served.path.write_text(json.dumps(manifest))
    assert data.fetch(served.path, "table.bin", served.cache).read_bytes() == served.content
    with pytest.raises(DataError, match="has no file"): data.fetch(served.path, "subset0.zip", served.cache)
    manifest["access"]["records"] = ["18"]
    served.path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="lacks"): data.fetch(served.path, "table.bin", served.cache)


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
    assert all(mask[tuple(np.round(n.centre_voxel).astype(int))] for n in nodules)
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


# ---------------------------------------------------------------- real scans
def test_real_scan_mask_places_candidates(data_dir):
    import time
    import SimpleITK as sitk
    image = sitk.ReadImage(str(data_dir / "LIDC-IDRI-0003.mha"))
    scan = as_scan(sitk.GetArrayFromImage(image), image.GetSpacing()[::-1])
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(data_dir / "LIDC-IDRI-0003_nodules.nii.gz")))
    start = time.process_time()
    mask = data.lung_mask(scan)
    assert time.process_time() - start < 5
    for value in range(1, 5): assert mask[labels == value].mean() >= 0.98
    litres = mask.sum() * np.prod(scan.spacing) / 1e6
    assert 2.5 < litres < 3.7
    found = data.nodule_candidates(scan, n=3, mask=mask)
    for centre, diameter in (((30.7, 198.0, 307.6), 9.4), ((31.7, 219.3, 221.3), 13.1)):
        assert min(np.linalg.norm((np.array(c.at) - centre) * scan.spacing) for c in found) <= diameter / 2
    assert mask[tuple(data.lung_places(scan, 30, mask=mask).T)].all()
