"""The command mits_tamper: DICOM in, DICOM out, marked and with its truth beside it; bad input ends with exit code 2 and one sentence."""
import json
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from mits_nb.attack.ctgan import CTGAN
from mits_nb.attack.tamper import ground_truth
from mits_nb.cli import mits_tamper
from mits_nb.core import weights_path
from mits_nb.scan import Scan, read_scan, sidecar_path, write_scan

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture(scope="module")
def source(tmp_path_factory, phantom):
    "The phantom as a DICOM series, and as a .mha file."
    folder = tmp_path_factory.mktemp("source")
    write_scan(phantom[0], folder / "series")
    write_scan(phantom[0], folder / "scan.mha")
    return folder


@pytest.fixture(scope="module")
def places(phantom):
    "Two voxels in the lung."
    from mits_nb.data import lung_mask, lung_places
    return [tuple(int(v) for v in p) for p in lung_places(phantom[0], 2, seed=0, mask=lung_mask(phantom[0]), margin_mm=5)]


def words(at): return ",".join(f"{v:g}" for v in at)


def fails(argv, capsys, *expected):
    assert mits_tamper([str(a) for a in argv]) == 2
    shown = capsys.readouterr()
    sentence = shown.err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and "Traceback" not in shown.err, shown.err
    for word in expected: assert word in sentence, sentence


def test_dicom_in_dicom_out(source, places, tmp_path, capsys):
    out = tmp_path / "forged"
    assert mits_tamper([str(source / "series"), str(out), "--at", words(places[0]), "--at", words(places[1]), "--action", "inject", "--seed", "4"]) == 0
    shown = capsys.readouterr()
    real, forged = read_scan(source / "series"), read_scan(out)
    same = CTGAN.from_pretrained("ctgan-tiny").tamper(real, places, "inject", seed=4)
    assert np.array_equal(forged.hu, same.hu) and forged.history == same.history                  # the command is the library, and the truth comes back
    truth = ground_truth(forged)
    assert np.array_equal(truth.mask, forged.hu != real.hu) and truth.mask.any() and [p["at"] for p in truth.places] == [list(p) for p in places]
    assert shown.err == "" and str(sidecar_path(out)) in shown.out and "2.5 x 2.2 x 2.2 mm" in shown.out
    for place in places: assert f"voxel z,y,x = {', '.join(map(str, place))}; world x,y,z = " in shown.out
    files = sorted(out.iterdir())
    assert len(files) == real.shape[0]
    before, after = (pydicom.dcmread(p) for p in (source / "series" / files[3].name, files[3]))
    assert list(after.ImageType)[:2] == ["DERIVED", "SECONDARY"] and after.SeriesDescription.startswith("TEACHING FORGERY") and after.SOPInstanceUID != before.SOPInstanceUID
    assert f"inject at voxel {tuple(float(v) for v in places[0])}" in after.private_block(0x4D49, "MITS_NB")[0x01].value


@pytest.mark.parametrize("name", ["out.mha", "out.nrrd", "out.nii.gz", "out.mhd"])
def test_files_in_files_out(source, places, tmp_path, name):
    assert mits_tamper([str(source / "scan.mha"), str(tmp_path / name), "--at", words(places[0]), "--action", "remove", "--no-lung-check"]) == 0
    back, real = read_scan(tmp_path / name), read_scan(source / "scan.mha")
    assert "TEACHING FORGERY" in back.meta["marker"] and back.history[0]["action"] == "remove"
    assert np.array_equal(ground_truth(back).mask, back.hu != real.hu)
    told = json.loads(sidecar_path(tmp_path / name).read_text())
    assert told["history"][0]["settings"]["mask"] == 20 and np.allclose(told["history"][0]["at_mm"], real.voxel_to_world(places[0]))
    image = sitk.ReadImage(str(tmp_path / name))                                                  # another library sees the mark
    assert any("TEACHING FORGERY" in image.GetMetaData(k) for k in image.GetMetaDataKeys())


