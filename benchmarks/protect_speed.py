"""Speed of protection: one slice beside the released arithmetic and beside its bare convolutions, a whole DICOM series, one training step.

    python benchmarks/protect_speed.py [--only slice series step] [--threads 2] [--repeats 5] [--slices 300] [--folder SERIES] [--device cpu] [--json FILE]

slice   the published generator (width 64, released variant, noise net included) on one 512 x 512 slice: float64 as it is in NCHW (the released
        arithmetic), float32, bfloat16 under autocast in channels last, and folded in bfloat16 (`protect.mitsgan.folded`, what `protect` runs);
        and the convolutions of the folded network alone, each on an input of its own shape and format. Goals on a CPU with AMX:
        float64 / folded >= 20, folded / bare <= 1.3. Also the network that ships, folded, beside its bare convolutions.
series  `mits_protect IN OUT` on a made DICOM series, in a process of its own: seconds on the wall and peak memory. Goals: 300 slices of
        512 x 512 in <= 150 s on two cores, <= 3 GB.
step    `ProtectTask.update` of the tiny preset beside the same update whose damage is measured on the protected crops themselves, without
        an attacker. Goal: <= 2.5.

The versions take turns within each repetition, so that a busy machine slows all of them; printed are the median of the ratios taken turn by turn,
and their quartiles. With one thread the clock is processor time, with more the one on the wall, which only an idle machine makes worth reading.
"""
import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mits_nb.core import has_amx, pick_compute, torch_rng, versions

COMMAND = """
import sys
from mits_nb.cli import mits_protect
from mits_nb.core import peak_rss_mb
import torch
torch.set_num_threads(int(sys.argv[3]))
code = mits_protect(sys.argv[1:3])
print(f"peak {peak_rss_mb():.0f}")
sys.exit(code)
"""


def seconds(call, device: str) -> float:
    if device != "cpu": torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    if device != "cpu": torch.cuda.synchronize()
    return clock() - start


def take_turns(calls: dict, repeats: int, device: str) -> dict:
    "Seconds of each call, in turns, after one round to warm up."
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = seconds(call, device)
            if turn: times[name].append(took)
    return times


def say(title: str, times: dict, ratios: list) -> dict:
    "Print medians, and for each (slow, quick, goal) the ratio turn by turn."
    print(f"\n{title}\n    load of the machine now {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, took in times.items(): print(f"    {name:34s} median {1000 * statistics.median(took):8.1f} ms   {' '.join(f'{1000 * t:.0f}' for t in took)}")
    found = {}
    for slow, quick, goal in ratios:
        each = sorted(a / b for a, b in zip(times[slow], times[quick]))
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 2 else (each[0], statistics.median(each), each[-1])
        found[f"{slow} / {quick}"] = dict(median=middle, quartiles=(low, high), goal=goal)
        print(f"    {slow + ' / ' + quick:46s} {middle:6.2f}   (quartiles {low:.2f} to {high:.2f}){f'   goal {goal}' if goal else ''}")
    return dict(seconds=times, ratios=found)


def settled(net, seed: int = 0):
    "Batch norms with statistics, as after a training: what they hold costs no time, but zeros might."
    torch.manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1); layer.running_var.uniform_(0.5, 2); layer.weight.data.uniform_(0.5, 1.5)
    return net.eval()


def bare(net, *inputs):
    "The convolutions of a network on inputs of the shapes and formats that they see: nothing between them."
    seen, hooks = [], []
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d): hooks.append(layer.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].clone(memory_format=torch.preserve_format)))))
    net(*inputs)
    for hook in hooks: hook.remove()
    def run():
        for conv, x in seen: conv(x)
    return run


