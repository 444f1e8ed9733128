"""How good are the forgeries of CT-GAN on patients that it was not trained on?

    MITS_DATA=folder python benchmarks/attack_quality.py [--weights ctgan-tiny] [--places 50] [--leave-one-out FOLDER] [--out quality.json]

Without `--leave-one-out`: the given weights on the scans that their training left out (their `config` says which), and on test phantoms.
With it: one training per real scan that leaves this scan out (`mits_train attack --preset tiny --hold-out NAME`; finished ones in FOLDER are used again, interrupted ones go on), each
measured on the scan that it never saw. Shipped weights serve for the patient that they left out.

Measured: injections that give a new lesion above -400 HU of 8-30 mm within 8 mm; share of tissue above -400 HU that a removal takes away; step across the paste's border and
noise inside it, relative to the untouched scan; error of the remover's filling beside three fillings without learning; AUC of a plain classifier on 32 x 32 patches.
"""
import argparse
from pathlib import Path

import numpy as np

from mits_nb.attack.ctgan import CTGAN, CtganConfig, held_out_scans, measure_ctgan, measure_disguise, train_ctgan, training_sources
from mits_nb.core import from_preset, versions, write_json
from mits_nb.data import development_scans


def judged(ctgan, held_out):
    "AUC of a plain classifier that learnt from the other patients."
    config = from_preset(CtganConfig, "tiny", held_out=held_out, phantoms=2)
    return measure_disguise(ctgan, [load() for _, _, load in training_sources(config)], held_out_scans(held_out, phantoms=0) or held_out_scans(held_out))


def table(rows):
    "The figures of all scans, one line each, and their mean over patients."
    columns = {
        "injected %": lambda r: 100 * r["inject"]["rate"],
        "removed, ball %": lambda r: 100 * r["remove_rendered"]["removed"],
        "removed, centre %": lambda r: 100 * r["remove_rendered"]["removed_centre"],
        "own nodules, centre %": lambda r: 100 * r["remove"]["removed_centre"] if r["remove"]["nodules"] else np.nan,
        **{f"{a} {k}": lambda r, a=a, k=k: r["traces"][a][k] for a in ("inject", "remove") for k in ("seam", "noise")},
        **{f"MAE {k} HU": lambda r, k=k: r["inpainting"][k] for k in ("remover", "rim_mean", "harmonic", "biharmonic")}}
    values = np.array([[f(r) for f in columns.values()] for r in rows], float)
    names = [r["scan"] for r in rows]
    print(f"{'':24}" + "".join(f"{n[:22]:>24}" for n in names) + f"{'mean':>10}{'lowest':>10}{'highest':>10}")
    for name, line in zip(columns, values.T):
        print(f"{name:24}" + "".join(f"{v:24.2f}" for v in line) + f"{np.nanmean(line):10.2f}{np.nanmin(line):10.2f}{np.nanmax(line):10.2f}")


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--weights", default="ctgan-tiny")
    a.add_argument("--places", type=int, default=50)
    a.add_argument("--leave-one-out", type=Path, metavar="FOLDER")
    a.add_argument("--out", type=Path)
    a = a.parse_args()
    shipped = CTGAN.from_pretrained(a.weights)
    spared = tuple(shipped.record["config"].get("held_out", ()))
    folds = {spared: shipped}
    if a.leave_one_out:
        for name in development_scans():
            folder = a.leave_one_out / name
            if (name,) not in folds:
                folds[(name,)] = CTGAN.from_pretrained(folder) if (folder / "card.md").is_file() else train_ctgan("tiny", folder, measure=False, held_out=(name,))
    rows, auc = [], {}
    for held_out, ctgan in folds.items():
        rows += measure_ctgan(ctgan, a.places, 2 if held_out == spared else 0, held_out)
        auc[", ".join(held_out)] = judged(ctgan, held_out)
    table(rows)
    for name, found in auc.items(): print(f"AUC of a plain classifier, {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    if a.out: write_json(a.out, {"rows": rows, "auc": auc, "versions": versions()})


if __name__ == "__main__":
    main()
