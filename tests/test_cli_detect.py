"""The command mits_detect: its exit code is the verdict; what cannot be inspected ends with exit code 2 and one sentence, and writes nothing."""
import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from mits_nb.cli import mits_detect
from mits_nb.core import from_preset, read_json, weights_path, write_json
from mits_nb.detect.cascade import Cascade, CascadeConfig, file_sha256, read_report, slice_features, train_svm
from mits_nb.detect.cnn import Detector
from mits_nb.scan import read_scan, write_scan

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture(scope="module")
def source(tmp_path_factory, phantom):
    "Twelve slices of the phantom as a DICOM series, and as a .mha file."
    folder = tmp_path_factory.mktemp("source")
    scan = replace(phantom[0], hu=phantom[0].hu[6:18])
    write_scan(scan, folder / "series")
    write_scan(scan, folder / "scan.mha")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Untrained weights whose thresholds make the verdict: `anything` finds a region everywhere, `nothing` nowhere."
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    net, config = Detector(width=.125), from_preset(CascadeConfig, "tiny", components=4)
    maps = np.random.default_rng(0).random((24, 33, 33)).astype(np.float32)
    svm, calibration, _ = train_svm(slice_features(maps, config), np.arange(24) % 2 == 1, np.arange(24) % 4, config, show_progress=False)
    for name, hot, sure in (("anything", 0., 0.), ("nothing", .5, 1.01)):
        Cascade(net, svm, replace(config, hot=hot, sure=sure), calibration, {"card": "# A card\n"}).save_pretrained(folder / name)
    return folder


def words(*argv): return [str(a) for a in argv]


def fails(argv, capsys, *expected):
    assert mits_detect(words(*argv)) == 2
    shown = capsys.readouterr()
    sentence = shown.err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and "Traceback" not in shown.err and "region" not in shown.out, shown.err
    for word in expected: assert word in sentence, sentence


@pytest.mark.parametrize("name", ["series", "scan.mha"])
def test_the_exit_code_is_the_verdict_and_the_command_is_the_library(source, weights, tmp_path, capsys, name):
    scan = read_scan(source / name)
    for verdict, code in (("anything", 3), ("nothing", 0)):
        out, page = tmp_path / f"{verdict}.json", tmp_path / f"{verdict}.html"
        assert mits_detect(words(source / name, "--out", out, "--html", page, "--weights", weights / verdict)) == code
        shown, stored = capsys.readouterr(), read_report(out)
        assert shown.err == "" and stored == Cascade.from_pretrained(weights / verdict).inspect(scan, False).to_dict() and stored["tampered"] == (code == 3) == bool(stored["regions"])
        assert stored["weights"]["name"] == verdict and stored["scan"]["spacing_mm"] == list(scan.spacing)
        lines = [line for line in shown.out.splitlines() if line.startswith("region ")]
        assert len(lines) == len(stored["regions"])
        for i, (line, region) in enumerate(zip(lines, stored["regions"]), 1):
            assert line.startswith(f"region {i}: voxel z,y,x = {', '.join(f'{v:.0f}' for v in region['centre_voxel'])}; world x,y,z = {', '.join(f'{v:.1f}' for v in region['centre_mm'])} mm; size")
            assert line.endswith(f"score {region['score']:.3f}")
        assert ("not a proof" if code else "no acquittal") in shown.out and name in page.read_text() and "<script" not in page.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{v}.{s}" for v in ("anything", "nothing") for s in ("json", "html"))


def test_without_reports_the_verdict_is_told_all_the_same(source, weights, capsys):
    assert mits_detect(words(source / "scan.mha", "--weights", weights / "anything")) == 3
    assert "region 1:" in capsys.readouterr().out


def test_reports_are_replaced_only_when_told(source, weights, tmp_path, capsys, monkeypatch):
    for option in ("--out", "--html"):
        file = tmp_path / f"kept{option}"
        file.write_text("precious")
        with monkeypatch.context() as patch:
            patch.setattr(Cascade, "from_pretrained", lambda *args: pytest.fail("worked before it looked"))
            fails([source / "scan.mha", option, file], capsys, "exists already", "--overwrite")
            fails([source / "scan.mha", option, tmp_path], capsys, "is a folder", option)
            for extra in ([], ["--overwrite"]): fails([source / "scan.mha", option, source / "scan.mha", *extra], capsys, "input itself")
            (tmp_path / "file").write_text("x")
            fails([source / "scan.mha", option, tmp_path / "file" / "r"], capsys, "cannot write")
            fails([source / "scan.mha", "--out", tmp_path / "one", "--html", tmp_path / "one"], capsys, "two names")
        assert file.read_text() == "precious" and not (tmp_path / "one").exists()
        assert mits_detect(words(source / "scan.mha", option, file, "--overwrite", "--weights", weights / "nothing")) == 0
        assert "precious" not in file.read_text() and "no suspicious region" in capsys.readouterr().out


def test_a_full_disk_is_an_error_and_not_a_verdict(source, weights, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert mits_detect(words(source / "scan.mha", "--out", tmp_path / "r.json", "--weights", weights / "anything")) == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- bad input: one sentence each, before anything is written ---

def test_a_scan_that_is_not_there_or_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "letter.mha").write_text("Dear Sir or Madam")
    (tmp_path / "letter.txt").write_text("Dear Sir or Madam")
    for name in ("nowhere", "empty", "letter.mha", "letter.txt"): fails([tmp_path / name, "--out", tmp_path / "r.json"], capsys, name)
    assert not (tmp_path / "r.json").exists()


