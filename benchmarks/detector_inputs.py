"""Does the preparation of the input matter? The same network, patches and steps with each scaling of chapter 15.

    MITS_DATA=folder python benchmarks/detector_inputs.py [--steps 300] [--rounds 12] [--seeds 0]

Trains the first stage at the tiny width on forged and unforged patches of the training scans, and prints the area under the ROC curve on windows of scans that no training has seen, real and phantom apart, asked in both ways.
"""
import argparse

import numpy as np
import pandas as pd
import torch

from mits_nb.attack.ctgan import CTGAN, HELD_OUT
from mits_nb.core import from_preset
from mits_nb.data import development_scans
from mits_nb.detect.cnn import FORGED, PAIRED, SCALINGS, Detector, DetectorConfig, train_detector
from mits_nb.detect.training import Source, TrainingConfig, build_patches, phantom_source, real_sources
from mits_nb.metrics import roc_auc
from mits_nb.scan import read_scan


def judge(net, patches):
    "AUC of forged windows against the same windows before, window by window and dense."
    pair = (patches.kind == FORGED) | (patches.kind == PAIRED)
    hu = torch.from_numpy(patches.hu[pair][:, None, 2:66, 2:66].astype(np.float32))
    with torch.inference_mode(): dense = torch.cat([net(part, dense=True).float().softmax(1)[:, 1, 4, 4] for part in hu.split(64)])
    return [roc_auc(p.numpy(), patches.kind[pair] == FORGED) for p in (net.probability(hu[:, :, 16:48, 16:48]), dense)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=12, help="forged copies of each training scan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    a = parser.parse_args()
    attackers, config = [CTGAN.from_pretrained(n) for n in ("ctgan-tiny", "ctgan-zeros-tiny")], from_preset(TrainingConfig, "tiny", protected=0.)
    plain = from_preset(TrainingConfig, "tiny", protected=0., perturbed=0., rescanned=0., disguised=0., passed_on=0.)
    learn = build_patches([(*s, a.rounds) for s in real_sources()] + [(f"phantom-{s}", lambda s=s: phantom_source(s), 3) for s in range(1200, 1204)], attackers, config)
    look = {"real": [(n, lambda p=p: Source.of("held out", read_scan(p)), 6) for n, p in development_scans().items() if n in HELD_OUT], "phantom": [(f"phantom-{s}", lambda s=s: phantom_source(s), 3) for s in (12, 13)]}
    look = {name: build_patches(sources, attackers, plain, 9) for name, sources in look.items() if sources}
    rows = []
    for seed in a.seeds:
        for scaling in SCALINGS:
            first = from_preset(DetectorConfig, "tiny", steps=a.steps, decay_every=max(1, a.steps // 20))
            torch.manual_seed(seed)
            net, history = train_detector(learn, first, seed=seed, net=Detector(width=first.width, dropout=first.dropout, scaling=scaling))
            for name, patches in look.items():
                windows, dense = judge(net, patches)
                rows.append({"scaling": scaling, "seed": seed, "scans": name, "windows": windows, "dense": dense, "last loss": history.rows[-1]["windows"]})
                print(rows[-1], flush=True)
    print(pd.DataFrame(rows).groupby(["scans", "scaling"], sort=False)[["windows", "dense"]].mean().round(3).to_string())


if __name__ == "__main__": main()
