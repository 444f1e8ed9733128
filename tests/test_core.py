"""Edges of the core tools: presets, places to write, weights folders, randomness across processes."""
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from mits_nb import core


def test_streams_are_the_same_in_another_process():
    code = "from mits_nb.core import rng, torch_rng; import torch; print(rng(5, 'a', 2).integers(2**40), torch.rand(1, generator=torch_rng(5, 'a')).item())"
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": str(s)}).stdout for s in (1, 2)}
    assert len(outputs) == 1
    assert outputs.pop().split() == [str(core.rng(5, "a", 2).integers(2**40)), str(torch.rand(1, generator=core.torch_rng(5, "a")).item())]


@pytest.mark.parametrize("first, second", [((0, "a"), (0, "b")), ((0, "a"), (1, "a")), ((0, 1, 2), (0, 12)), ((-1,), (1,))])
def test_streams_with_other_names_differ(first, second):
    assert not np.array_equal(core.rng(*first).random(4), core.rng(*second).random(4))
    assert not torch.equal(torch.rand(4, generator=core.torch_rng(*first)), torch.rand(4, generator=core.torch_rng(*second)))


def test_all_errors_share_one_base():
    errors = [v for v in vars(core).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(errors) >= 9 and all(issubclass(e, core.MitsError) for e in errors)


@dataclass(frozen=True)
class Config:
    size: int = 9
    presets: ClassVar[dict] = {"tiny": {"size": 1}, "full": {}}


def test_presets():
    assert core.from_preset(Config, "tiny").size == 1
    assert core.from_preset(Config, "full").size == 9
    assert core.from_preset(Config, "tiny", size=4).size == 4
    with pytest.raises(core.UsageError, match="huge"):
        core.from_preset(Config, "huge")
    with pytest.raises(core.UsageError, match="sise"):
        core.from_preset(Config, "tiny", sise=4)


def test_compute_refuses_what_is_not_there():
    assert core.pick_compute("cpu", "fp32").dtype == torch.float32
    assert core.pick_compute("cpu", "bf16").dtype == torch.bfloat16
    with pytest.raises(core.UsageError):
        core.pick_compute("no-such-device")
    with pytest.raises(core.UsageError):
        core.pick_compute("cpu", "fp8")
    if not torch.cuda.is_available():
        with pytest.raises(core.UsageError, match="no CUDA"):
            core.pick_compute("cuda")
        assert "no CUDA device found" in core.pick_compute().why


def test_autocast_follows_the_choice():
    a = torch.ones(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with core.pick_compute("cpu", precision).autocast():
            assert (a @ a).dtype == dtype


def test_a_failed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.nii.gz"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError):
        with core.atomic_write(target) as temporary:
            assert temporary.name.endswith(".nii.gz") and temporary.parent == tmp_path
            temporary.write_text("new")
            1 / 0
    assert target.read_text() == "old"
    with core.atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_was_never_written_is_an_error(tmp_path):
    with pytest.raises(core.OutputError):
        with core.atomic_write(tmp_path / "a.txt"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_failed_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "d"
    with core.atomic_dir(target) as stage:
        (stage / "x").write_text("1")
    with pytest.raises(core.OutputError, match="full"):
        with core.atomic_dir(target) as stage:
            (stage / "y").write_text("2")
            raise OSError(28, "disk full")
    assert [p.name for p in target.iterdir()] == ["x"]
    with core.atomic_dir(target) as stage:
        (stage / "z").write_text("3")
    assert [p.name for p in target.iterdir()] == ["z"]
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(core.OutputError, match="exists"):
        with core.atomic_dir(target, overwrite=False):
            pass


def test_json_round_trip_and_refusals(tmp_path):
    value = {"a": np.int64(3), "b": np.arange(3), "c": [1.5, None, "ü"], "d": tmp_path, "e": torch.tensor([1, 2])}
    assert core.read_json(core.write_json(tmp_path / "x.json", value)) == {"a": 3, "b": [0, 1, 2], "c": [1.5, None, "ü"], "d": str(tmp_path), "e": [1, 2]}
    with pytest.raises(ValueError):
        core.write_json(tmp_path / "x.json", float("inf"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(core.DataError, match="bad.json"):
        core.read_json(tmp_path / "bad.json")
    with pytest.raises(core.DataError, match="does not exist"):
        core.read_json(tmp_path / "none.json")


def test_weights_must_be_complete(tmp_path):
    with pytest.raises(core.WeightsError, match="ctgan-tiny"):
        core.weights_path("no-such-name")
    (tmp_path / "config.json").write_text("{}")
    assert core.weights_path(tmp_path, "config.json") == tmp_path
    with pytest.raises(core.WeightsError, match="model.safetensors"):
        core.weights_path(tmp_path, "config.json", "model.safetensors")
    assert core.weights_path("ctgan-tiny", "card.md").is_dir()


def test_torchvision_imports():
    code = "from mits_nb.core import import_torchvision; tv = import_torchvision(); tv.models.squeezenet1_1(); print('fine')"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "fine", result.stderr


def test_files_get_the_usual_permissions(tmp_path):
    "safetensors leaves 0600, which nobody but the owner can read: not what one wants in a shared folder."
    def shy(path):
        path.write_text("x")
        path.chmod(0o600)
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    with core.atomic_write(tmp_path / "a.txt") as temporary: shy(temporary)
    with core.atomic_dir(tmp_path / "d") as folder: shy(folder / "b.txt")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "d" / "b.txt").stat().st_mode == usual
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "b.txt", "d", "plain"]


@pytest.mark.parametrize("variable, disable, hidden", [("", False, False), ("", True, True), ("1", False, True), ("0", False, False), ("1", True, True)])
def test_bars_can_be_switched_off_from_outside(monkeypatch, variable, disable, hidden):
    monkeypatch.setenv("TQDM_DISABLE", variable)
    assert bool(core.progress(range(3), disable=disable).disable) == hidden
