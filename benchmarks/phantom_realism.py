"""How real does the phantom look to a small network, and what does it cost?

    MITS_DATA=folder python benchmarks/phantom_realism.py [--out realism.json] [--skip-cost]

1. Numbers: which of the measured values lie outside the range of the real scans (`phantom.outside_range`).
2. A small CNN learns to tell patches (48 x 48 pixels of 0.7 mm, HU clipped to -1000..400) of real scans from patches of phantoms. Split by patient: each pair of real scans is
   held out once, and the phantoms are split by seed. Reported: balanced accuracy on the held-out patients (0.5 = cannot tell, 1.0 = always tells; lower is better, no threshold).
   Twice: on the patches as they are, and after a blur of 1.4 mm, which hides noise and leaves anatomy.
3. Cost: seconds and peak memory of 64 x 512 x 512 voxels, in a process of its own.
"""
import argparse
import itertools
import json
import subprocess
import sys

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, zoom
from torch import nn

from mits_nb.data import data_folder
from mits_nb.phantom import make_phantom, outside_range, realism
from mits_nb.scan import read_scan

REAL = ("dicom/LIDC-IDRI-0001", "LIDC-IDRI-0003.mha", "CPTAC-LSCC_C3N-00247.mha", "Lung_Dx-A0001.mha")
COST = "import resource, time; t = time.perf_counter(); from mits_nb.phantom import make_phantom; make_phantom(0, shape=(64, 512, 512)); print(time.perf_counter() - t, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def patches(scan, n, seed, side=48, pixel=0.7):
    "(n, 1, side, side) patches from inside the body, resampled to one pixel size."
    r, out = np.random.default_rng(seed), []
    for k in r.choice(len(scan.hu), min(8, len(scan.hu)), replace=False):
        hu = zoom(scan.hu[k].astype(np.float32), [s / pixel for s in scan.spacing[1:]], order=1)
        rows, cols = np.nonzero(gaussian_filter(hu, 12)[side // 2:-side // 2, side // 2:-side // 2] > -930)
        for i in r.choice(len(rows), n // 8): out.append(hu[rows[i]:rows[i] + side, cols[i]:cols[i] + side])
    return np.clip(np.stack(out)[:, None], -1000, 400) / 700 + 3 / 7


def accuracy(train, test, steps, seed=0):
    "Balanced accuracy of a small CNN on held-out and on seen patients; train and test are pairs (real, phantom) of patches."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(48, 1))
    task, r = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2), np.random.default_rng(seed)
    for _ in range(steps):
        x = np.concatenate([t[r.integers(len(t), size=32)] for t in train])
        if r.random() < 0.5: x = x[..., ::-1].copy()
        y = torch.arange(64) < 32
        loss = nn.functional.binary_cross_entropy_with_logits(net(torch.from_numpy(x).float())[:, 0], y.float())
        task.zero_grad(); loss.backward(); task.step()
    net.eval()
    def score(pair):
        with torch.no_grad(): real, made = (net(torch.from_numpy(t).float())[:, 0].numpy() > 0 for t in pair)
        return float(0.5 * (real.mean() + 1 - made.mean()))
    return score(test), score(train)


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--out"), a.add_argument("--steps", type=int, default=200), a.add_argument("--skip-cost", action="store_true")
    args, folder = a.parse_args(), data_folder()
    if folder is None: sys.exit("no real scans: set MITS_DATA to the folder that holds them")
    real = [read_scan(folder / f) for f in REAL]
    made = [make_phantom(s, shape=(8, 512, 512), spacing=(r.spacing[0], 0.7, 0.7), n_nodules=2, kernel="sharp" if i == 2 else "standard")[0]
            for s, (i, r) in zip((1, 2, 5, 8, 10, 11, 12, 14), itertools.cycle(enumerate(real)))]
    out = {"outside_range": outside_range([realism(s.hu, s.spacing) for s in made[:4]], [realism(s.hu, s.spacing) for s in real])}
    cut = [[patches(s, 240, i) for i, s in enumerate(group)] for group in (real, made)]
    for name, blur in (("as_is", 0), ("blurred", 2.0)):
        r, m = ([gaussian_filter(p, (0, 0, blur, blur)) if blur else p for p in group] for group in cut)
        scores = []
        for held in itertools.combinations(range(4), 2):
            keep = [i for i in range(4) if i not in held]
            both = lambda ids: (np.concatenate([r[i] for i in ids]), np.concatenate([m[i] for i in ids] + [m[i + 4] for i in ids]))
            scores.append(accuracy(both(keep), both(held), args.steps))
        out[f"patch_accuracy_{name}"] = {"held_out": float(np.mean([s for s, _ in scores])), "seen": float(np.mean([s for _, s in scores])), "folds": [s for s, _ in scores]}
    if not args.skip_cost:
        seconds, cpu, kb = map(float, subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True).stdout.split())
        out["cost_64x512x512"] = {"seconds": seconds, "cpu_seconds": cpu, "peak_gb": kb / 1e6}
    text = json.dumps(out, indent=1)
    print(text)
    if args.out: open(args.out, "w").write(text + "\n")


if __name__ == "__main__": main()
