"""How fast is the detector? Ratios, measured alternately in one run.

    python benchmarks/detect_speed.py [--widths 1 0.25] [--repeats 5] [--training]

`windows` is the published procedure: every window of the slice cut out and asked, 32 at a time as released (a sample of them is timed and scaled up), normalisation not folded. `windows, 512 at a time` is our own reference. `dense` is one pass over the slice, all in the same precision.
Then: inspection of a 64-slice scan by the shipped cascade with its peak of memory, the second stage per slice, and the training step in bf16 against float32 (--training).
Goals: dense >= 80 x windows; <= 0.8 s a slice at width 1 and <= 0.15 s at 0.25; inspection of 64 slices <= 20 s and <= 2.5 GB; second stage <= 10 ms a slice.
"""
import argparse, statistics, time

import numpy as np
import torch

from mits_nb.core import kept_memory, peak_rss_mb, pick_compute
from mits_nb.detect.cascade import Cascade
from mits_nb.detect.cnn import FORGED, PAIRED, Detector, DetectorConfig, DetectorTask, PatchSet, draw_batch
from mits_nb.detect.heatmap import dense_heatmaps
from mits_nb.phantom import make_phantom
from mits_nb.scan import Scan


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(width, repeats):
    net, compute = Detector(width=width).eval(), pick_compute()
    hu = np.random.default_rng(0).normal(-700, 200, (3, 512, 512)).astype(np.int16)
    windows = torch.randn(512, 1, 32, 32) * 200 - 700
    def ask(batch, n):
        with torch.inference_mode(), compute.autocast(), kept_memory():
            for part in windows[:n].split(batch): net(part.to(compute.device)).cpu()
    runs = {"windows": (lambda: ask(32, 256), 12477 / 256), "windows, 512 at a time": (lambda: ask(512, 512), 12477 / 512), "dense": (lambda: dense_heatmaps(hu, net), 1 / len(hu))}
    times = {name: [] for name in runs}
    net.to(compute.device)
    for i in range(repeats + 1): # the first round warms up
        for name, (run, factor) in runs.items():
            t = seconds(run) * factor
            if i: times[name].append(t)
    least = {name: min(t) for name, t in times.items()}
    print(f"width {width:g}, {compute.why}:")
    for name, t in times.items(): print(f"  {name:24s} median {statistics.median(t):8.3f} s a slice, least {min(t):8.3f}; {least[name] / least['dense']:6.1f} x dense")


def inspection():
    cascade, scan = Cascade.from_pretrained(), make_phantom(seed=18, shape=(16, 512, 512), spacing=(2.5, .7, .7))[0]
    scan = Scan(np.concatenate([scan.hu] * 4), scan.spacing)
    cascade.inspect(scan.hu[:2], False)
    print(f"inspection of {scan.shape[0]} slices: {seconds(lambda: cascade.inspect(scan, False)):.1f} s, peak of memory {peak_rss_mb():.0f} MB")
    maps = cascade.heatmap(scan.hu[:16]).repeat(3, 0)
    t = [seconds(lambda: cascade.slice_probability(maps)) / len(maps) for _ in range(5)]
    print(f"second stage: {1e3 * min(t):.1f} ms a slice")


def training(repeats):
    config, numbers = DetectorConfig(**DetectorConfig.presets["tiny"]), np.random.default_rng(0)
    patches = PatchSet(numbers.normal(-700, 200, (256, 68, 68)).astype(np.int16), np.array([FORGED, PAIRED] * 128, np.uint8))
    batch, times = draw_batch(patches, config, torch.Generator().manual_seed(0)), {}
    tasks = {p: (DetectorTask(Detector(width=config.width).to(memory_format=torch.channels_last), config), pick_compute("cpu", p)) for p in ("fp32", "bf16")}
    with kept_memory():
        for i in range(repeats + 1):
            for name, (task, compute) in tasks.items():
                def step():
                    with compute.autocast(): task.update(batch, lambda loss: loss.backward())
                t = seconds(step)
                if i: times.setdefault(name, []).append(t)
    print(f"training step, {config.batch} windows and {config.dense_batch} crops: float32 {min(times['fp32']):.2f} s, bf16 {min(times['bf16']):.2f} s, {min(times['fp32']) / min(times['bf16']):.2f} times faster")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="*", type=float, default=[1., .25])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--training", action="store_true")
    a = parser.parse_args()
    for width in a.widths: compare(width, a.repeats)
    inspection()
    if a.training: training(a.repeats)