def measure_slice(args) -> dict:
    from mits_nb.protect.mitsgan import MitsGAN, Protector, folded
    compute, cl = pick_compute(args.device), torch.channels_last
    hu = -700 + 300 * torch.randn(1, 1, 512, 512, generator=torch_rng(0, "slice"))
    noise = torch.rand(1, 1, 512, 512, generator=torch_rng(1, "slice"))
    ends, home = (-1024.0, 3071.0), compute.device
    net = settled(Protector(64, "released", noise="uniform")).to(home)
    exact, plain, half, quick = copy.deepcopy(net).double(), net, copy.deepcopy(net).to(memory_format=cl), folded(net, compute.dtype)
    h, n, h64, n64 = hu.to(home), noise.to(home), hu.double().to(home), noise.double().to(home)
    ours = folded(MitsGAN.from_pretrained("mitsgan-tiny").protector, compute.dtype).to(home)
    arguments = (0.7, 0.7), torch.zeros(1, device=home), ends
    def autocast():
        with compute.autocast(): answer["autocast"] = half(h, n, *arguments)
    with torch.inference_mode():
        texture, answer = quick.texture(n), {}
        calls = {"float64, NCHW (released)": lambda: answer.update(float64=exact(h64, n64, *arguments)), "float32, NCHW": lambda: plain(h, n, *arguments), "autocast, channels last": autocast,
                 "folded": lambda: answer.update(folded=quick(h, n, *arguments)), "folded, texture given": lambda: quick.paint(h, texture, (1.0, 1.0), ends), "bare convolutions": bare(quick, h, n, *arguments),
                 "ours, folded": lambda: ours(h, n, *arguments), "ours, bare convolutions": bare(ours, h, n, *arguments)}
        times = take_turns(calls, args.repeats, args.device)
    found = say(f"one slice of 512 x 512, released generator of width 64, {torch.get_num_threads()} threads, {compute.dtype}", times,
                [("float64, NCHW (released)", "folded", ">= 20"), ("float64, NCHW (released)", "autocast, channels last", ""), ("autocast, channels last", "folded", ""),
                 ("folded", "bare convolutions", "<= 1.3"), ("folded, texture given", "bare convolutions", ""), ("ours, folded", "ours, bare convolutions", ""), ("float64, NCHW (released)", "ours, folded", "")])
    found["rmse_hu"] = {name: float((value.double() - answer["float64"]).square().mean().sqrt()) for name, value in answer.items() if name != "float64"}
    print("    RMSE from float64, on a scale of 4095 HU: " + ", ".join(f"{name} {value:.2f} HU" for name, value in found["rmse_hu"].items()))
    return found


def measure_series(args) -> dict:
    from mits_nb.phantom import make_phantom
    from mits_nb.scan import Scan, write_scan
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or Path(temporary, "in"))
        if not args.folder:
            few = make_phantom(seed=0, shape=(min(args.slices, 20), 512, 512), spacing=(2.5, 0.7, 0.7))[0].hu
            write_scan(Scan(np.resize(few, (args.slices, 512, 512)), (1.25, 0.7, 0.7)), folder)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND, str(folder), str(Path(temporary, "out")), str(torch.get_num_threads())], check=True, capture_output=True, text=True)
        took = time.perf_counter() - start
    *lines, last = done.stdout.strip().splitlines()
    peak = float(last.split()[1])
    print(f"\nmits_protect on a DICOM series, {torch.get_num_threads()} threads\n    load of the machine now {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for line in lines: print(f"    {line}")
    print(f"    {took:.1f} s from start to end, goal <= 150 s for 300 slices; peak memory {peak:.0f} MB, goal <= 3000 MB")
    return dict(seconds=took, peak_mb=peak, told=lines)


def measure_step(args) -> dict:
    from mits_nb.attack.ctgan import CTGAN
    from mits_nb.core import from_preset
    from mits_nb.phantom import make_phantom
    from mits_nb.protect.losses import forgery_damage
    from mits_nb.protect.mitsgan import MitsganConfig, PlaceBatches, Protector, ProtectorDiscriminator, ProtectTask, middle_box

    class WithoutAttacker(ProtectTask):
        def damage(self, batch, protected):
            boxes = [middle_box(place, tuple(batch["spacing"].tolist()), x.shape) for x, place in zip(batch["hu"], batch["at"].tolist())]
            return sum(forgery_damage(xp[box], x[box]) for x, xp, box in zip(batch["hu"], protected, boxes)) / len(protected), {}

    compute, config = pick_compute(args.device), from_preset(MitsganConfig, "tiny", places_per_scan=8)
    scan = make_phantom(seed=1000, shape=(24, 256, 256), spacing=(2.5, 0.8, 0.8))[0]
    attacker, batches = CTGAN.from_pretrained("ctgan-tiny").to(compute.device), PlaceBatches([scan], config)
    batch = {name: value.to(compute.device) for name, value in batches(0, torch_rng(0, "step")).items()}
    calls = {}
    for name, kind in (("step through the attacker", ProtectTask), ("step without it", WithoutAttacker)):
        torch.manual_seed(0)
        nets = (Protector(config.width, blocks=config.blocks).to(compute.device), ProtectorDiscriminator(config.d_width, "ours").to(compute.device))
        task = kind(*nets, attacker, config)
        def step(task=task):
            with compute.autocast(): task.update(batch, lambda loss: loss.backward())
        calls[name] = step
    k, *shape = batch["hu"].shape
    return say(f"one training step, {k} places, crops of {' x '.join(map(str, shape))}, {torch.get_num_threads()} threads, {compute.dtype}", take_turns(calls, 2 * args.repeats, args.device),
               [("step through the attacker", "step without it", "<= 2.5")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("slice", "series", "step"), default=("slice", "series", "step"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--folder", help="an existing series instead of the made one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(args.threads)
    figures = dict(versions=versions(), amx=has_amx(), load=os.getloadavg()[0], threads=args.threads)
    print(f"AMX: {has_amx()}; device: {args.device if args.device == 'cpu' else torch.cuda.get_device_name()}; load at the start: {figures['load']:.1f}")
    for part in args.only: figures[part] = {"slice": measure_slice, "series": measure_series, "step": measure_step}[part](args)
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
