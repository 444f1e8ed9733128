"""How well do protections hold, on scans that nobody trained on?

    MITS_DATA=folder python benchmarks/protection.py [--weights mitsgan-tiny ...] [--rivals nothing,noise] [--places 50] [--quick] [--out protection.json]
    python benchmarks/protection.py --sweep-alphas [--steps 120] [--folder FOLDER] [--store sweep.npz]

First form, five tables with bootstrap intervals by patient: cost and effect of every protector (slice PSNR / SSIM, forged square before and after, dB lost, share of injected lesions that are gone); what survives each cleaning,
the blur of 0.7 pixels first; attackers that were not trained against (--attackers, and a smaller mask); nodule volumes and HU of unforged scans; noise power real / protected. The published figures stand beside the first one.
Second form: one training per alpha (finished ones in FOLDER are used again), then the sweep that the widget of chapter 13 shows.
Goals for the real scans: slice PSNR >= 40 dB and SSIM >= 0.98, forged square <= 11.3 dB and SSIM <= 0.74; >= 60 % left after the blur; >= 70 % of the loss against other attackers; lesion gone at >= 80 % of the places.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from mits_nb.attack.ctgan import CTGAN, HELD_OUT, clear_places, held_out_scans
from mits_nb.core import DataError, rng, versions, write_json
from mits_nb.data import lung_mask, lung_places
from mits_nb.phantom import make_phantom
from mits_nb.protect.mitsgan import MitsGAN
from mits_nb.protect.sweep import (CLEANING_TESTS, PAPER_ALPHAS, Scaled, WIDER_ALPHAS, cleaning_table, front_figure, measure_protection, noise_spectra, protected_twin, protection_table,
                                   protector_name, side_effects, sweep, train_alphas)


class Nothing:
    name = "nothing"

    def protect(self, scan, seed=0): return scan


class GaussianNoise:
    "White noise in the lung and a fifth of it elsewhere: the floor."

    def __init__(self, rms_hu=20.0): self.rms_hu, self.name = rms_hu, f"noise {rms_hu:g} HU"

    def protect(self, scan, seed=0):
        weight = np.where((scan.hu > -1000) & (scan.hu < -500), 1.0, 0.2)
        change = self.rms_hu * weight * rng(seed, "white").standard_normal(scan.shape)
        return scan.with_hu(np.where(scan.hu < -1024, scan.hu, np.maximum(scan.hu + change.round(), np.minimum(scan.hu, -1024))))


def rivals(names, attacker, places):
    "Rivals by name: nothing, noise<HU>, tafim[:weights], and pgd<HU>, which is told the places."
    made = []
    for name in filter(None, names.split(",")):
        if name == "nothing": made.append(Nothing())
        elif name.startswith("noise"): made.append(GaussianNoise(float(name[5:] or 20)))
        elif name.startswith("tafim"):
            from mits_nb.protect.rivals import Tafim
            made.append(Tafim.from_pretrained(*filter(None, [name.partition(":")[2]])))
        elif name.startswith("pgd"):
            from mits_nb.protect.rivals import Pgd
            made.append(Pgd(attacker, places, bound_hu=float(name[3:] or 20)))
            made[-1].name = f"{made[-1].name} {made[-1].bound_hu:g} HU"
        else: raise SystemExit(f"unknown rival {name!r}: use nothing, noise<HU>, tafim[:weights], pgd<HU>")
    return made


def say(title, table):
    print(f"\n{title}\n" + table.round(2).to_string(), flush=True)


def attackers(main, names):
    "The attacker trained against, the same with another mask, and others by name of their weights."
    other = 16 if main.settings.mask == 20 else 20
    return {"trained against": main, f"mask of {other}": CTGAN(main.injector, main.remover, main.equalizer, replace(main.settings, mask=other)), **{n: CTGAN.from_pretrained(n) for n in names}}


def measure(a):
    main, trained = CTGAN.from_pretrained(a.attacker), [MitsGAN.from_pretrained(w) for w in a.weights]
    trained += [Scaled(p, f) for p in trained for f in a.factors]
    tests = ("nothing", "blur 0.7", "median") if a.quick else tuple(CLEANING_TESTS)
    scans, rows, others, effects, spectra = held_out_scans(tuple(a.patients), phantoms=a.phantoms), [], [], [], []
    for source in scans:
        lung = lung_mask(source.scan)
        places = clear_places(source, a.places, 0, lung, margin_mm=10.0)
        print(f"{source.name}: {len(places)} places", flush=True)
        if not len(places): continue
        protectors = [*rivals(a.rivals, main, places), *trained]
        rows += measure_protection(protectors, main, source.scan, places, tests, patient=source.name)
        for name, attacker in attackers(main, a.attackers).items():
            others += measure_protection([p for p in protectors if p.name != "nothing"], attacker, source.scan, places[: max(len(places) // 2, 1)], patient=source.name, extra={"attacker": name})
        for p in protectors:
            twin = protected_twin(p, source.scan)
            found = side_effects(source.scan, twin, [n for n in source.nodules if n[1] >= 5], lung)
            volumes = [abs(n["change_percent"]) for n in found["nodules"]]
            lung_hu, soft = found.get("lung", {}), found.get("soft tissue", {})
            effects.append({"scan": source.name, "protector": protector_name(p), "nodules": len(volumes), "volume change, mean %": np.mean(volumes) if volumes else np.nan, "largest %": max(volumes, default=np.nan),
                            **{f"{tissue} {key}, HU": stats[key][1] - stats[key][0] for tissue, stats in (("lung", lung_hu), ("soft", soft)) for key in ("mean", "sd") if stats}})
            try: frequency, (real, protected) = noise_spectra([source.scan, twin], places[:6])
            except DataError as why:
                print(f"{source.name}: {why}")
                continue
            for low, high in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.8)):
                band = (frequency >= low) & (frequency < high)
                spectra.append({"scan": source.name, "protector": protector_name(p), "band [1/mm]": f"{low:g}-{high:g}", "protected / real": protected[band].sum() / max(real[band].sum(), 1e-9)})
    report(a, rows, others, effects, spectra)


def report(a, rows, others, effects, spectra):
    "Print the tables, and store rows and figures."
    for title, part in (("real, held out", [r for r in rows if "phantom" not in r["patient"]]), ("phantoms", [r for r in rows if "phantom" in r["patient"]])):
        if not part: continue
        say(f"Cost and effect, {title} (published: 27.9 dB whole image, forged square 11.3 dB / SSIM 0.74)", protection_table(part))
        say(f"What survives a cleaning, {title}", cleaning_table([r for r in part if r["protector"] != "nothing"]))
    say("Attackers not trained against", protection_table(others, by=("protector", "attacker", "action"))[["forged [dB]", "protected, forged [dB]", "lost [dB]", "low", "high"]])
    for (name,), part in pd.DataFrame(others).groupby(["protector"]):
        lost = part.groupby("attacker")["lost_db"].mean()
        print(f"{name}: share of the white-box loss " + ", ".join(f"{k} {v / lost['trained against']:.0%}" for k, v in lost.items() if k != "trained against"))
    say("Unforged scans: volumes of nodules, HU", pd.DataFrame(effects).set_index(["protector", "scan"]))
    say("Noise power of quiet lung", pd.DataFrame(spectra).pivot_table(index="protector", columns="band [1/mm]", values="protected / real"))
    if a.out:
        clean = lambda v: None if isinstance(v, float) and not np.isfinite(v) else v.item() if isinstance(v, np.generic) else v
        write_json(a.out, {"rows": rows, "others": others, "effects": [{k: clean(v) for k, v in e.items()} for e in effects], "spectra": [{k: clean(v) for k, v in s.items()} for s in spectra], "versions": versions()})
        families = {n: n.split(" x")[0] for n in {r["protector"] for r in rows}}
        for cleaning in ("nothing", "blur 0.7"):
            for price in ("slice_psnr_db", "place_psnr_db"): front_figure(rows, cleaning, families, price).savefig(a.out.with_name(f"{a.out.stem}-{price[:5]}-{cleaning.replace(' ', '-')}.png"))


def alphas(a):
    "The real alpha sweep: a training for each value."
    attacker, values = CTGAN.from_pretrained(a.attacker), PAPER_ALPHAS if a.quick else WIDER_ALPHAS
    trained = train_alphas(values, attacker, a.folder, **({} if a.steps is None else {"steps": a.steps}), fidelity=a.fidelity)
    scan, _ = make_phantom(seed=5, shape=(24, 256, 256), spacing=(2.5, 1.4, 1.4))
    result = sweep(trained, attacker, scan, lung_places(scan, 3, seed=9), ("nothing", "blur 0.7", "median", "jpeg"), patient="phantom 5")
    say("alpha sweep on a phantom", protection_table([{**r, "protector": f"alpha {r['value']:g}"} for r in result.rows]))
    print(f"{result.save(a.store)}: {Path(a.store).stat().st_size / 1e3:.0f} kB")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--weights", nargs="*", default=["mitsgan-tiny"], help="protectors: shipped names or folders")
    p.add_argument("--rivals", default="nothing,noise20", help="by commas: nothing, noise<HU>, tafim[:weights], pgd<HU>")
    p.add_argument("--factors", nargs="*", type=float, default=[2.0], help="scale the change of each network, for the front")
    p.add_argument("--attacker", default="ctgan-tiny")
    p.add_argument("--attackers", nargs="*", default=[], help="further attackers, for the transfer table")
    p.add_argument("--patients", nargs="*", default=list(HELD_OUT))
    p.add_argument("--phantoms", type=int, default=2)
    p.add_argument("--places", type=int, default=50)
    p.add_argument("--quick", action="store_true", help="three cleanings and at most 4 places; with --sweep-alphas: the paper's five values")
    p.add_argument("--out", type=Path, help="JSON of all rows; fronts beside it")
    p.add_argument("--sweep-alphas", action="store_true")
    p.add_argument("--steps", type=int, help="of each training of the sweep")
    p.add_argument("--fidelity", type=float, default=1.0, help="weight of the mean squared change in the sweep's trainings: without a price, alpha has nothing to trade")
    p.add_argument("--folder", type=Path, default=Path("alpha-sweep"), help="where the sweep's weights lie")
    p.add_argument("--store", type=Path, default=Path("mitsgan-sweep/sweep.npz"))
    a = p.parse_args()
    if a.quick: a.places = min(a.places, 4)
    (alphas if a.sweep_alphas else measure)(a)


if __name__ == "__main__":
    main()
