"""The command mits_protect: DICOM in, DICOM out, marked; what is no chest CT, protected already or forged ends with exit code 2 and one sentence."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from mits_nb.cli import mits_protect, mits_train
from mits_nb.core import weights_path
from mits_nb.protect.mitsgan import MitsGAN, is_protected
from mits_nb.protect.rivals import Tafim
from mits_nb.scan import Scan, marker_text, read_scan, sidecar_path, write_scan

pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture(scope="module")
def source(tmp_path_factory, phantom):
    "The phantom as a DICOM series, and as a .mha file."
    folder = tmp_path_factory.mktemp("source")
    write_scan(phantom[0], folder / "series")
    write_scan(phantom[0], folder / "scan.mha")
    return folder


def fails(argv, capsys, *expected):
    assert mits_protect([str(a) for a in argv]) == 2
    shown = capsys.readouterr()
    sentence = shown.err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and "Traceback" not in shown.err, shown.err
    for word in expected: assert word in sentence, sentence


def test_dicom_in_dicom_out(source, tmp_path, capsys):
    out = tmp_path / "protected"
    assert mits_protect([str(source / "series"), str(out), "--seed", "4"]) == 0
    shown = capsys.readouterr()
    real, back = read_scan(source / "series"), read_scan(out)
    same = MitsGAN.from_pretrained("mitsgan-tiny").protect(real, seed=4)
    assert np.array_equal(back.hu, same.hu) and not np.array_equal(back.hu, real.hu)               # the command is the library
    assert back.spacing == real.spacing and back.origin == real.origin and np.array_equal(back.direction, real.direction)
    assert is_protected(back) and not is_protected(real)
    words = "PROTECTED (mits_nb), not for diagnosis: by mitsgan-tiny, up to 88 HU, seed 4"
    assert shown.err == "" and words in shown.out and "2.5 x 2.2 x 2.2 mm" in shown.out and not sidecar_path(out).exists()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (source / "series").iterdir())
    seen = set()
    for path in sorted(out.iterdir()):
        before, after = pydicom.dcmread(source / "series" / path.name), pydicom.dcmread(path)
        assert list(after.ImageType)[:2] == ["DERIVED", "SECONDARY"] and after.SeriesDescription.startswith("protected (mits_nb)")
        assert after.DerivationDescription == words and after.private_block(0x4D49, "MITS_NB")[0x01].value == words
        assert after.SOPInstanceUID != before.SOPInstanceUID and after.SourceImageSequence[0].ReferencedSOPInstanceUID == before.SOPInstanceUID
        assert after.StudyInstanceUID == before.StudyInstanceUID and after.PatientID == before.PatientID and after.SeriesInstanceUID != before.SeriesInstanceUID
        seen.add(after.SeriesInstanceUID)
    assert len(seen) == 1


def test_rivals_protect_too(source, tmp_path, capsys):
    assert mits_protect([str(source / "scan.mha"), str(tmp_path / "out.mha"), "--weights", "tafim-tiny", "--seed", "2"]) == 0
    real, back = read_scan(source / "scan.mha"), read_scan(tmp_path / "out.mha")
    assert np.array_equal(back.hu, Tafim.from_pretrained("tafim-tiny").protect(real, seed=2).hu) and not np.array_equal(back.hu, real.hu)
    assert "by tafim-tiny" in (marker_text(back) or "") and "by tafim-tiny" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["3", "{", "[1]", "{}"])
def test_weights_that_do_not_say_whose_they_are(source, tmp_path, capsys, config):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text(config)
    (tmp_path / "w" / "model.safetensors").write_bytes((weights_path("mitsgan-tiny") / "model.safetensors").read_bytes())
    fails([source / "scan.mha", tmp_path / "out.mha", "--weights", tmp_path / "w"], capsys, str(tmp_path / "w"), "again")
    assert not (tmp_path / "out.mha").exists()


@pytest.mark.parametrize("name", ["out.mha", "out.nrrd", "out.nii.gz"])
def test_files_in_files_out(source, tmp_path, name):
    assert mits_protect([str(source / "scan.mha"), str(tmp_path / name)]) == 0
    back = read_scan(tmp_path / name)
    assert is_protected(back) and back.meta["marker"].endswith("up to 88 HU, seed 0")              # whole, also in the 79 characters of NIfTI
    image = sitk.ReadImage(str(tmp_path / name))                                                   # another library sees the mark
    assert any("PROTECTED" in image.GetMetaData(k) for k in image.GetMetaDataKeys())


def test_same_seed_same_bytes(source, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")): assert mits_protect([str(source / "series"), str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b and a != c


def test_not_twice_unless_told(source, tmp_path, capsys):
    for name in ("once", "once.mha", "once.nii.gz"):
        assert mits_protect([str(source / "scan.mha"), str(tmp_path / name)]) == 0
        fails([tmp_path / name, tmp_path / "twice.mha"], capsys, "protected already", "mitsgan-tiny", "--again")
        assert not (tmp_path / "twice.mha").exists()
    assert mits_protect([str(tmp_path / "once"), str(tmp_path / "twice"), "--again", "--seed", "9"]) == 0
    once, twice = read_scan(tmp_path / "once"), read_scan(tmp_path / "twice")
    assert "seed 0" in twice.meta["marker"] and "seed 9" in twice.meta["marker"] and not np.array_equal(once.hu, twice.hu)


def test_forgeries_are_refused_even_again(source, tmp_path, capsys, phantom):
    note = {"kind": "forged", "action": "inject", "at": [12.0, 80.0, 40.0], "box": [[8, 16], [72, 88], [32, 48]]}
    write_scan(phantom[0].with_hu(phantom[0].hu, note), tmp_path / "forged.mha")
    for extra in ([], ["--again"]): fails([tmp_path / "forged.mha", tmp_path / "out.mha", *extra], capsys, "marked as a forgery", "forged.mha")
    sidecar_path(tmp_path / "forged.mha").unlink()                                                 # the mark in the header is enough
    fails([tmp_path / "forged.mha", tmp_path / "out.mha"], capsys, "marked as a forgery")
    assert not (tmp_path / "out.mha").exists()


def test_a_ct_without_lung_is_protected_with_a_warning(tmp_path, capsys, phantom):
    hu = phantom[0].hu.copy()
    hu[(hu < -400) & (np.hypot(*np.ogrid[-80:80, -80:80]) < 76)] = 40                              # no air inside, air around
    hu[:, :4] = -1000
    write_scan(phantom[0].with_hu(hu), tmp_path / "pelvis.mha")
    assert mits_protect([str(tmp_path / "pelvis.mha"), str(tmp_path / "out.mha")]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: no lung was found")
    assert is_protected(read_scan(tmp_path / "out.mha"))


def test_pictures_and_other_modalities(source, tmp_path, capsys, phantom):
    hu = phantom[0].hu
    for name, values in {"window.mha": np.clip((hu + 1350) / 1500 * 255, 0, 255).astype(np.uint8), "raw.mha": (hu + 1024).clip(0, 4095).astype(np.uint16),
                         "scaled.mha": (hu / 3000).clip(-1, 1).astype(np.float32), "mean.mha": (hu / 8).clip(-128, 127).astype(np.int16)}.items():
        sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name))
        fails([tmp_path / name, tmp_path / "out.mha"], capsys, f"{float(values.min()):g} to {float(values.max()):g}", "8-bit", "CT in HU")
    write_scan(phantom[0], tmp_path / "mr")
    for path in (tmp_path / "mr").iterdir():
        ds = pydicom.dcmread(path); ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"; ds.Modality = "MR"; ds.save_as(path)
    fails([tmp_path / "mr", tmp_path / "out"], capsys, "MR Image")
    sitk.WriteImage(sitk.GetImageFromArray(np.full((64, 64), -900, np.int16)), str(tmp_path / "flat.mha"))
    fails([tmp_path / "flat.mha", tmp_path / "out.mha"], capsys, "flat.mha", "2-D")
    assert not (tmp_path / "out.mha").exists() and not (tmp_path / "out").exists()


def test_bad_input(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.mha"
    monkeypatch.setattr(MitsGAN, "protect", lambda *args, **kwargs: pytest.fail("worked before it looked"))
    fails([tmp_path / "nowhere", out], capsys, "nowhere", "does not exist")
    fails([source / "scan.mha", tmp_path / "out.png"], capsys, "suffix")
    (tmp_path / "file").write_text("x")
    fails([source / "scan.mha", tmp_path / "file" / "out.mha"], capsys, "cannot write", "OUT")
    fails([source / "scan.mha", out, "--weights", "no-such-weights"], capsys, "no-such-weights")
    fails([source / "scan.mha", out, "--weights", weights_path("ctgan-tiny")], capsys, "ctgan-tiny")
    fails([source / "scan.mha", out, "--device", "abacus"], capsys, "abacus")
    (tmp_path / "a.mha").write_text("precious")
    fails([source / "scan.mha", tmp_path / "a.mha"], capsys, "exists already", "--overwrite")
    before = (source / "scan.mha").read_bytes()
    for extra in ([], ["--overwrite"]): fails([source / "scan.mha", source / "scan.mha", *extra], capsys, "input itself")
    (tmp_path / "home").mkdir(); (tmp_path / "home" / "thesis.docx").write_text("precious" * 50)
    fails([source / "series", tmp_path / "home", "--overwrite"], capsys, "thesis.docx")
    assert (source / "scan.mha").read_bytes() == before and (tmp_path / "home" / "thesis.docx").exists() and (tmp_path / "a.mha").read_text() == "precious"
    assert not out.exists()


def test_two_series_and_overwriting(source, tmp_path, capsys, phantom):
    import shutil
    both = tmp_path / "both"
    shutil.copytree(source / "series", both)
    other = write_scan(replace(phantom[0], hu=phantom[0].hu[:5] + np.int16(1)), tmp_path / "other")
    for path in other.iterdir(): shutil.copy(path, both / f"other-{path.name}")
    fails([both, tmp_path / "out"], capsys, "2 series")
    uid = read_scan(other).meta["series_uid"]
    for extra in ([], ["--overwrite"]): assert mits_protect([str(both), str(tmp_path / "out"), "--series", uid, *extra]) == 0
    assert read_scan(tmp_path / "out").shape[0] == 5


def test_disk_full_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pydicom.dataset.Dataset, "save_as", full)
    fails([source / "series", tmp_path / "out"], capsys, "No space left")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "c"], ["a", "b", "--seed", "x"], ["a", "b", "--strength", "9"]])
def test_wrong_words(argv, capsys):
    with pytest.raises(SystemExit) as stopped: mits_protect(argv)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_help_is_quiet_and_quick():
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", "import sys; from mits_nb.cli import mits_protect; sys.exit(mits_protect(['--help']))"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--again" in shown.stdout and "nothing here safeguards" in " ".join(shown.stdout.split())
    assert "| torch\n" not in shown.stderr, "no heavy import for --help"


def test_the_command_is_installed_under_its_name():
    from configparser import ConfigParser
    from pathlib import Path
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(Path(__file__).parent.parent / "settings.ini")
    assert "mits_protect=mits_nb.cli:mits_protect" in config["DEFAULT"]["console_scripts"].split()


@pytest.mark.parametrize("part", ["protect", "detect"])
def test_training_without_an_attacker_says_how_to_get_one(part, tmp_path, capsys):
    for words in (["--preset", "full"], ["--attacker", str(tmp_path / "none")]):
        assert mits_train([part, *words, "--out", str(tmp_path / "w")]) == 2
        sentence = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence.startswith("error: no weights at ") and "mits_train attack --preset" in sentence
    assert not (tmp_path / "w").exists()


def test_training_calls_the_recipe_of_the_variant(tmp_path, capsys, monkeypatch):
    from mits_nb.attack.ctgan import CTGAN
    from mits_nb.protect import mitsgan
    calls = []
    monkeypatch.setattr(mitsgan, "train_mitsgan", lambda **words: calls.append(words))
    for words in ([], ["--variant", "plain"]): assert mits_train(["protect", *words, "--out", str(tmp_path / "w"), "--seed", "3"]) == 0
    assert all(c["preset"] == "tiny" and c["seed"] == 3 and c["out"] == tmp_path / "w" and [type(a) for a in c["attacker"]] == [CTGAN, CTGAN] for c in calls) and len(calls) == 2
    assert [a.settings.start for a in calls[0]["attacker"]] == ["film", "zeros"]
    assert mits_train(["protect", "--attacker", "ctgan-zeros-tiny", "--out", str(tmp_path / "w")]) == 0 and [a.settings.start for a in calls.pop()["attacker"]] == ["zeros"]
    assert mits_train(["protect", "--variant", "robust", "--out", str(tmp_path / "w")]) == 0 and set(calls[2]) == set(calls[0]) | set(mitsgan.ROBUST)
    assert mits_train(["protect", "--variant", "released", "--hold-out", "A", "--hold-out", "B", "--out", str(tmp_path / "mitsgan-released-tiny")]) == 0
    released = calls.pop()
    assert set(released) == set(calls[0]) | set(mitsgan.RELEASED) | {"held_out"} and released["held_out"] == ("A", "B")
    for variant in ("robust", "released"): # what makes them tiny does not make a full training small
        assert mits_train(["protect", "--preset", "full", "--variant", variant, "--attacker", "ctgan-tiny", "--out", str(tmp_path / "w")]) == 0
        assert not {"width", "steps", "lr"} & set(full := calls.pop()) and full["preset"] == "full" and (full.get("cleanings") or full.get("variant") == "released")
    assert mits_train(["detect", "--hold-out", "A"]) == 2 and "--hold-out belongs to" in capsys.readouterr().err
    assert mits_train(["attack", "--attacker", "x"]) == 2 and "--attacker belongs to" in capsys.readouterr().err
    for part in ("attack", "protect"): assert mits_train([part, "--protector", "x"]) == 2 and "--protector belongs to" in capsys.readouterr().err
    assert mits_train(["protect", "--pictures", "folder"]) == 2 and "--pictures belongs to" in capsys.readouterr().err
    from mits_nb.protect import rivals
    monkeypatch.setattr(rivals, "train_tafim", lambda **words: calls.append(words))
    monkeypatch.chdir(tmp_path)
    assert mits_train(["protect", "--variant", "tafim"]) == 0 and calls[3]["out"].as_posix() == "outputs/weights/tafim-tiny" and len(calls) == 4 and calls[3]["attacker"].settings.start == "zeros"
    assert mits_train(["protect", "--variant", "tafim", "--attacker", "ctgan-tiny", "--attacker", "ctgan-zeros-tiny"]) == 2 and "--attacker once" in capsys.readouterr().err
    for part, variant in (("attack", "plain"), ("protect", "zeros"), ("detect", "plain")): assert mits_train([part, "--variant", variant]) == 2 and f"no variant '{variant}'" in capsys.readouterr().err


def test_training_the_attacker_as_published(tmp_path, monkeypatch):
    from mits_nb.attack import ctgan
    calls = []
    monkeypatch.setattr(ctgan, "train_ctgan", lambda **words: calls.append(words))
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--variant", "film"], ["--variant", "zeros"]): assert mits_train(["attack", *words]) == 0
    assert [c["out"].name for c in calls] == ["ctgan-tiny", "ctgan-tiny", "ctgan-zeros-tiny"] and [c.get("start") for c in calls] == [None, "film", "zeros"] and calls[2]["remover"] == {}


def test_a_training_that_fails_is_one_sentence(tmp_path, capsys, monkeypatch):
    from mits_nb.core import TrainError
    from mits_nb.protect import mitsgan
    def faint(**words): raise TrainError("loss 'damage [dB]' is nan after step 40: lower the learning rate, or train in float32")
    monkeypatch.setattr(mitsgan, "train_mitsgan", faint)
    assert mits_train(["protect", "--out", str(tmp_path / "w")]) == 2 and "nan after step 40" in capsys.readouterr().err.strip().splitlines()[-1]


def test_marker_names_what_is_known():
    scan = Scan(np.zeros((2, 4, 4), np.int16), (1, 1, 1))
    tell = lambda **note: marker_text(scan.with_hu(scan.hu, {"kind": "protected", **note}))
    assert tell(by="x", seed=12345678, strength_hu=2.5).endswith(": by x, up to 2.5 HU, seed 12345678")
    assert tell(by="x", largest_hu=801.0).endswith(": by x, up to 801 HU") and tell().endswith(": by a protector")


def test_real_series(data_dir, tmp_path, capsys):
    folder, out = data_dir / "dicom" / "LIDC-IDRI-0001", tmp_path / "protected"
    assert mits_protect([str(folder), str(out)]) == 0
    assert capsys.readouterr().err == ""
    real, back = read_scan(folder), read_scan(out)
    change = back.hu.astype(int) - real.hu
    assert is_protected(back) and np.abs(change).max() <= 88 and all((c != 0).any() for c in change)
    assert np.array_equal(back.hu < -1024, real.hu < -1024) and not change[real.hu < -1024].any()  # padding is padding
    reader = sitk.ImageSeriesReader()
    def open_elsewhere(path):
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        return reader.Execute()
    a, b = open_elsewhere(folder), open_elsewhere(out)
    assert a.GetSize() == b.GetSize() and np.allclose(a.GetOrigin(), b.GetOrigin()) and np.allclose(a.GetSpacing(), b.GetSpacing()) and np.allclose(a.GetDirection(), b.GetDirection())
    assert np.array_equal(sitk.GetArrayFromImage(b).astype(int) - sitk.GetArrayFromImage(a), change)
    a, b = (pydicom.dcmread(path / real.source.names[0], stop_before_pixels=True) for path in (folder, out))
    assert list(b.ImageType)[:2] == ["DERIVED", "SECONDARY"] and b.PatientID == a.PatientID and b.SOPInstanceUID != a.SOPInstanceUID
    fails([out, tmp_path / "twice"], capsys, "protected already")
