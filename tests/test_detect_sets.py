"Data sets in a folder: parts that share no patient, proportions of the paper, resuming, markers, damaged files, bad input."
import json
import shutil

import numpy as np
import pytest
import torch

from mits_nb.cli import mits_data
from mits_nb.core import DataError, TrainError, UsageError, read_json, rng
from mits_nb.detect import training
from mits_nb.detect.cnn import CLEAN, FORGED, PAIRED
from mits_nb.detect.rivals import CycleNet, forge_sets
from mits_nb.detect.training import (SPLITS, WHOLE, ForgedSlices, SetsConfig, Source, eight_scans, forge_set, forger_variants, load_patches, load_slices, patient_splits, read_set, save_patches,
                                      save_slices, set_origins, set_slices, slice_patches, whole_scan)
from mits_nb.phantom import make_phantom
from mits_nb.scan import read_scan, write_scan

SMALL = dict(scale=.004, places=2)  # 11 + 1 + 2 + 1 places


class Forger:
    "Fills a cube with a constant: nothing is trained, everything is quick."
    def tamper(self, scan, at, action="inject", seed=0):
        from mits_nb.attack.tamper import tamper
        return tamper(scan, at, lambda cond: torch.full_like(cond, .1 if action == "inject" else -.3), action, seed=seed)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    "Six scans of five patients."
    folder = tmp_path_factory.mktemp("scans")
    for i in range(6):
        scan, _ = make_phantom(seed=60 + i, shape=(12, 120, 120), spacing=(3., 3., 3.))
        write_scan(scan, folder / (f"LIDC-IDRI-0100-{i}.mha" if i < 2 else f"scan-{i}.mha"))
    return folder


