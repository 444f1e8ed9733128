"""Losses, the training loop, its checkpoints and its resume, at their edges."""
import copy
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mits_nb import core, gan
from mits_nb.core import DataError, OutputError, TrainError, UsageError, WeightsError, pick_compute, torch_rng
from mits_nb.gan import (
    History, Snapshots, Task, bce_d_loss, checkpoints, every, fit, frozen, lsgan_d_loss, lsgan_g_loss, lsgan_losses,
    minimax_g_loss, minimax_losses, nonsaturating_g_loss, nonsaturating_losses, patience, read_checkpoint, tensorboard_log,
)

FP32, BF16, FP16 = (pick_compute("cpu", precision) for precision in ("fp32", "bf16", "fp16"))


@pytest.fixture(autouse=True)
def one_thread():
    "Networks of this size only wait for each other on two threads; and 'bit-identical' means: with the same number of threads."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(n_in, n_out, width=16):
    "Batch norm and dropout on purpose: buffers and random numbers must survive a resume too."
    return nn.Sequential(nn.Linear(n_in, width), nn.BatchNorm1d(width), nn.LeakyReLU(.2), nn.Dropout(.3), nn.Linear(width, n_out))


class Toy(Task):
    def __init__(self, seed=0, width=16, decay=False):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            g, d = mlp(2, 2, width), mlp(2, 1, width)
        self.decay = decay
        super().__init__({"g": g, "d": d}, {"g": torch.optim.Adam(g.parameters(), 1e-3, betas=(.5, .999)),
                                            "d": torch.optim.SGD(d.parameters(), 1e-2, momentum=.9)})

    def update(self, x, backward):
        g, d = self.networks["g"], self.networks["d"]
        if self.decay: self.optimizers["g"].param_groups[0]["lr"] = 1e-3 * .9 ** (self.step // 5)
        fake = g(torch.randn(len(x), 2))
        d_loss = bce_d_loss(d(x), d(fake.detach()))
        backward(d_loss)
        self.optimizers["d"].step(); self.optimizers["d"].zero_grad()
        with frozen(d) as judge: g_loss = nonsaturating_g_loss(judge(fake))
        backward(g_loss)
        self.optimizers["g"].step(); self.optimizers["g"].zero_grad()
        return {"d": d_loss, "g": g_loss}

    def validate(self):
        return {"spread": float(self.networks["g"](torch.randn(32, 2)).std())}


def batches(step, rng):
    return torch.randn(16, 2, generator=rng) + 3


def state(task):
    "Every tensor that a training leaves behind, by name."
    found = {f"{n}/{k}": v for n, net in task.networks.items() for k, v in net.state_dict().items()}
    for name, optimizer in task.optimizers.items():
        for i, values in optimizer.state_dict()["state"].items():
            found |= {f"{name}/{i}/{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return found


def assert_same(a, b):
    a, b = state(a), state(b)
    assert a.keys() == b.keys() and len(a) > 20
    for key in a: assert torch.equal(a[key], b[key]), key


# --- losses ------------------------------------------------------------------------------------------------------

def slope(f, x, eps=1e-6):
    "Central finite difference of a scalar function of a float64 tensor, element by element."
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x); step.view(-1)[i] = eps
        out.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return out


@pytest.mark.parametrize("loss", [minimax_g_loss, nonsaturating_g_loss, lsgan_g_loss,
                                  lambda s: bce_d_loss(s, s + 1), lambda s: lsgan_d_loss(s, 2 * s, real=0., fake=1.)])
def test_gradients_match_finite_differences(loss):
    x = torch.linspace(-6, 6, 13, dtype=torch.float64).view(13, 1).requires_grad_()
    gradient, = torch.autograd.grad(loss(x), x)
    assert torch.allclose(gradient, slope(loss, x.detach()), atol=1e-8)


def test_bce_losses_match_torch():
    real, fake = torch.randn(7, 1, 2, 2, 2), torch.randn(5, 1, 2, 2, 2)
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones_like, torch.zeros_like
    assert torch.allclose(bce_d_loss(real, fake), bce(real, one(real)) + bce(fake, zero(fake)))
    assert torch.allclose(nonsaturating_g_loss(fake), bce(fake, one(fake)))
    assert torch.allclose(minimax_g_loss(fake), -bce(fake, zero(fake)))


def test_losses_are_finite_for_huge_logits():
    s = torch.tensor([-1e4, 1e4])
    for value in (bce_d_loss(s, s), minimax_g_loss(s), nonsaturating_g_loss(s)): assert torch.isfinite(value)


def test_saturation():
    s = torch.tensor([-8.], requires_grad=True)  # the discriminator is sure that this sample is generated
    weak, = torch.autograd.grad(minimax_g_loss(s), s)
    strong, = torch.autograd.grad(nonsaturating_g_loss(s), s)
    assert abs(weak) < 1e-3 < .99 < abs(strong) and weak < 0 and strong < 0


def test_least_squares_labels_are_only_names():
    real, fake = torch.randn(9), torch.randn(9)
    assert torch.allclose(lsgan_d_loss(real, fake), lsgan_d_loss(1 - real, 1 - fake, real=0., fake=1.))
    assert torch.allclose(lsgan_g_loss(fake), lsgan_g_loss(1 - fake, real=0.))
    assert lsgan_d_loss(torch.ones(3), torch.zeros(3)) == 0 and lsgan_g_loss(torch.zeros(3)) == 1


def test_pairs():
    assert minimax_losses.d is bce_d_loss and nonsaturating_losses.d is bce_d_loss and lsgan_losses.d is lsgan_d_loss
    assert minimax_losses.g is minimax_g_loss and nonsaturating_losses.g is nonsaturating_g_loss and lsgan_losses.g is lsgan_g_loss


def test_frozen_passes_gradients_but_collects_none():
    net, x = mlp(2, 1), torch.randn(4, 2, requires_grad=True)
    net[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(net) as judge:
        judge(x).sum().backward()
        raise RuntimeError
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    assert not net[0].bias.requires_grad and net[0].weight.requires_grad


# --- the loop ----------------------------------------------------------------------------------------------------

def test_same_seed_same_run_and_global_random_numbers_are_left_alone():
    torch.manual_seed(5); expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = Toy(), Toy(), Toy()
    rows = fit(a, batches, 12, seed=1, compute=FP32).rows
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    assert fit(b, batches, 12, seed=1, compute=FP32).rows == rows
    assert_same(a, b)
    assert fit(c, batches, 12, seed=2, compute=FP32).rows != rows


@pytest.mark.parametrize("compute", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stopped_at", [1, 13, 24])
def test_resume_is_bit_identical(tmp_path, compute, stopped_at):
    settings = dict(seed=3, compute=compute, log_every=3, validate_every=7)
    whole, first = Toy(decay=True), Toy(decay=True)
    second = Toy(seed=8 if stopped_at >= 6 else 0, decay=True)  # before the first checkpoint there is only the start to go back to
    history = fit(whole, batches, 25, **settings)

    def power_cut(step, task, history):
        if step == stopped_at: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fit(first, batches, 25, out=tmp_path, checkpoint_every=6, callbacks=(power_cut,), **settings)
    resumed = fit(second, batches, 25, out=tmp_path, checkpoint_every=6, **settings)
    assert_same(whole, second)
    assert resumed.rows == history.rows == History.load(tmp_path / "history.json").rows
    settings = lambda task: [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in task.optimizers.values()]
    assert settings(whole) == settings(second)


def test_finished_training_is_not_repeated_and_can_be_lengthened(tmp_path):
    a, b = Toy(), Toy()
    fit(a, batches, 20, compute=FP32, validate_every=50)
    fit(b, batches, 10, out=tmp_path, compute=FP32, validate_every=50)
    before = state(copy.deepcopy(b))
    assert len(fit(b, None, 10, out=tmp_path, compute=FP32)) == 10  # `batches` is never called
    assert all(torch.equal(before[k], v) for k, v in state(b).items())
    fit(b, batches, 20, out=tmp_path, compute=FP32, validate_every=50)
    assert_same(a, b)


NURSERY = """
import json, os, random, signal, sys
import torch
torch.set_num_threads(1)
import accelerate, accelerate.utils
from pathlib import Path
sys.path.insert(0, {here!r})
from test_gan import FP32, Toy, batches
from mits_nb import core, gan
out, draw = Path({out!r}), random.Random(4)
Toy()  # the first optimiser imports much of torch: once here, not in each child

def die(): os.kill(os.getpid(), signal.SIGKILL)

def dying(f, chosen, before):  # f, but the n-th chosen call ends the process, before or after the work is done
    left = [draw.randint(2, 5)]
    def g(*args, **kwargs):
        mine = chosen(*args)
        left[0] -= mine
        if mine and not left[0] and before: die()
        result = f(*args, **kwargs)
        if mine and not left[0]: die()
        return result
    return g

def in_the_middle_of(moment):
    step = lambda *args: Path(args[-1]).name.startswith("step-")
    if moment == "tensors":  # half of the file is on the disk
        whole = Path.write_bytes
        def half(self, data): return whole(self, data[:len(data) // 2])
        last = dying(half, lambda *args: True, False)
        Path.write_bytes = lambda self, data: (last(self, data), whole(self, data))[1]
    elif moment == "between the files": gan.write_json = dying(gan.write_json, lambda path, _: path.name == "state.json", True)
    elif moment == "before the rename": os.replace = dying(os.replace, step, True)
    elif moment == "after the rename": os.replace = dying(os.replace, step, False)
    else: gan.shutil.rmtree = dying(gan.shutil.rmtree, step, False)

moments = ["tensors", None, "between the files", None, "before the rename", None, "after the rename", None, "old ones removed", None]
for turn, moment in enumerate(moments):
    steps, pipe = draw.randint(2, 9), os.pipe()
    seed = 8 + turn if gan.checkpoints(out) else 0  # every number must come from the checkpoint
    child = os.fork()
    if child == 0:
        if moment: in_the_middle_of(moment)
        gan.fit(Toy(seed), batches, 10**6, seed=3, out=out, checkpoint_every=1 + turn % 2, log_every=3, validate_every=4, compute=FP32, progress=False,
                callbacks=(lambda step, task, history: os.write(pipe[1], b"."),))
    if moment is None:
        for _ in range(steps): os.read(pipe[0], 1)
        os.kill(child, signal.SIGKILL)  # wherever it is now: most of its time goes into checkpoints
    status = os.waitpid(child, 0)[1]
    print(json.dumps(dict(moment=moment, signal=os.WTERMSIG(status), unfinished=len(list((out / "checkpoints").glob(".tmp-*"))),
                          last=gan.checkpoints(out)[-1].name if gan.checkpoints(out) else "")), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_resume_after_kill_9_ten_times(tmp_path):
    "Ten processes, one after the other, each killed at a random step: five wherever they are, five at a chosen moment inside the writing of a checkpoint."
    script = NURSERY.format(here=str(Path(__file__).parent), out=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    kills = [json.loads(line) for line in run.stdout.splitlines()]
    assert [kill["signal"] for kill in kills] == [signal.SIGKILL] * 10, run.stderr[-2000:]
    assert all(kill["unfinished"] for kill in kills if kill["moment"] in ("tensors", "between the files", "before the rename")), kills
    assert kills[-1]["last"] > "step-00000010" and len({kill["last"] for kill in kills}) >= 5, kills
    steps = int(checkpoints(tmp_path)[-1].name[5:]) + 9
    whole, resumed = Toy(), Toy(seed=88)
    settings = dict(seed=3, compute=FP32, log_every=3, validate_every=4)
    history = fit(whole, batches, steps, **settings)
    assert fit(resumed, batches, steps, out=tmp_path, **settings).rows == history.rows == History.load(tmp_path / "history.json").rows
    assert_same(whole, resumed)
    assert [p.name for p in (tmp_path / "checkpoints").glob(".tmp-*")] == []  # what the killed left behind is gone


# --- float16: losses are scaled, and the scale is state ------------------------------------------------------------

class Faint(Task):
    "A gradient that float16 cannot hold: about 1e-8 for each output."
    def __init__(self):
        torch.manual_seed(0)
        net = nn.Linear(2, 1)
        super().__init__({"net": net}, {"net": torch.optim.SGD(net.parameters(), 1e6)})

    def update(self, x, backward):
        loss = 1e-7 * self.networks["net"](x).square().mean()
        backward(loss)
        self.optimizers["net"].step(); self.optimizers["net"].zero_grad()
        return {"loss": loss}


def test_float16_keeps_faint_gradients():
    tasks = {}
    for compute in (FP32, FP16):
        tasks[compute.dtype] = task = Faint()
        fit(task, batches, 3, compute=compute)
    start, exact, half = (t.networks["net"].weight for t in (Faint(), *tasks.values()))
    assert (exact - start).abs().min() > .05 and torch.allclose(half, exact, rtol=.01, atol=.01)


class Overflow(Toy):
    "At step 4 the generator's gradients overflow."
    def update(self, x, backward):
        calls = []
        def count(loss):
            calls.append(1)
            backward(loss * 1e38 if self.step == 4 and len(calls) == 2 else loss)
        return super().update(x, count)


def test_float16_skips_a_step_that_overflows_and_remembers_the_scale(tmp_path):
    seen = {}
    def watch(step, task, history): seen[step] = task.scaler.get_scale(), task.networks["g"][0].weight.clone(), task.networks["d"][0].weight.clone()
    whole = Overflow()
    history = fit(whole, batches, 8, compute=FP16, callbacks=(watch,))
    scales = {step: scale for step, (scale, *_) in seen.items()}
    assert scales[4] == 65536 and scales[5] == 32768 == scales[8]
    assert torch.equal(seen[4][1], seen[5][1]) and not torch.equal(seen[4][2], seen[5][2]) and not torch.equal(seen[5][1], seen[6][1])
    assert all(type(o).__module__.startswith("torch.optim") and "step" not in o.__dict__ for o in whole.optimizers.values()) and whole.scaler is None

    def power_cut(step, task, history):
        if step == 6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(Overflow(), batches, 8, compute=FP16, out=tmp_path, checkpoint_every=6, callbacks=(power_cut,))
    with pytest.raises(KeyboardInterrupt): fit(Overflow(), batches, 8, compute=FP16, out=tmp_path, checkpoint_every=5, callbacks=(power_cut,))
    seen.clear()
    resumed = Overflow(seed=8)
    assert fit(resumed, batches, 8, compute=FP16, out=tmp_path, callbacks=(watch,)).rows == history.rows
    assert sorted(seen) == [6, 7, 8] and seen[6][0] == 32768
    assert_same(whole, resumed)
    fit(Overflow(), batches, 10, compute=FP32, out=tmp_path)  # another precision may go on; the scale is not needed there


# --- several processes ---------------------------------------------------------------------------------------------

class Plain(Task):
    "No batch norm, no dropout, noise in the batch: two processes with a batch each must equal one process that averages both losses."
    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            g, d = (nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, n)) for n in (2, 1))
        super().__init__({"g": g, "d": d}, {"g": torch.optim.Adam(g.parameters(), 1e-2), "d": torch.optim.Adam(d.parameters(), 1e-2)})

    def update(self, pairs, backward):
        g, d = self.networks["g"], self.networks["d"]
        fakes = [g(z) for _, z in pairs]
        d_loss = sum(bce_d_loss(d(x), d(fake.detach())) for (x, _), fake in zip(pairs, fakes)) / len(pairs)
        backward(d_loss)
        self.optimizers["d"].step(); self.optimizers["d"].zero_grad()
        with frozen(d) as judge: g_loss = sum(nonsaturating_g_loss(judge(fake)) for fake in fakes) / len(pairs)
        backward(g_loss)
        self.optimizers["g"].step(); self.optimizers["g"].zero_grad()
        return {"d": d_loss, "g": g_loss}


def pair(rng): return torch.randn(16, 2, generator=rng) + 3, torch.randn(16, 2, generator=rng)


class Shared(Toy):
    "Batch norm and dropout; each process validates something else."
    def validate(self): return {"v": float(self.rank + self.step)}


WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from test_gan import FP32, Plain, Shared, batches, pair, state
from mits_nb import gan
out = Path({out!r})
Plain()  # the first optimiser imports much of torch: once here, not in both
other = os.fork()
Shared.rank = rank = int(other == 0)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
written, save = [], gan.save_checkpoint
def counted(*args): written.append(args[3]); return save(*args)
gan.save_checkpoint = counted

plain = Plain()
gan.fit(plain, lambda step, rng: [pair(rng)], 10, seed=5, compute=FP32)
settings = dict(seed=3, compute=FP32, log_every=2, validate_every=3, progress=False)
whole, mains = Shared(), []
history = gan.fit(whole, batches, 12, callbacks=(lambda step, task, _: mains.append(task.main),), **settings)
def power_cut(step, task, _):
    if step == 7: raise KeyboardInterrupt
try: gan.fit(Shared(), batches, 12, out=out, checkpoint_every=5, callbacks=(power_cut,), **settings)
except KeyboardInterrupt: pass
torch.distributed.barrier()
resumed = Shared(seed=9)
again = gan.fit(resumed, batches, 12, out=out, checkpoint_every=5, **settings)
stopped = gan.fit(Shared(), batches, 500, stop=gan.patience("v", rows=2), **settings)
assert again.rows == history.rows and len(stopped.rows) < 20, (again.rows, history.rows)
assert mains == [rank == 0] * 12
assert all(type(net) is torch.nn.Sequential and "forward" not in net.__dict__ for net in resumed.networks.values())
for name, task in dict(plain=plain, whole=whole, resumed=resumed).items():
    save_file({{k: v.contiguous() for k, v in state(task).items()}}, out / f"{{name}}-{{rank}}.safetensors")
history.save(out / f"rows-{{rank}}.json")
(out / f"written-{{rank}}").write_text(str(written))
torch.distributed.destroy_process_group()
if other: sys.exit(os.waitpid(other, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes(tmp_path):
    import socket
    from safetensors.torch import load_file
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = WORKER.format(here=str(Path(__file__).parent), out=str(tmp_path), port=port)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [(tmp_path / f"written-{rank}").read_text() for rank in (0, 1)] == ["[5, 10, 12]", "[]"]  # by one of them only
    saved = {name: [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)] for name in ("plain", "whole", "resumed")}
    for name, (a, b) in saved.items():  # equal weights, running statistics and optimiser state in both
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert all(torch.equal(tensor, saved["resumed"][0][k]) for k, tensor in saved["whole"][0].items())
    assert History.load(tmp_path / "rows-0.json") == History.load(tmp_path / "rows-1.json")
    assert History.load(tmp_path / "rows-0.json")["v"][0] == 2.5  # the mean over both

    alone = Plain()
    fit(alone, lambda step, rng: [pair(torch_rng(5, "batch", step, rank)) for rank in (0, 1)], 10, seed=5, compute=FP32)
    assert all(torch.allclose(tensor, saved["plain"][0][k], rtol=1e-4, atol=1e-6) for k, tensor in state(alone).items())
    assert any(not torch.allclose(tensor, saved["plain"][0][k], atol=1e-2) for k, tensor in state(Plain()).items() if k in state(alone))


# --- files and damage ------------------------------------------------------------------------------------------------

def test_checkpoints_keep_two_and_hold_no_pickle(tmp_path):
    fit(Toy(), batches, 10, out=tmp_path, checkpoint_every=3, compute=FP32)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == [f"checkpoints/step-{n:08d}/{f}" for n in (9, 10) for f in ("state.json", "tensors.safetensors")] + ["history.json"]


def cut(path): path.write_bytes(path.read_bytes()[:-100])
def flip(path):
    data = bytearray(path.read_bytes()); data[-5] ^= 1; path.write_bytes(data)
def empty(path): path.write_bytes(b"")
def remove(path): path.unlink()


TENSORS, STATE = "tensors.safetensors", "state.json"


@pytest.mark.parametrize("file, damage", [(TENSORS, cut), (TENSORS, flip), (TENSORS, remove), (STATE, cut), (STATE, empty), (STATE, remove)])
def test_damaged_checkpoint_falls_back(tmp_path, caplog, damage, file):
    whole, first, second = Toy(), Toy(), Toy(seed=8)
    fit(whole, batches, 12, compute=FP32)
    fit(first, batches, 10, out=tmp_path, checkpoint_every=5, compute=FP32, validate_every=100)
    damage(checkpoints(tmp_path)[-1] / file)
    seen = []
    with caplog.at_level(logging.WARNING):
        fit(second, batches, 12, out=tmp_path, compute=FP32, callbacks=(lambda step, *_: seen.append(step),))
    assert seen[0] == 6 and "step-00000010" in caplog.text and "trying the checkpoint before it" in caplog.text
    assert_same(whole, second)


def test_no_readable_checkpoint(tmp_path):
    fit(Toy(), batches, 4, out=tmp_path, checkpoint_every=2, compute=FP32)
    for folder in checkpoints(tmp_path): cut(folder / "tensors.safetensors")
    with pytest.raises(TrainError, match="none of the 2 checkpoints"): fit(Toy(), batches, 6, out=tmp_path, compute=FP32)
    with pytest.raises(DataError, match="checksum"): read_checkpoint(checkpoints(tmp_path)[0])
    assert len(fit(Toy(), batches, 6, out=tmp_path, resume=False, compute=FP32)) == 6
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000006"]


def test_mismatches_say_what_differs_and_change_nothing(tmp_path):
    fit(Toy(), batches, 4, out=tmp_path, compute=FP32)
    with pytest.raises(TrainError, match="seed 0, this one has seed 1"): fit(Toy(), batches, 4, seed=1, out=tmp_path, compute=FP32)
    with pytest.raises(TrainError, match="4 steps, more than the 3"): fit(Toy(), batches, 3, out=tmp_path, compute=FP32)
    wide = Toy(width=8)
    before = copy.deepcopy(wide.networks["g"].state_dict())
    with pytest.raises(WeightsError, match=r"shape \(16, 2\) there and \(8, 2\) here"): fit(wide, batches, 8, out=tmp_path, compute=FP32)
    assert all(torch.equal(before[k], v) for k, v in wide.networks["g"].state_dict().items())
    other = Toy(); other.networks["judge"] = other.networks.pop("d")
    with pytest.raises(WeightsError, match=r"networks \['d', 'g'\]"): fit(other, batches, 8, out=tmp_path, compute=FP32)
    other = Toy(); other.networks["g"] = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(WeightsError, match="network 'g' differs"): fit(other, batches, 8, out=tmp_path, compute=FP32)
    other = Toy(); other.optimizers["d"] = torch.optim.SGD(list(other.networks["d"].parameters())[:2], .1)
    with pytest.raises(WeightsError, match="optimiser 'd'"): fit(other, batches, 8, out=tmp_path, compute=FP32)
    other = Toy(); del other.optimizers["d"]
    with pytest.raises(WeightsError, match="optimisers"): fit(other, batches, 8, out=tmp_path, compute=FP32)


def test_networks_come_back_plain_also_after_an_error():
    task = Toy()
    task.frozen["fixed"] = mlp(2, 2)
    nets = dict(task.networks) | task.frozen

    class Broken(Exception): pass
    def stop_here(step, t, history):
        inside = t.networks["g"](torch.randn(4, 2)), t.frozen["fixed"](torch.randn(4, 2))
        assert all(x.dtype == torch.float32 for x in inside)  # outputs and therefore losses are float32
        assert "forward" in t.networks["g"].__dict__  # lent to Accelerate
        if step == 2: raise Broken
    with pytest.raises(Broken): fit(task, batches, 5, compute=BF16, callbacks=(stop_here,))
    for name, net in nets.items():
        assert (task.networks | task.frozen)[name] is net
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & net.__dict__.keys()
        assert all(p.dtype == torch.float32 for p in net.parameters())
    x = torch.randn(4, 2)
    assert torch.equal(copy.deepcopy(nets["g"]).eval()(x), nets["g"].eval()(x))


def test_bfloat16_computes_in_bfloat16_but_keeps_float32_weights():
    seen = []
    task = Toy()
    for net in task.networks.values(): net[4].register_forward_hook(lambda m, i, o: seen.append((o.dtype, m.weight.dtype)))
    fit(task, batches, 1, compute=BF16)
    assert set(seen) >= {(torch.bfloat16, torch.float32)}
    seen.clear()
    fit(task, batches, 1, compute=FP32)  # precision changes between two calls of one process
    assert set(seen) == {(torch.float32, torch.float32)}


def test_half_precision_weights_become_float32():
    task = Toy()
    task.networks["g"].to(torch.bfloat16)
    fit(task, batches, 2, compute=FP32)
    assert all(p.dtype == torch.float32 for p in task.networks["g"].parameters())


def test_no_warnings_and_nothing_printed(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for compute in (FP32, BF16): fit(Toy(), batches, 5, out=tmp_path / compute.why.replace(" ", ""), checkpoint_every=2, compute=compute)
    out, err = capfd.readouterr()
    assert out == "" and err.strip() == ""


def test_rows_validation_callbacks_and_every():
    calls, thinned, modes = [], [], []

    class Watched(Toy):
        def validate(self):
            modes.append((self.networks["g"].training, torch.is_grad_enabled()))
            return {"v": 1.}
    task = Watched()
    task.networks["d"][1].eval()  # fit starts with everything in training mode
    history = fit(task, batches, 11, log_every=4, validate_every=3, compute=FP32,
                  callbacks=(lambda s, t, h: calls.append((s, t.step, len(h))), every(5, lambda s, t, h: thinned.append(s))))
    assert [row["step"] for row in history.rows] == [3, 4, 6, 8, 9, 11]
    assert [row["step"] for row in history.rows if "v" in row] == [3, 6, 9, 11] and modes == [(False, False)] * 4
    assert history.names == ["d", "g", "v"] and len(history["v"]) == 4 and len(history["d"]) == 6
    assert [c[:2] for c in calls] == [(s, s - 1) for s in range(1, 12)] and thinned == [5, 10]
    assert task.networks["g"].training and task.networks["d"][1].training


def test_validation_and_callbacks_do_not_disturb_training():
    plain, watched = Toy(), Toy()
    fit(plain, batches, 8, compute=FP32, validate_every=100)

    def draw(step, task, history):
        with task.evaluating(): task.networks["g"](torch.randn(64, 2))
    fit(watched, batches, 8, compute=FP32, validate_every=1, callbacks=(draw,))
    assert_same(plain, watched)


def test_early_stop_and_its_resume(tmp_path):
    stop = lambda history: len(history) >= 3
    task = Toy()
    history = fit(task, batches, 50, log_every=2, stop=stop, out=tmp_path, compute=FP32)
    assert [row["step"] for row in history.rows] == [2, 4, 6] and checkpoints(tmp_path)[-1].name == "step-00000006"
    assert fit(Toy(), None, 50, log_every=2, stop=stop, out=tmp_path, compute=FP32).rows == history.rows


def test_batches_may_be_nested():
    class Nested(Toy):
        def update(self, batch, backward):
            assert isinstance(batch, dict) and isinstance(batch["pair"], tuple)
            return super().update(batch["pair"][1], backward)
    fit(Nested(), lambda step, rng: {"pair": (step, batches(step, rng))}, 2, compute=FP32)


def test_weights_that_are_not_finite_never_become_a_checkpoint(tmp_path):
    class Spoilt(Toy):
        def update(self, x, backward):
            losses = super().update(x, backward)
            if self.step == 5: next(self.networks["g"].parameters()).data[0] = float("inf")  # after the loss was computed, as a bad update does it
            return losses
    with pytest.raises(TrainError, match="not finite after step 6"): fit(Spoilt(), batches, 20, out=tmp_path, checkpoint_every=3, compute=FP32)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003"]


def test_loss_that_is_not_finite(tmp_path):
    class Bad(Toy):
        def update(self, x, backward): return super().update(x, backward) | ({"g": torch.tensor(float("nan"))} if self.step == 7 else {})
    with pytest.raises(TrainError, match="'g' is nan after step 8"): fit(Bad(), batches, 20, out=tmp_path, checkpoint_every=3, compute=FP32)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]
    for p in checkpoints(tmp_path): read_checkpoint(p)


def test_bad_arguments(tmp_path):
    for bad in (dict(steps=-1), dict(steps=5, log_every=0)):
        with pytest.raises(UsageError): fit(Toy(), batches, **bad, compute=FP32)
    class Silent(Toy):
        def update(self, x, backward): return {}
    with pytest.raises(TrainError, match="no losses"): fit(Silent(), batches, 1, compute=FP32)
    with pytest.raises(NotImplementedError): fit(Task({}, {}), batches, 1, compute=FP32)
    (tmp_path / "file").write_text("")
    class Untouched(Toy):
        def update(self, x, backward): raise AssertionError("training began before the folder was tried")
    with pytest.raises(OutputError): fit(Untouched(), batches, 1, out=tmp_path / "file" / "x", compute=FP32)
    assert len(fit(Toy(), batches, 0, out=tmp_path / "none", compute=FP32)) == 0 and not checkpoints(tmp_path / "none")


def test_disk_full_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    fit(Toy(), batches, 4, out=tmp_path, compute=FP32)
    real = Path.write_bytes

    def full(self, data):
        if self.name == "tensors.safetensors":
            real(self, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"): fit(Toy(), batches, 8, out=tmp_path, compute=FP32)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert read_checkpoint(checkpoints(tmp_path)[0])[1]["step"] == 4


# --- early stop, pictures, TensorBoard, progress ---------------------------------------------------------------------

def rows(*values): return History([{"step": i, "v": v} for i, v in enumerate(values)])


@pytest.mark.parametrize("values, settings, stops", [
    ((3, 2, 1), {}, False), ((3, 2, 1, 1, 1), {}, True), ((3, 2, 1, 1, .5, .5), {}, False), ((1,), {}, False), ((), {}, False),
    ((3, 2.95, 2.9), dict(min_delta=.2), True),                # two small gains in a row do not count
    ((3, 2.9, 2.75), dict(min_delta=.2), False),               # but they add up: the record is the last value that counted
    ((1, 2, 3), dict(best="max"), False), ((3, 2, 1), dict(best="max"), True), ((1, 1, 2), dict(best="max", rows=1), False),
])
def test_patience(values, settings, stops):
    assert patience("v", **{"rows": 2, **settings})(rows(*values)) is stops


def test_patience_stops_a_training_and_refuses_nonsense():
    class Worse(Toy):
        def validate(self): return {"v": abs(self.step - 7)}
    history = fit(Worse(), batches, 100, validate_every=2, log_every=50, stop=patience("v", rows=3), compute=FP32)
    assert history["v"] == [6, 4, 2, 0, 2, 4, 6]
    for bad in (dict(rows=0), dict(best="least"), dict(min_delta=-1.), dict(min_delta=float("nan"))):
        with pytest.raises(UsageError): patience("v", **bad)
    assert not patience("not measured")(rows(1, 2, 3))


def test_snapshots(tmp_path):
    import matplotlib.image
    modes = []
    def draw(task):
        modes.append((task.networks["g"].training, torch.is_grad_enabled()))
        made = task.networks["g"](torch.randn(12, 2)).view(2, 3, 4)
        return {"condition": torch.zeros(2, 3, 4), "generated": made, "original": torch.ones(2, 3, 4)}
    watched, plain = Toy(), Toy()
    snapshots = Snapshots(4, draw, folder=tmp_path / "pictures", window=(-1., 1.))
    fit(watched, batches, 10, compute=FP32, callbacks=(snapshots,))
    fit(plain, batches, 10, compute=FP32)
    assert_same(plain, watched)  # drawing random numbers disturbs nothing
    assert list(snapshots.taken) == [1, 4, 8] and set(modes) == {(False, False)}
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["step-00000001.png", "step-00000004.png", "step-00000008.png"]
    assert matplotlib.image.imread(tmp_path / "pictures" / "step-00000004.png").shape[:2] == (2 * 5, 3 * 6)
    titles = [ax.get_title() for ax in snapshots.plot().axes if ax.get_title()]
    assert titles == ["condition", "generated\nstep 1", "generated\nstep 4", "generated\nstep 8", "original"]
    assert len(snapshots.plot(steps=[8]).axes) == 6
    assert snapshots.take(10, watched)["generated"].shape == (2, 3, 4) and 10 in snapshots.taken
    with pytest.raises(UsageError, match="no snapshots"): Snapshots(1, draw).plot()
    with pytest.raises(UsageError): Snapshots(0, draw)
    for bad in (lambda task: {}, lambda task: {"a": torch.zeros(3)}, lambda task: {"a": torch.zeros(2, 3, 3), "b": torch.zeros(1, 3, 3)}):
        with pytest.raises(UsageError, match="draw"): Snapshots(1, bad).take(1, watched)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError): Snapshots(1, draw, folder=tmp_path / "file").take(1, watched)


def test_only_the_main_process_takes_snapshots():
    task, snapshots = Toy(), Snapshots(1, lambda task: {"a": torch.zeros(3, 3)})
    task.main = False
    snapshots(1, task, History())
    assert not snapshots.taken


def test_tensorboard_log_survives_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    def power_cut(step, task, history):
        if step == 7: raise KeyboardInterrupt
    run = dict(out=tmp_path / "run", checkpoint_every=5, validate_every=4, compute=FP32)
    with pytest.raises(KeyboardInterrupt): fit(Toy(), batches, 10, callbacks=(tensorboard_log(tmp_path / "tb"), power_cut), **run)
    history = fit(Toy(seed=9), batches, 10, callbacks=(tensorboard_log(tmp_path / "tb"),), **run)
    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["d", "g", "spread"]
    for name in history.names:
        events = {e.step: e.value for e in found.Scalars(name)}
        assert events == pytest.approx({row["step"]: row[name] for row in history.rows if name in row}, rel=1e-6), name


def test_tensorboard_missing_is_said_in_one_sentence(monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard" or n.startswith("torch.utils.tensorboard")]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match="pip install"): tensorboard_log(tmp_path)


def test_progress_bar_shows_the_time_left(monkeypatch, capfd, tmp_path):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(gan, "progress_bar", lambda **kwargs: core.progress(**kwargs, delay=0, mininterval=0))
    fit(Toy(), batches, 6, out=tmp_path, compute=FP32, desc="toy")
    capfd.readouterr()
    fit(Toy(), batches, 9, out=tmp_path, compute=FP32, desc="toy")
    import re
    bars = re.findall(r"toy: +\d+%\|.*?(\d+)/9 \[(\d\d:\d\d)<(\d\d:\d\d|\?)", capfd.readouterr().err)
    assert bars and bars[0][0] == "6" and {int(n) for n, *_ in bars} >= {7, 8}  # goes on from 6, with elapsed < left


# --- history -----------------------------------------------------------------------------------------------------

def test_history_file_and_plot(tmp_path):
    history = History([{"step": 1, "a": .5}, {"step": 2, "a": .25, "b": 1.}])
    assert History.load(history.save(tmp_path / "h.json")) == history
    figure = history.plot(title="t")
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert [len(ax.lines[-1].get_xdata()) for ax in history.plot(names=["a"], smooth=2).axes] == [1]
    assert len(History().plot().axes) == 1
    for text in ("{}", "[]", '{"rows": [{"a": 1}]}', '{"rows": [', '{"rows": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError): History.load(tmp_path / "bad.json")
    with pytest.raises(DataError): History.load(tmp_path / "missing.json")
    assert json.loads((tmp_path / "h.json").read_text())["rows"][0]["step"] == 1


def test_recipe_of_checkpoints(tmp_path):
    from dataclasses import dataclass
    from mits_nb.gan import networks_digest, same_recipe

    @dataclass(frozen=True)
    class Config:
        width: int = 8
        lr: float = 1e-3
        d_lr: float = 1e-3
        betas: tuple = (.5, .9)

    same_recipe(tmp_path / "a", Config(), data=["x"])
    same_recipe(tmp_path / "a", Config(lr=1e-4, d_lr=1e-5), data=["x"])
    with pytest.raises(TrainError, match="another data and another width"): same_recipe(tmp_path / "a", Config(width=16), data=["y"])
    one, same, other = (torch.nn.Linear(2, 2) for _ in range(3))
    same.load_state_dict(one.state_dict())
    holder = lambda net: type("Forger", (), {"injector": net, "remover": None})()
    assert networks_digest(one) == networks_digest(same) != networks_digest(other)
    assert networks_digest(holder(one)) == networks_digest(holder(same)) != networks_digest(holder(other)) and networks_digest(holder(one)) != networks_digest(one)