def test_world_is_lps_millimetres_and_may_be_negative(tmp_path, phantom, places):
    scan = phantom[0]
    moved = Scan(scan.hu, scan.spacing, (-170., 30., -900.), scan.direction)
    write_scan(moved, tmp_path / "moved.mha")
    at = moved.voxel_to_world(places[0])
    assert at[0] < 0 and at[2] < 0
    for name, option, text in (("w.mha", ["--system", "world"], ",".join(f"{v:.6f}" for v in at)), ("v.mha", [], words(places[0]))):
        assert mits_tamper([str(tmp_path / "moved.mha"), str(tmp_path / name), "--at", text, *option, "--no-lung-check"]) == 0
    w, v = (read_scan(tmp_path / name) for name in ("w.mha", "v.mha"))
    assert np.allclose(w.history[0]["at"], places[0], atol=1e-4) and np.abs(w.hu.astype(int) - v.hu).max() <= 1 and (v.hu != scan.hu).any()


def test_same_seed_same_bytes(source, places, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert mits_tamper([str(source / "series"), str(tmp_path / name), "--at", words(places[0]), "--seed", seed, "--no-lung-check"]) == 0
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b and a != c


def test_place_outside_the_lung_is_forged_with_a_warning(source, places, tmp_path, capsys):
    assert mits_tamper([str(source / "scan.mha"), str(tmp_path / "a.mha"), "--at", words(places[0]), "--at", "12,5,80"]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "12, 5, 80" in lines[0] and "outside the lung" in lines[0]
    assert mits_tamper([str(source / "scan.mha"), str(tmp_path / "b.mha"), "--at", "12,5,80", "--no-lung-check"]) == 0
    assert capsys.readouterr().err == ""


def test_nothing_is_overwritten_unless_told(source, places, tmp_path, capsys):
    at = ["--at", words(places[0]), "--no-lung-check"]
    (tmp_path / "a.mha").write_text("precious")
    fails([source / "scan.mha", tmp_path / "a.mha", *at], capsys, "exists already", "--overwrite")
    assert (tmp_path / "a.mha").read_text() == "precious"
    assert mits_tamper([str(source / "scan.mha"), str(tmp_path / "a.mha"), *at, "--overwrite"]) == 0
    before = (source / "scan.mha").read_bytes()
    for extra in ([], ["--overwrite"]): fails([source / "scan.mha", source / "scan.mha", *at, *extra], capsys, "input itself")
    fails([source / "series", source / "series", *at, "--overwrite"], capsys, "input itself")
    (tmp_path / "home").mkdir(); (tmp_path / "home" / "thesis.docx").write_text("precious" * 50)
    fails([source / "series", tmp_path / "home", *at, "--overwrite"], capsys, "thesis.docx")
    assert (source / "scan.mha").read_bytes() == before and (tmp_path / "home" / "thesis.docx").exists()


def test_bad_input(source, places, tmp_path, capsys):
    at, out = ["--at", words(places[0])], tmp_path / "out.mha"
    fails([tmp_path / "nowhere", out, *at], capsys, "nowhere", "does not exist")
    fails([source / "scan.mha", out, "--at", "12,500,80"], capsys, "outside the volume")
    fails([source / "scan.mha", out, *at, "--at", "-3,5,80"], capsys, "outside the volume")
    fails([source / "scan.mha", out, "--at", "1e6,0,0", "--system", "world"], capsys, "outside the volume")
    fails([source / "scan.mha", tmp_path / "out.png", *at, "--no-lung-check"], capsys, "suffix")
    (tmp_path / "file").write_text("x")
    fails([source / "scan.mha", tmp_path / "file" / "out.mha", *at], capsys, "cannot write", "OUT")
    fails([source / "scan.mha", out, *at, "--weights", "no-such-weights"], capsys, "no-such-weights")
    fails([source / "scan.mha", out, *at, "--device", "abacus"], capsys, "abacus")
    assert not out.exists() and not sidecar_path(out).exists()


def test_pictures_other_modalities_and_odd_spacings(tmp_path, phantom, places, capsys):
    hu, spacing, at = phantom[0].hu, phantom[0].spacing, ["--at", words(places[0])]
    image = sitk.GetImageFromArray(np.clip((hu + 1350) / 1500 * 255, 0, 255).astype(np.uint8)); image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(tmp_path / "window.mha"))
    fails([tmp_path / "window.mha", tmp_path / "out.mha", *at], capsys, "to 255", "8-bit")
    for wrong, word in (((25., 2.2, 2.2), "at most 20"), ((2.5, 0.1, 0.1), "cuboid has 32 mm")):
        write_scan(Scan(hu, wrong), tmp_path / "odd.mha")
        fails([tmp_path / "odd.mha", tmp_path / "out.mha", *at], capsys, word)
    write_scan(phantom[0], tmp_path / "mr")
    for path in (tmp_path / "mr").iterdir():
        ds = pydicom.dcmread(path); ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"; ds.Modality = "MR"; ds.save_as(path)
    fails([tmp_path / "mr", tmp_path / "out", *at], capsys, "MR Image")
    assert not (tmp_path / "out.mha").exists() and not (tmp_path / "out").exists()


def test_damaged_weights(source, places, tmp_path, capsys):
    import shutil
    shutil.copytree(weights_path("ctgan-tiny"), tmp_path / "w")
    model = tmp_path / "w" / "injector" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:5000])
    fails([source / "scan.mha", tmp_path / "out.mha", "--at", words(places[0]), "--weights", tmp_path / "w"], capsys, "injector")


