"""The commands: bad input ends with exit code 2 and one sentence; the chain writes what it promises, the same each time."""
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mits_nb.cli import DemoConfig, apart, choose_places, mits_demo, mits_train, run_demo
from mits_nb.core import MitsError, PlaceError
from mits_nb.scan import Scan, read_scan, write_scan


def fails(words, out, capsys, *expected):
    "Run mits_demo; it must end with code 2, one sentence that has the expected words, and nothing written."
    before = sorted(p.name for p in out.iterdir()) if out.is_dir() else None
    assert mits_demo([*words, "--out", str(out)]) == 2
    shown = capsys.readouterr()
    sentence = shown.err.strip()
    assert sentence.startswith("error: ") and "\n" not in sentence and "Traceback" not in shown.err, shown.err
    for word in expected:
        assert word in sentence, sentence
    if before is not None:
        assert sorted(p.name for p in out.iterdir()) == before
    elif not out.is_file():
        assert not out.exists() or not any(out.iterdir())


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    "A small valid DICOM series."
    from mits_nb.phantom import make_phantom

    folder = tmp_path_factory.mktemp("series") / "a"
    write_scan(make_phantom(seed=2, shape=(6, 64, 64), spacing=(5.0, 5.5, 5.5))[0], folder)
    return folder


def test_missing_path(tmp_path, capsys):
    fails(["--scan", str(tmp_path / "nowhere")], tmp_path / "out", capsys, "nowhere")


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    fails(["--scan", str(tmp_path / "empty")], tmp_path / "out", capsys, "empty")


def test_truncated_dicom(series, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(series, broken)
    file = sorted(broken.iterdir())[2]
    file.write_bytes(file.read_bytes()[:-3000])
    fails(["--scan", str(broken)], tmp_path / "out", capsys, file.name)


def test_two_series(series, tmp_path, capsys):
    both = tmp_path / "both"
    shutil.copytree(series, both)
    other = write_scan(read_scan(series).with_hu(read_scan(series).hu + np.int16(1), {"kind": "protected", "by": "test", "seed": 0, "strength_hu": 1}), tmp_path / "other")
    for i, file in enumerate(sorted(Path(other).iterdir())):
        shutil.copy(file, both / f"other-{i}.dcm")
    fails(["--scan", str(both)], tmp_path / "out", capsys, "series")


def test_2d_image(tmp_path, capsys):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((64, 64), np.int16)), str(tmp_path / "flat.mha"))
    fails(["--scan", str(tmp_path / "flat.mha")], tmp_path / "out", capsys, "flat.mha")


def test_unreadable_header(tmp_path, capsys):
    (tmp_path / "noise.mha").write_bytes(bytes(range(256)) * 10)
    fails(["--scan", str(tmp_path / "noise.mha")], tmp_path / "out", capsys, "noise.mha")