def image(path, values):
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    return path


def test_slices_smaller_than_a_window(tmp_path, capsys, weights):
    fails([image(tmp_path / "small.mha", np.full((4, 31, 64), -900, np.int16)), "--out", tmp_path / "r.json", "--weights", weights / "anything"], capsys, "31 x 64", "smaller than a window")


def test_values_that_are_not_finite_name_their_slice(tmp_path, capsys, weights):
    hu = np.full((4, 40, 40), -900, np.float32)
    hu[2, 3, 3] = np.nan
    fails([image(tmp_path / "nan.mha", hu), "--out", tmp_path / "r.json", "--weights", weights / "anything"], capsys, "NaN")
    assert not (tmp_path / "r.json").exists()


def test_pictures_that_are_no_ct(tmp_path, capsys, weights):
    fails([image(tmp_path / "picture.mha", np.full((4, 40, 40), 128, np.uint8)), "--weights", weights / "nothing"], capsys, "8-bit", "CT in HU") # "clean" would be a lie


def test_a_ct_without_lung_is_inspected_with_a_warning(tmp_path, capsys, weights, phantom):
    hu = phantom[0].hu.copy()
    hu[(hu < -400) & (np.hypot(*np.ogrid[-80:80, -80:80]) < 76)] = 40 # no air inside, air around
    hu[:, :4] = -1000
    write_scan(phantom[0].with_hu(hu), tmp_path / "pelvis.mha")
    assert mits_detect(words(tmp_path / "pelvis.mha", "--weights", weights / "nothing")) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: no lung was found")


def test_two_series_need_a_choice(source, tmp_path, capsys, weights, phantom):
    both = tmp_path / "both"
    shutil.copytree(source / "series", both)
    other = write_scan(replace(phantom[0], hu=phantom[0].hu[:5]), tmp_path / "other")
    for path in other.iterdir(): shutil.copy(path, both / f"other-{path.name}")
    fails([both, "--weights", weights / "nothing"], capsys, "2 series")
    out = tmp_path / "r.json"
    assert mits_detect(words(both, "--series", read_scan(other).meta["series_uid"], "--weights", weights / "nothing", "--out", out)) == 0
    assert len(read_report(out)["slices"]) == 5


def test_foreign_and_missing_weights(source, capsys):
    fails([source / "scan.mha", "--weights", "no-such-weights"], capsys, "no-such-weights", "cascade-tiny")
    for name in ("ctgan-tiny", "mitsgan-tiny"): fails([source / "scan.mha", "--weights", weights_path(name)], capsys, name)
    fails([source / "scan.mha", "--device", "abacus"], capsys, "abacus")


def test_stages_that_do_not_belong_together(source, weights, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(weights / "anything", mixed)
    torch.manual_seed(7)
    Detector(width=.125).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", mixed / "detector" / "model.safetensors")
    fails([source / "scan.mha", "--weights", mixed], capsys, "does not belong")


def test_a_tampered_model_file_runs_nothing(source, weights, tmp_path, capsys):
    "Also when somebody mends the fingerprints after the change."
    import skops.io
    bad, marker = tmp_path / "bad", tmp_path / "ran"
    shutil.copytree(weights / "anything", bad)
    skops.io.dump(functools.partial(os.system, f"touch {marker}"), bad / "svm.skops")
    fails([source / "scan.mha", "--weights", bad], capsys, "does not belong")
    config = read_json(bad / "config.json")
    config["belongs_together"]["svm.skops"] = file_sha256(bad / "svm.skops")
    write_json(bad / "config.json", config)
    fails([source / "scan.mha", "--weights", bad], capsys, "no second stage needs")
    import pickle # what an attacker would send; the package itself never opens one
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {marker}",)
    for name in ("svm.skops", "detector/model.safetensors"):
        worse = tmp_path / Path(name).name
        shutil.copytree(weights / "anything", worse)
        (worse / name).write_bytes(pickle.dumps(Bomb()))
        config = read_json(worse / "config.json")
        config["belongs_together"][name] = file_sha256(worse / name)
        write_json(worse / "config.json", config)
        fails([source / "scan.mha", "--weights", worse], capsys)
    assert not marker.exists()


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["a", "--out"], ["a", "--seed", "1"]])
def test_wrong_words(argv, capsys):
    with pytest.raises(SystemExit) as stopped: mits_detect(argv)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_help_is_quiet_and_quick():
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", "import sys; from mits_nb.cli import mits_detect; sys.exit(mits_detect(['--help']))"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--html" in shown.stdout and "3 at least one" in " ".join(shown.stdout.split()) and "--seed" not in shown.stdout
    assert "| torch\n" not in shown.stderr, "no heavy import for --help"


def test_the_exit_code_reaches_the_shell(source, weights):
    done = subprocess.run([sys.executable, "-c", "import sys; from mits_nb.cli import mits_detect; sys.exit(mits_detect())", str(source / "scan.mha"), "--weights", str(weights / "anything")], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr


def test_the_command_is_installed_under_its_name():
    from configparser import ConfigParser
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(Path(__file__).parent.parent / "settings.ini")
    assert "mits_detect=mits_nb.cli:mits_detect" in config["DEFAULT"]["console_scripts"].split()
