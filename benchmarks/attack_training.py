"""Time of a training step of the attacker in float32 and in bfloat16, and of the full-size generator's forward pass.

    python benchmarks/attack_training.py [--widths 16:8:16 100:100:2] [--threads 1 2] [--repeats 7] [--device cpu] [--json FILE]

One step is what chapter 9 does with a batch of cubes (discriminator, then generator, two Adams), without cutting and turning the cubes.
The formats take turns within each repetition, so that a busy machine slows all of them; printed are the median of the ratios taken
turn by turn, and their spread (quartiles). With one thread it is processor time, with more the clock on the wall, which only an idle
machine makes worth reading. "naive" is the same step with the way up computed as released (repeat voxels, then convolve).
On a GPU also: cubes per second and the share of the peak in bf16, products counted by torch.utils.flop_counter. The count is that of
the released way to compute, so that doing less work for the same function does not lower the share. Goal on a CPU with AMX: >= 1.8.
"""
import argparse
import contextlib
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mits_nb.attack import nets
from mits_nb.core import has_amx, pick_compute, versions
from mits_nb.gan import frozen, lsgan_d_loss, lsgan_g_loss

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "L40": 181e12, "A10": 125e12, "RTX 4090": 165e12}  # dense, from data sheets


@contextlib.contextmanager
def naive_way_up():
    "Inside the block the generator repeats voxels and convolves, as the release does."
    quick = nets.upsample_conv
    nets.upsample_conv = lambda x, conv: nets.SameConv3d.forward(conv, F.interpolate(x, scale_factor=2))
    try: yield
    finally: nets.upsample_conv = quick


class Step:
    "One training step, as `InpaintTask.update` of chapter 9, in one precision."

    def __init__(self, width, d_width, batch, device, precision):
        torch.manual_seed(0)
        self.compute = pick_compute(device, precision)
        home = self.compute.device
        self.g = nets.Generator(width, dropout=0.1).to(home, memory_format=torch.channels_last_3d)
        self.d = nets.Discriminator(d_width).to(home, memory_format=torch.channels_last_3d)
        self.adams = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in (self.g, self.d)]
        self.target = torch.rand(batch, 1, 32, 32, 32, device=home) - 0.5
        self.hole = torch.zeros(32, 32, 32, dtype=torch.bool, device=home)
        self.hole[6:26, 6:26, 6:26] = True
        self.cond = self.target.masked_fill(self.hole, 0.0)

    def __call__(self):
        def run(net, *x):
            with self.compute.autocast(): return net(*x).float()
        made = run(self.g, self.cond)
        fake = torch.where(self.hole, made, self.target)
        loss = lsgan_d_loss(run(self.d, self.target, self.cond), run(self.d, fake.detach(), self.cond), real=0.0, fake=1.0)
        self.adams[1].zero_grad(); loss.backward(); self.adams[1].step()
        with frozen(self.d) as judge: adversarial = lsgan_g_loss(run(judge, fake, self.cond), real=0.0)
        self.adams[0].zero_grad(); (adversarial + 100 * (made - self.target).abs().mean()).backward(); self.adams[0].step()


class Forward:
    "The generator alone, one cube, evaluation mode."

    def __init__(self, width, device, precision):
        torch.manual_seed(0)
        self.compute = pick_compute(device, precision)
        self.g = nets.Generator(width).to(self.compute.device).eval()
        self.x = torch.rand(1, 1, 32, 32, 32, device=self.compute.device) - 0.5

    def __call__(self):
        with torch.no_grad(), self.compute.autocast(): self.g(self.x)


def seconds(call, device: str) -> float:
    if device != "cpu": torch.cuda.synchronize()
    # one thread on a CPU: processor time, in which a neighbour's turns do not count; else the clock on the wall
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
            with naive_way_up() if name.endswith("naive") else contextlib.nullcontext(): took = seconds(call, device)
            if turn: times[name].append(took)
    return times


def ratio(times: dict, slow: str, quick: str) -> tuple:
    "Median and quartiles of the ratio, turn by turn."
    found = sorted(a / b for a, b in zip(times[slow], times[quick]))
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 2 else (found[0], statistics.median(found), found[-1])
    return middle, low, high


def say(title: str, times: dict, pairs: list) -> dict:
    print(title)
    for name, took in times.items(): print(f"    {name:12s} median {1000 * statistics.median(took):8.0f} ms   {' '.join(f'{1000 * t:.0f}' for t in took)}")
    ratios = {f"{a} / {b}": ratio(times, a, b) for a, b in pairs}
    for name, (middle, low, high) in ratios.items(): print(f"    {name:24s} {middle:5.2f}   (quartiles {low:.2f} to {high:.2f})")
    return dict(seconds=times, ratios=ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", default=["16:8:16"], metavar="G:D:BATCH", help="widths of both networks and the batch; the paper's size is 100:100:50")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-full", action="store_true", help="skip the full-size forward pass (2 GB of memory)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    figures = dict(versions=versions(), amx=has_amx(), load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None, runs={})
    print(f"AMX: {has_amx()}; device: {args.device if args.device == 'cpu' else torch.cuda.get_device_name()}; load at the start: {figures['load']}")
    for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for sizes in args.widths:
            width, d_width, batch = map(int, sizes.split(":"))
            steps = {precision: Step(width, d_width, batch, args.device, precision) for precision in ("fp32", "bf16")}
            times = take_turns({**steps, "bf16 naive": steps["bf16"], "fp32 naive": steps["fp32"]}, args.repeats, args.device)
            title = f"training step, widths {width} and {d_width}, {batch} cubes, {threads} threads: float32 / bfloat16 (goal on AMX >= 1.8)"
            run = figures["runs"][f"step {sizes} threads {threads}"] = say(title, times, [("fp32", "bf16"), ("fp32 naive", "bf16 naive"), ("bf16 naive", "bf16"), ("fp32 naive", "fp32"), ("fp32 naive", "bf16")])
            if args.device != "cpu":
                from torch.utils.flop_counter import FlopCounterMode
                with FlopCounterMode(display=False) as counter, naive_way_up(): steps["bf16"]()
                took, name = statistics.median(times["bf16"]), torch.cuda.get_device_name()
                peak = next((p for card, p in PEAK_BF16.items() if card in name), None)
                run |= dict(cubes_per_second=batch / took, flops=counter.get_total_flops(), share_of_peak=peak and counter.get_total_flops() / took / peak)
                print(f"    bf16: {batch / took:.0f} cubes per second, {counter.get_total_flops() / took / 1e12:.1f} TFLOP/s"
                      + (f", {run['share_of_peak']:.1%} of the peak of {name}" if peak else f" (peak of {name} not in the table)"))
            del steps
        if not args.no_full:
            calls = {precision: Forward(100, args.device, precision) for precision in ("fp32", "bf16")}
            times = take_turns({**calls, "fp32 naive": calls["fp32"], "bf16 naive": calls["bf16"]}, max(3, args.repeats // 2), args.device)
            figures["runs"][f"full-size forward threads {threads}"] = say(f"full-size generator (width 100), forward pass of one cube, {threads} threads", times, [("fp32", "bf16"), ("fp32 naive", "fp32"), ("bf16 naive", "bf16")])
            del calls
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