@pytest.fixture(scope="module")
def made(scans, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "all"
    return out, forge_set("all", out, scans, attackers=[Forger()], **SMALL)


def files_of(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_proportions_are_the_papers():
    assert sum(SPLITS.values()) == 35_400 and SetsConfig().wanted == {"local_train": 2740, "validation": 200, "global_train": 480, "test": 120}
    tiny = SetsConfig(**SetsConfig.presets["tiny"]).wanted
    assert tiny == {"local_train": 137, "validation": 10, "global_train": 24, "test": 6}


def test_parts_share_no_patient_and_the_list_counts_them(made):
    out, told = made
    people = {part: {e["patient"] for e in told["files"].values() if e["part"] == part} for part in SPLITS}
    assert all(people.values()) and sum(map(len, people.values())) == len(set().union(*people.values())) == 5
    whose = {e["scan"]: e["part"] for e in told["files"].values()}
    assert whose["LIDC-IDRI-0100-0"] == whose["LIDC-IDRI-0100-1"], "two scans of one patient stay together"
    assert {part: told["parts"][part]["places"] for part in SPLITS} == {"local_train": 11, "validation": 1, "global_train": 2, "test": 1}
    assert max(e["places"] for e in told["files"].values()) <= 2 and told["complete"] and read_json(out / "sets.json") == told


def test_slices_are_the_papers_mixture(made):
    out, told = made
    learn = read_set(out, "local_train")
    assert learn.tampered.tolist() == [True, False] * (len(learn) // 2) and learn.hu[0].dtype == np.int16
    assert abs(len(learn.only("inject")) - len(learn.only("remove"))) <= 10
    same = learn.at[1::2, 0] == learn.at[::2, 0]
    assert same.reshape(-1, 5)[:, 1::2].all(), "the second and fourth of five unforged slices are the forged ones before forging"
    assert not same.reshape(-1, 5)[:, ::2].all(), "the others are drawn from the whole scan"
    assert all((a != b).any() for a, b in zip(learn.hu[::2], learn.hu[1::2]))
    assert sum(len(s) for s in set_slices(out, "local_train", "remove")) == len(learn.only("remove"))
    assert not set(learn.scan) & set(read_set(out, "test").scan)


def test_every_file_is_marked_and_needs_no_pickle(made):
    out, told = made
    for file, entry in told["files"].items():
        with np.load(out / file, allow_pickle=False) as f:
            assert all(f[name].dtype != object for name in f.files) and "TEACHING FORGERY" in str(f["marker"])
            notes = json.loads(str(f["notes"]))
        assert len(notes) == entry["places"] and all(n["kind"] == "forged" and n["voxels_changed"] > 0 for n in notes)
    assert "TEACHING FORGERY" in told["marker"] and told["licence of the scans"]
    assert mits_data(["verify", str(out)]) == 0


def test_interrupted_and_resumed_is_the_same_and_nothing_is_forged_twice(scans, made, tmp_path, monkeypatch):
    calls, real = [], training.forge_place
    def counted(source, i, *args, **kwargs):
        if len(calls) == 4: raise KeyboardInterrupt
        calls.append((source.name, i))
        return real(source, i, *args, **kwargs)
    monkeypatch.setattr(training, "forge_place", counted)
    with pytest.raises(KeyboardInterrupt): forge_set("all", tmp_path / "set", scans, attackers=[Forger()], **SMALL)
    with pytest.raises(DataError, match="not finished"): read_set(tmp_path / "set", "local_train")
    done = {i for e in read_json(tmp_path / "set" / "sets.json")["files"].values() for i in [(e["scan"], n) for n in e["numbers"]]}
    again = []
    monkeypatch.setattr(training, "forge_place", lambda source, i, *a, **k: (again.append((source.name, i)), real(source, i, *a, **k))[1])
    forge_set("all", tmp_path / "set", scans, attackers=[Forger()], **SMALL)
    assert done and not done & set(again) and len(done) + len(again) == 15
    whole, resumed = files_of(made[0]), files_of(tmp_path / "set")
    assert whole == resumed
    again.clear()
    forge_set("all", tmp_path / "set", scans, attackers=[Forger()], **SMALL)
    assert not again and files_of(tmp_path / "set") == whole


def test_other_settings_are_refused_and_damage_is_named(scans, made, tmp_path, monkeypatch):
    out = tmp_path / "set"
    shutil.copytree(made[0], out)
    with pytest.raises(UsageError, match="another seed"): forge_set("all", out, scans, attackers=[Forger()], seed=1, **SMALL)
    with pytest.raises(UsageError, match="another kind"): forge_set("inject", out, scans, attackers=[Forger()], **SMALL)
    with pytest.raises(UsageError, match="another forgers"): forge_set("all", out, scans, attackers=[Forger(), Forger()], **SMALL)
    file = next(out.glob("test/*.npz"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=file.name): read_set(out, "test")
    file.unlink()
    forge_set("all", out, scans, attackers=[Forger()], **SMALL)
    assert files_of(out) == files_of(made[0])
    told = read_json(out / "sets.json")
    for broken in (told | {"settings": []}, told | {"files": {"a.npz": {}}}):
        (out / "sets.json").write_text(json.dumps(broken))
        with pytest.raises(UsageError, match="damaged list"): forge_set("all", out, scans, attackers=[Forger()], **SMALL)
    (out / "sets.json").unlink()
    with pytest.raises(UsageError, match="no sets.json"): forge_set("all", out, scans, attackers=[Forger()], **SMALL)


def test_an_interruption_in_the_first_file_leaves_a_folder_that_goes_on(scans, made, tmp_path, monkeypatch):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(training.np, "savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt): forge_set("all", tmp_path / "set", scans, attackers=[Forger()], **SMALL)
    monkeypatch.undo()
    forge_set("all", tmp_path / "set", scans, attackers=[Forger()], **SMALL)
    assert files_of(tmp_path / "set") == files_of(made[0])


def test_patients_and_parts():
    with pytest.raises(DataError, match="at least 4 patients"): patient_splits({"a": "p", "b": "p", "c": "q", "d": "r"})
    four = patient_splits({n: n for n in "abcd"}, tested=["c"])
    assert sorted(map(len, four.values())) == [1, 1, 1, 1] and four["test"] == ["c"]
    for tested in ("ab", "abcd"):
        with pytest.raises(DataError, match="for the test alone"): patient_splits({n: n for n in "abcd"}, tested=tested)
    for i in range(60): # one of the three may fall to the test, which has its own
        names = [f"{i}-{n}" for n in range(4)]
        assert all(patient_splits({n: n for n in names}, tested=names[:1]).values())
    five = patient_splits({n: n for n in "abcde"}, tested="ab")
    assert five["test"] == ["a", "b"] and sorted(map(len, five.values())) == [1, 1, 1, 2]
    many = patient_splits({f"s{i}": f"p{i}" for i in range(400)})
    assert abs(len(many["local_train"]) / 400 - 27_400 / 35_400) < .06 and sum(map(len, many.values())) == 400


def without_lung(scans, folder, name):
    shutil.copytree(scans, folder)
    scan = read_scan(folder / f"{name}.mha")
    write_scan(scan.with_hu(np.full_like(scan.hu, 40)), folder / f"{name}.mha")
    return folder


def test_a_scan_without_lung_is_left_out_and_said_so(scans, tmp_path):
    told = forge_set("all", tmp_path / "set", without_lung(scans, tmp_path / "scans", "LIDC-IDRI-0100-1"), attackers=[Forger()], **SMALL)  # its patient has another scan in the same part
    assert told["complete"] and told["skipped"] and all("no lung" in why and "LIDC-IDRI-0100-1" in file for file, why in told["skipped"].items())
    assert {e["scan"] for e in told["files"].values()} >= {"LIDC-IDRI-0100-0"} and "LIDC-IDRI-0100-1" not in {e["scan"] for e in told["files"].values()}


def test_a_part_without_any_usable_scan_is_an_error(scans, tmp_path):
    folder = without_lung(scans, tmp_path / "scans", "scan-3")
    (folder / "scan-9.mha").write_text("no scan")  # alone in the part validation; names alone decide who goes where
    with pytest.raises(DataError, match="part validation could be used"): forge_set("all", tmp_path / "set", folder, attackers=[Forger()], **SMALL)
    skipped = read_json(tmp_path / "set" / "sets.json")["skipped"]
    assert {file.split("/")[1].rsplit("-", 1)[0] for file in skipped} == {"scan-3", "scan-9"} and any("no lung" in why for why in skipped.values())


@pytest.mark.parametrize("action", ["inject", "remove"])
def test_one_kind_only(scans, tmp_path, action):
    told = forge_set(action, tmp_path / "set", scans, attackers=[Forger()], scale=.001, slices=1)
    slices = read_set(tmp_path / "set", "local_train")
    assert set(slices.action) == {action, ""} and told["parts"]["local_train"][ "slices"] == len(slices)
    with pytest.raises(DataError, match="no slices"): read_set(tmp_path / "set", "local_train", "remove" if action == "inject" else "inject")


def test_whole_scans_keep_their_markers(scans, tmp_path):
    told = forge_set("whole", tmp_path / "set", scans, attackers=[Forger()], phantom_shape=(6, 256, 256))
    assert [f.split(".")[0] for f in told["files"]] == list(WHOLE) and set(told["parts"]) == {"test"}
    for name in WHOLE:
        scan = read_scan(tmp_path / "set" / f"{name}.mha")
        forged = [n["action"] for n in scan.history if n["kind"] == "forged"]
        assert forged == {"INJ": ["inject"], "REM": ["remove"]}.get(name[:3], []) and bool(forged) == ("TEACHING FORGERY" in scan.meta.get("marker", ""))
    assert mits_data(["verify", str(tmp_path / "set")]) == 0
    with pytest.raises(DataError, match="whole scans"): read_set(tmp_path / "set", "test")


def test_eight_scans_in_memory(phantom):
    scan, nodules = phantom
    source = Source.of("phantom", scan, [n.centre_voxel for n in nodules])
    made = list(eight_scans(source, source, [Forger()]))
    assert [name for name, *_ in made] == list(WHOLE) and all(bool(s.history) == (name not in ("BEN", "MAL")) for name, _, s in made)


def test_forgers_come_with_both_masks_and_both_touch_ups():
    from mits_nb.attack.ctgan import CTGAN
    forgers = forger_variants([CTGAN.from_pretrained(n) for n in ("ctgan-tiny", "ctgan-zeros-tiny")])
    assert len({(f.settings.mask, f.settings.touch_up, id(f.injector)) for f in forgers}) == 8 == len(forgers)


def test_cyclegan_set(scans, tmp_path):
    net = CycleNet(4, 1)
    with torch.no_grad():
        for p in net.parameters(): p += .01
    told, = forge_sets(["cyclegan"], tmp_path, scans, attackers=[Forger()], net=net, scale=.001).values()
    slices = read_set(tmp_path / "cyclegan", "local_train")
    assert set(slices.action) == {"denoise", ""} and slices.tampered.mean() == .5 and len(slices) == 30 and told["complete"]
    assert all((a != b).any() for a, b in zip(slices.hu[::2], slices.hu[1::2]))
    assert forge_sets(["cyclegan"], tmp_path, scans, net=net, scale=.001)["cyclegan"] == told, "no forger takes part"
    with torch.no_grad(): next(net.parameters()).add_(.01)
    with pytest.raises(UsageError, match="another made by"): forge_sets(["cyclegan"], tmp_path, scans, net=net, scale=.001)


def test_scans_that_are_called_phantoms_are_scans(scans, tmp_path):
    for i, path in enumerate(sorted(scans.glob("scan-*.mha"))): shutil.copy(path, tmp_path / f"phantom-{i}.mha")
    origins, _ = set_origins(SetsConfig(**SMALL), tmp_path)
    assert sorted(o.name for o in origins) == [f"phantom-{i}" for i in range(4)] and all(o.seed is None for o in origins)
    made, _ = set_origins(SetsConfig(**SMALL))
    assert all(o.name == f"phantom-{o.seed}" for o in made)


def test_whole_scans_have_a_seed(phantom):
    source = Source.of("phantom", phantom[0], [])
    one, same, other = (whole_scan("INJ1", source, [Forger()], seed) for seed in (0, 0, 1))
    assert np.array_equal(one.hu, same.hu) and not np.array_equal(one.hu, other.hu)


def test_files_of_slices_and_patches_in_and_out(tmp_path):
    hu = [rng(i, "slice").integers(-1000, 400, (40, 40 + 8 * i)).astype(np.int16) for i in range(4)]
    slices = ForgedSlices(hu, np.array([True, False] * 2), np.array([0, 0, 1, 1]), np.array(["inject", "", "remove", ""]))
    with pytest.raises(TrainError, match="where they are forged"): slice_patches(slices)
    back = load_slices(save_slices(tmp_path / "a.npz", slices))
    assert all(np.array_equal(a, b) for a, b in zip(hu, back.hu)) and back.at is None and back.action.tolist() == ["inject", "", "remove", ""]
    back = load_slices(save_slices(tmp_path / "b.npz", ForgedSlices(hu, slices.tampered, slices.scan, slices.action, np.array([[3, 20, 20], [3, 20, 20], [4, 18, 20], [1, 18, 20]]), np.zeros(4, int))))
    for n in (0, 26):
        with pytest.raises(UsageError, match="1 to 25"): slice_patches(back, n)
    patches = slice_patches(back)
    assert (patches.kind == FORGED).sum() == 50 and (patches.kind == PAIRED).sum() == 10 and (patches.kind == CLEAN).sum() == 40
    again = load_patches(save_patches(tmp_path / "c.npz", patches))
    assert np.array_equal(again.hu, patches.hu) and np.array_equal(again.kind, patches.kind)
    assert save_patches(tmp_path / "no suffix", patches).is_file() and save_slices(tmp_path / "none either", slices).is_file() and not list(tmp_path.glob(".*"))
    (tmp_path / "d.npz").write_bytes(b"PK no")
    for name in ("b.npz", "c.npz"): # the inside of the compressed data
        raw = bytearray((tmp_path / name).read_bytes())
        raw[len(raw) // 2:len(raw) // 2 + 64] = bytes(64)
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match="b.npz"): load_slices(tmp_path / "b.npz")
    with pytest.raises(DataError, match="c.npz"): load_patches(tmp_path / "c.npz")
    np.savez(tmp_path / "e.npz", hu=np.zeros(3), tampered=np.array([None], object))
    for name in ("d.npz", "e.npz", "none.npz"):
        for load in (load_slices, load_patches):
            with pytest.raises(DataError, match=name): load(tmp_path / name)


# --- the command ---

def says(capsys, words, *expected):
    assert mits_data(["forge", *map(str, words)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("error: ") and "\n" not in sentence and "Traceback" not in sentence
    for word in expected: assert word in sentence, sentence


def test_command_with_bad_input(scans, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "out"]
    says(capsys, ["everything", *out], "everything", "whole")
    says(capsys, ["all", "--data", tmp_path / "empty", *out], "no scan in")
    says(capsys, ["all", "--data", tmp_path / "nowhere", *out], "nowhere", "does not exist")
    says(capsys, ["all", "--data", scans / "scan-2.mha", *out], "1 patient ", "at least 4")
    says(capsys, ["all", "--scale", "0", *out], "--scale")
    says(capsys, ["all", "--attacker", "nobody", *out], "nobody")
    (tmp_path / "file").write_text("in the way")
    says(capsys, ["all", "--data", scans, "--scale", ".001", "--out", tmp_path / "file"], "file")
    (tmp_path / "full" / "all").mkdir(parents=True)
    (tmp_path / "full" / "all" / "sets.json").write_text("{}")
    says(capsys, ["all", "--data", scans, "--scale", ".001", "--out", tmp_path / "full"], "no list of a data set")
    assert not (tmp_path / "out").exists()


def test_command_makes_phantoms_by_default(tmp_path, capsys, monkeypatch):
    def small(seed, shape):
        scan, nodules = make_phantom(seed=seed, shape=(10, 120, 120), spacing=(3., 3., 3.))
        return Source.of("", scan, [n.centre_voxel for n in nodules])
    monkeypatch.setattr(training, "phantom_source", small)
    monkeypatch.setitem(SetsConfig.presets, "tiny", dict(scale=.0003, slices=1))
    assert mits_data(["forge", "all", "--out", str(tmp_path)]) == 0
    told = read_json(tmp_path / "all" / "sets.json")
    assert {e["scan"] for e in told["files"].values()} == {"phantom-10", "phantom-10000", "phantom-20000", "phantom-30000"}
    shown = capsys.readouterr().out
    assert "4 files" in shown and "local_train" in shown and len(told["settings"]["forgers"]) == 8