@pytest.mark.parametrize("option", ["--inject", "--remove"])
def test_place_outside(series, tmp_path, capsys, option):
    fails(["--scan", str(series), option, "900,30,30"], tmp_path / "out", capsys, "outside", "900")


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    fails([], tmp_path / "file" / "out", capsys, "--out")


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    fails([], tmp_path / "file", capsys, "file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_words_that_are_not_a_voxel(capsys):
    with pytest.raises(SystemExit) as stop:
        mits_demo(["--inject", "1,2"])
    assert stop.value.code == 2
    assert "z,y,x" in capsys.readouterr().err


def test_full_preset_without_weights(tmp_path, capsys):
    fails(["--preset", "full"], tmp_path / "out", capsys, "ctgan-full")


def test_train_with_missing_data(tmp_path, capsys):
    assert mits_train(["attack", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "w")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_command_line_has_no_traceback(tmp_path):
    command = [sys.executable, "-W", "error::DeprecationWarning:mits_nb", "-c", "import sys; from mits_nb.cli import mits_demo; sys.exit(mits_demo(sys.argv[1:]))"]
    result = subprocess.run([*command, "--scan", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_places_do_not_overlap(phantom):
    scan, _ = phantom
    for seed in range(5):
        places = choose_places(scan, seed=seed)
        assert apart(places["inject"], places["remove"], scan.spacing)
        assert choose_places(scan, seed=seed) == places
    with pytest.raises(PlaceError, match="overlap"):
        choose_places(scan, inject=(12, 80, 80), remove=(12, 82, 80))


def test_no_lung_is_an_error(phantom):
    scan, _ = phantom
    with pytest.raises(PlaceError, match="no lung"):
        choose_places(scan.with_hu(np.full_like(scan.hu, 40)))


SMALL = dict(phantom_shape=(16, 256, 256), phantom_spacing=(3.0, 1.4, 1.4))


def same(metrics):
    "The part of the metrics that must not change from run to run."
    metrics = copy.deepcopy(metrics)
    return {key: value for key, value in metrics.items() if key not in ("seconds", "peak_rss_mb")}


def test_chain_writes_everything_and_repeats_itself(tmp_path):
    lines = []
    first = run_demo(DemoConfig(out=str(tmp_path / "a"), seed=4, **SMALL), say=lines.append)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep")
    second = run_demo(DemoConfig(out=str(tmp_path / "b"), seed=4, **SMALL), say=lines.append)
    assert same(first) == same(second)
    names = {"forged.mha", "forged.mha.forgery.json", "metrics.json", "protected.mha", "protected_forged.mha", "protected_forged.mha.forgery.json", "report.html"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    assert {p.name for p in (tmp_path / "b").iterdir()} == names | {"mine.txt"}

    stored = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert same(stored) == same(first)
    assert {a["action"] for a in stored["attack"]} == {"inject", "remove"}
    assert all(a["voxels_changed"] > 0 for a in stored["attack"])
    for name in ("forged", "protected", "protected_forged"):
        for part in ("whole", "square"):
            assert {"rmse_hu", "psnr_4096_db", "psnr_range_db", "ssim", "lpips"} <= set(stored[name][part])
            assert stored[name][part]["rmse_hu"] > 0
            assert stored[name][part]["lpips"] is not None or stored[name][part]["lpips_reason"]
    for name in ("real", "forged", "protected", "protected_forged"):
        verdict = stored["detect"][name]
        assert len(verdict["slices"]) == 16 and verdict["windows_per_slice"] > 0
        assert any(s["truth"] for s in verdict["slices"]) == ("forged" in name)
        assert 0 <= verdict["accuracy"] <= 1

    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    assert not re.search(r'(src|href)="(?!data:)', page), "the report stands alone"
    forged, protected, both = (read_scan(tmp_path / "a" / f"{n}.mha") for n in ("forged", "protected", "protected_forged"))
    assert "FORGERY" in forged.meta["marker"].upper() and "FORGERY" in both.meta["marker"].upper()
    assert "FORGERY" not in protected.meta["marker"].upper()
    outside = np.ones(forged.shape, bool)
    for attack in stored["attack"]:
        outside[tuple(slice(a, b) for a, b in attack["box"])] = False
    assert np.array_equal(both.hu[outside], protected.hu[outside])
    assert not np.array_equal(both.hu, protected.hu)


def test_another_seed_is_another_result(tmp_path):
    from mits_nb.phantom import make_phantom

    scan = make_phantom(seed=5, shape=(16, 256, 256), spacing=(3.0, 1.4, 1.4))[0]
    assert choose_places(scan, seed=1)["inject"] != choose_places(scan, seed=2)["inject"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    import mits_nb.cli as cli

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "report_html", full_disk)
    with pytest.raises(MitsError, match="No space left"):
        run_demo(DemoConfig(out=str(tmp_path / "out"), **SMALL), say=lambda line: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_real_dicom_series(data_dir, tmp_path):
    "The whole command on a real series: written series open elsewhere with the same geometry, marked, and unchanged outside the cuboids."
    import pydicom

    source = data_dir / "dicom" / "LIDC-IDRI-0001"
    assert mits_demo(["--scan", str(source), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    reader = sitk.ImageSeriesReader()

    def open_elsewhere(folder):
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        return reader.Execute()

    real = open_elsewhere(source)
    protected = sitk.GetArrayFromImage(open_elsewhere(tmp_path / "out" / "protected"))  # a copy: a view dies with its image
    outside = np.ones(tuple(metrics["data"]["shape"]), bool)
    for attack in metrics["attack"]:
        outside[tuple(slice(a, b) for a, b in attack["box"])] = False
    for name, before in (("forged", sitk.GetArrayFromImage(real)), ("protected_forged", protected)):
        image = open_elsewhere(tmp_path / "out" / name)
        assert image.GetSize() == real.GetSize()
        assert np.allclose(image.GetSpacing(), real.GetSpacing()) and np.allclose(image.GetOrigin(), real.GetOrigin())
        assert np.allclose(image.GetDirection(), real.GetDirection())
        after = sitk.GetArrayFromImage(image)
        assert np.array_equal(after[outside], before[outside])
        assert not np.array_equal(after, before)
        header = pydicom.dcmread(next((tmp_path / "out" / name).iterdir()), stop_before_pixels=True)
        assert "FORGERY" in header.SeriesDescription.upper() and list(header.ImageType[:2]) == ["DERIVED", "SECONDARY"]


def test_the_input_and_foreign_folders_are_spared(series, tmp_path, capsys):
    scan = read_scan(series)
    study = tmp_path / "study"
    for folder in (study / "protected", study / "other"): shutil.copytree(series, folder)
    write_scan(scan, study / "forged.mha")
    before = {p: p.read_bytes() for p in study.rglob("*") if p.is_file()}
    for given in ("forged.mha", "protected"):
        assert mits_demo(["--scan", str(study / given), "--out", str(study)]) == 2 and "is the input itself" in capsys.readouterr().err
    (study / "protected" / "thesis.txt").write_text("mine")
    assert mits_demo(["--scan", str(study / "other"), "--out", str(study)]) == 2 and "thesis.txt" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


def test_a_scan_without_forgeries_has_no_precision():
    from types import SimpleNamespace
    from mits_nb.cli import judge
    scan = Scan(np.zeros((3, 40, 40), np.int16), (2.5, 1., 1.))
    report = SimpleNamespace(slices=[{"tampered": t} for t in (True, False, False)], regions=[], windows_per_slice=1)
    scores = judge(SimpleNamespace(reports={"real": report}, scans={"real": scan}))["real"]
    assert scores["accuracy"] == 2 / 3 and scores["precision"] is scores["recall"] is scores["f1"] is None