def test_disk_full_leaves_nothing(source, places, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pydicom.dataset.Dataset, "save_as", full)
    fails([source / "series", tmp_path / "out", "--at", words(places[0]), "--no-lung-check"], capsys, "No space left")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b"], ["a", "b", "--at"], ["a", "b", "--at", "1,2"], ["a", "b", "--at", "1,2,x"], ["a", "b", "--at", "nan,2,3"], ["a", "b", "--at", "1,2,3", "--action", "melt"],
                                  ["a", "b", "--at", "1,2,3", "--system", "inch"]])
def test_wrong_words(argv, capsys):
    with pytest.raises(SystemExit) as stopped: mits_tamper(argv)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_help_explains_the_coordinates():
    shown = subprocess.run([sys.executable, "-c", "import sys; from mits_nb.cli import mits_tamper; sys.exit(mits_tamper(['--help']))"], capture_output=True, text=True)
    assert shown.returncode == 0 and "LPS" in shown.stdout and "mm" in shown.stdout and shown.stderr == ""


def test_real_series(data_dir, tmp_path, capsys):
    import csv
    folder, out = data_dir / "dicom" / "LIDC-IDRI-0001", tmp_path / "forged"
    with open(data_dir / "nodules.csv") as lines: row = next(r for r in csv.DictReader(lines) if r["scan_id"] == "LIDC-IDRI-0001")
    assert mits_tamper([str(folder), str(out), "--at", ",".join(row[k] for k in ("x_mm", "y_mm", "z_mm")), "--system", "world", "--action", "remove"]) == 0
    assert capsys.readouterr().err == ""                                                          # a known nodule lies in the lung
    real, forged = read_scan(folder), read_scan(out)
    truth = ground_truth(forged)
    assert np.array_equal(truth.mask, forged.hu != real.hu) and 0 < truth.mask.mean() < 0.01
    assert np.allclose(truth.places[0]["at_mm"], [float(row[k]) for k in ("x_mm", "y_mm", "z_mm")], atol=0.01)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir() if p.suffix == ".dcm")
    untouched = next(i for i in range(real.shape[0]) if not truth.mask[i].any())
    a, b = (pydicom.dcmread(p / real.source.names[untouched]) for p in (folder, out))
    assert a.PixelData == b.PixelData and b.SeriesDescription.startswith("TEACHING FORGERY")      # marked also where nothing changed
