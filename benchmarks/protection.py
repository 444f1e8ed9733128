"""How well do protections hold, on scans that nobody trained on?

    MITS_DATA=folder python benchmarks/protection.py [--weights mitsgan-tiny ...] [--places 50] [--parts cost others] [--quick] [--scans 0 1] [--out protection.json]
    MITS_DATA=folder python benchmarks/protection.py --leave-one-out FOLDER [--weights mitsgan-robust-tiny] [--out left-out.json]
    python benchmarks/protection.py --report FILE... --store protection.json
    python benchmarks/protection.py --sweep-alphas [--steps 200] [--seeds 0 1 2] [--folder FOLDER] [--store sweep.npz]

First form: measures, scan by scan, and writes all rows; `--scans` picks some of the held-out scans, so that several processes can share the work, `--parts` some of the measurements. Second form: one training of `mitsgan-tiny`, or of `mitsgan-robust-tiny`, per real scan that leaves this scan out (finished ones in FOLDER are used
again, interrupted ones go on; the shipped weights serve for the patient that they left out), each measured on that scan. The attackers stay those that ship, who know every patient but one. Third form: joins such files, prints the tables with bootstrap intervals by patient, and stores them as chapter 13 shows them; what an
earlier file held and these do not is kept:
cost and effect of every protector (slice PSNR / SSIM, forged square before and after, dB lost, share of injected lesions that are gone); what survives each cleaning, the blur of 0.7 pixels first; attackers that were not trained against (a smaller mask, and --unseen); nodule volumes and HU of
unforged scans; noise power protected / real; patient by patient. Fourth form: one training per alpha and seed (finished ones in FOLDER are used again), then the sweep that the widget of chapter 13 shows.
Goals for the real scans: slice PSNR >= 40 dB and SSIM >= 0.98, forged square <= 11.3 dB and SSIM <= 0.74; >= 60 % left after the blur; >= 70 % of the loss against other attackers; lesion gone at >= 80 % of the places.
"""
import argparse, json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from mits_nb.attack.ctgan import CTGAN, HELD_OUT, clear_places, held_out_scans
from mits_nb.core import DataError, read_json, versions, write_json
from mits_nb.data import development_scans, lung_mask, lung_places
from mits_nb.phantom import make_phantom
from mits_nb.protect.losses import clean_jpeg_ls
from mits_nb.protect.mitsgan import MitsGAN, ROBUST, train_mitsgan, with_masks
from mits_nb.protect.rivals import GaussianNoise, Nothing, Pgd, Tafim
from mits_nb.protect.sweep import (CLEANING_TESTS, PAPER_ALPHAS, Scaled, WIDER_ALPHAS, cleaning_table, measure_protection, noise_spectra, protected_twin, protection_table, protector_name,
                                   side_effects, sweep, train_alphas)


PARTS = ("cost", "cleanings", "others", "effects")
RARER = CLEANING_TESTS | {"jpeg-ls": clean_jpeg_ls} # JPEG-LS is tested, not trained against: its package is not among those that the library needs
KINDS = ("rows", "cleanings", "others", "effects", "spectra", "left out")
RECIPES = {"mitsgan-tiny": {}, "mitsgan-robust-tiny": ROBUST}


def say(title, table):
    print(f"\n{title}\n" + table.round(2).to_string(), flush=True)


def climbers(attacker, places, bounds, steps):
    "The ceiling, which is told the places."
    made = [Pgd(attacker, places, bound_hu=b, steps=steps) for b in bounds]
    for p in made: p.name = f"pgd {p.bound_hu:g} HU"
    return made


def measure_scan(a, source, mains, unseen):
    "All rows of one scan."
    lung = lung_mask(source.scan)
    places = clear_places(source, a.places, 0, lung, margin_mm=10.0)
    if not len(places): raise DataError(f"{source.name} has no clear place in a lung")
    print(f"{source.name}: {len(places)} places", flush=True)
    ours = [MitsGAN.from_pretrained(w) for w in a.weights]
    fixed = [Nothing(), GaussianNoise(a.noise), *([Tafim.from_pretrained(a.tafim)] if a.tafim else []), *ours]
    scaled = [Scaled(p, f) for p in fixed[1:] for f in a.factors]
    few, rarer = places[: a.few], {name: RARER[name] for name in ("nothing", *a.cleanings)}
    found = {key: [] for key in KINDS}
    for name, attacker in mains.items():
        extra = dict(patient=source.name, extra={"attacker": name})
        if "cost" in a.parts:
            found["rows"] += measure_protection(fixed, attacker, source.scan, places, ("nothing", "blur 0.7"), **extra)
            if scaled: found["rows"] += measure_protection(scaled, attacker, source.scan, places[: 2 * a.few], **extra)
        if "cost" in a.parts and a.bounds: found["rows"] += measure_protection(climbers(attacker, few, a.bounds, a.climb), attacker, source.scan, few, ("nothing", "blur 0.7"), **extra)
        if "cleanings" in a.parts: found["cleanings"] += measure_protection(ours, attacker, source.scan, few, rarer, **extra)
    for name, attacker in unseen.items() if "others" in a.parts else (): found["others"] += measure_protection([GaussianNoise(a.noise), *ours], attacker, source.scan, places[: 2 * a.few], patient=source.name, extra={"attacker": name})
    for p in fixed[1:] if "effects" in a.parts else ():
        twin = protected_twin(p, source.scan)
        side = side_effects(source.scan, twin, [n for n in source.nodules if n[1] >= 5], lung)
        volumes = [abs(n["change_percent"]) for n in side["nodules"]]
        found["effects"].append({"scan": source.name, "protector": protector_name(p), "nodules": len(volumes), "volume change, mean %": float(np.mean(volumes)) if volumes else None, "largest %": max(volumes, default=None),
                                 **{f"{tissue} {key}, HU": pair for tissue in ("lung", "soft tissue") if tissue in side for key in ("mean", "sd") for pair in ["{:.2f} -> {:.2f}".format(*side[tissue][key])]}})
        try: frequency, (real, protected) = noise_spectra([source.scan, twin], places[:6])
        except DataError as why: print(f"{source.name}: {why}"); continue
        for low, high in ((0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.8)):
            band = (frequency >= low) & (frequency < high)
            if real[band].sum(): found["spectra"].append({"scan": source.name, "protector": protector_name(p), "band [1/mm]": f"{low:g}-{high:g}", "protected / real": float(protected[band].sum() / real[band].sum())})
    return found


def measure(a):
    "First form: the scans asked for, all rows to one file."
    mains = {n: CTGAN.from_pretrained(n) for n in a.attackers}
    unseen = {f"{n}, mask of {m}": with_masks([c], (m,))[0] for n, c in mains.items() for m in [16 if c.settings.mask == 20 else 20]}
    unseen |= {Path(n).name: CTGAN.from_pretrained(n) for n in a.unseen}
    scans = held_out_scans(tuple(a.patients), phantoms=a.phantoms)
    found = [measure_scan(a, scans[i], mains, unseen) for i in (range(len(scans)) if a.scans is None else a.scans)]
    joined = {key: [row for part in found for row in part[key]] for key in found[0]}
    if a.out: write_json(a.out, {**joined, "versions": versions()})
    report(joined)


def leave_one_out(a):
    "Second form: each real scan under protectors that were not trained on it."
    mains, found = {n: CTGAN.from_pretrained(n) for n in a.attackers}, []
    for weights, name in ((w, n) for w in a.weights for n in development_scans()):
        folder = a.leave_one_out / weights / name
        if (name,) == HELD_OUT: protector = MitsGAN.from_pretrained(weights)
        else: protector = MitsGAN.from_pretrained(folder) if (folder / "card.md").is_file() else train_mitsgan("tiny", folder, list(mains.values()), held_out=(name,), **RECIPES[weights])
        source, = held_out_scans((name,), phantoms=0)
        places = clear_places(source, a.places, 0, lung_mask(source.scan), margin_mm=10.0)
        protector.name = weights
        for attacker in mains: found += measure_protection([protector], mains[attacker], source.scan, places, ("nothing", "blur 0.7"), patient=source.name, extra={"attacker": attacker})
        say(name, protection_table([r for r in found if (r["patient"], r["protector"]) == (name, weights)], by=("protector", "attacker", "action"))[["slice PSNR [dB]", "forged [dB]", "protected, forged [dB]", "lost [dB]", "low", "high", "places"]])
        if a.out: write_json(a.out, {**{key: [] for key in KINDS}, "left out": found, "versions": versions()})


def report(found, store=None):
    "Print the tables of joined rows, and store them beside what is stored already."
    earlier = read_json(store) if store and Path(store).is_file() else {"tables": {}, "keys": {}}
    stored = {title: pd.DataFrame(**table).set_index(earlier["keys"][title]) for title, table in earlier["tables"].items()}
    def add(title, table):
        old = stored.get(title, table[:0])
        frames[title] = pd.concat([old.loc[[key not in set(table.index) for key in old.index]], table])
    frames, kinds = {}, {"real, held out": lambda r: "phantom" not in r["patient"], "phantoms": lambda r: "phantom" in r["patient"]}
    for title, wanted in kinds.items():
        part = [r for r in found["rows"] if wanted(r)]
        if part: add(f"cost and effect, {title}", protection_table(part, by=("attacker", "protector", "action")))
        blurred = [r for r in part if r["protector"] != "nothing" and any(q["cleaning"] == "blur 0.7" and q["protector"] == r["protector"] for q in part)]
        if blurred: add(f"after a blur of 0.7 pixels, {title}", cleaning_table(blurred, by=("attacker", "protector")).xs("blur 0.7", level="cleaning"))
        if rows := [r for r in found["cleanings"] if wanted(r)]: add(f"each cleaning, {title}", cleaning_table(rows, by=("attacker", "protector")))
        if rows := [r for r in found["others"] if wanted(r)]:
            table = protection_table(rows, by=("attacker", "protector", "action"))[["forged [dB]", "protected, forged [dB]", "lost [dB]", "low", "high", "places"]]
            cost = frames.get(f"cost and effect, {title}", stored.get(f"cost and effect, {title}"))
            if cost is not None:
                known = cost["lost [dB]"].groupby(["protector", "action"]).mean().reindex(table.index.droplevel("attacker")).to_numpy()
                table["share of the loss against the known attackers"] = table["lost [dB]"] / np.where(known > 0.05, known, np.nan) # no share of nothing, nor of a gain
            add(f"attackers not trained against, {title}", table)
    if found["left out"]:
        add("patient by patient", protection_table(found["left out"], by=("patient", "protector", "attacker", "action")))
        add("patient by patient, after a blur of 0.7 pixels", cleaning_table(found["left out"], by=("patient", "protector", "attacker")).xs("blur 0.7", level="cleaning"))
        add("all patients", protection_table(found["left out"], by=("protector", "attacker", "action")))
        add("all patients, after a blur of 0.7 pixels", cleaning_table(found["left out"], by=("protector", "attacker")).xs("blur 0.7", level="cleaning"))
    if found["effects"]: add("unforged scans", pd.DataFrame(found["effects"]).set_index(["protector", "scan"]))
    if found["spectra"]: add("noise power, protected / real", pd.DataFrame(found["spectra"]).pivot_table(index="protector", columns="band [1/mm]", values="protected / real"))
    for title, table in frames.items(): say(title, table)
    if store:
        frames = stored | frames
        write_json(store, {"tables": {title: json.loads(table.reset_index().round(3).to_json(orient="split", index=False)) for title, table in frames.items()}, "keys": {title: list(table.index.names) for title, table in frames.items()}, "versions": versions()})


def join(files):
    "Rows of several files."
    parts = [json.loads(Path(f).read_text(encoding="utf-8")) for f in files]
    return {key: [row for part in parts for row in part.get(key, [])] for key in KINDS}


def alphas(a):
    "The real alpha sweep: a training for each value and seed."
    attackers, values = [CTGAN.from_pretrained(n) for n in a.attackers], PAPER_ALPHAS if a.quick else WIDER_ALPHAS
    trained = [train_alphas(values, attackers, a.folder / f"seed-{seed}", **({} if a.steps is None else {"steps": a.steps}), fidelity=a.fidelity, seed=seed) for seed in a.seeds]
    scan, _ = make_phantom(seed=5, shape=(24, 320, 320), spacing=(2.5, 1.1, 1.1))
    result = sweep(trained[0], attackers[-1], scan, lung_places(scan, 3, seed=9), ("nothing", "blur 0.7", "median", "jpeg"), patient="phantom 5", repeats=trained[1:])
    say("alpha sweep on a phantom", protection_table([{**r, "protector": f"alpha {r['value']:g}"} for r in result.rows]))
    file = Path(result.save(a.store or "mitsgan-sweep/sweep.npz"))
    (file.parent / "card.md").write_text(f"# The alpha sweep of chapter 13\n\nNo weights: pictures and figures of {len(values)} protectors, one training of {a.steps or 'the preset'} steps for each seed ({', '.join(map(str, a.seeds))}; the pictures are of the first) and alpha ({', '.join(f'{v:g}' for v in values)}), fidelity weight {a.fidelity:g}, "
                                         f"against {' and '.join(a.attackers)}, judged on {result.info['patient']}. Made by `benchmarks/protection.py --sweep-alphas`.\n", encoding="utf-8")
    print(file)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--weights", nargs="*", default=["mitsgan-tiny", "mitsgan-robust-tiny", "mitsgan-released-tiny"], help="protectors: shipped names or folders")
    p.add_argument("--tafim", default="tafim-tiny", help="weights of TAFIM; an empty word leaves it out")
    p.add_argument("--noise", type=float, default=20.0, help="standard deviation of the Gaussian noise, HU")
    p.add_argument("--factors", nargs="*", type=float, default=[0.5, 2.0], help="scale the change of each protector, for the front")
    p.add_argument("--bounds", nargs="*", type=float, default=[10.0, 20.0, 40.0], help="of the per-image ascent, HU")
    p.add_argument("--climb", type=int, default=10, help="steps of the ascent")
    p.add_argument("--attackers", nargs="*", default=["ctgan-tiny", "ctgan-zeros-tiny"], help="those trained against")
    p.add_argument("--unseen", nargs="*", default=[], help="further attackers, for the transfer table")
    p.add_argument("--patients", nargs="*", default=list(HELD_OUT))
    p.add_argument("--phantoms", type=int, default=2)
    p.add_argument("--scans", nargs="*", type=int, help="which of the held-out scans, by number: phantoms first")
    p.add_argument("--places", type=int, default=50)
    p.add_argument("--few", type=int, default=12, help="places of the ascent and of the rarer cleanings; twice as many for scaled changes and unseen attackers")
    p.add_argument("--quick", action="store_true", help="at most 4 places, no cleaning but the blur; with --sweep-alphas: the paper's five values")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    p.add_argument("--cleanings", nargs="+", choices=[name for name in RARER if name not in ("nothing", "blur 0.7")], metavar="NAME", help="the rarer ones (default: all)")
    p.add_argument("--leave-one-out", type=Path, metavar="FOLDER", help=f"weights that leave one patient out each; --weights picks among {' and '.join(RECIPES)}")
    p.add_argument("--out", type=Path, help="JSON of all rows")
    p.add_argument("--report", nargs="*", type=Path, help="files written with --out, to be joined")
    p.add_argument("--sweep-alphas", action="store_true")
    p.add_argument("--steps", type=int, help="of each training of the sweep")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the sweep's trainings")
    p.add_argument("--fidelity", type=float, default=1.0, help="weight of the mean squared change in the sweep's trainings: without a price, alpha has nothing to trade")
    p.add_argument("--folder", type=Path, default=Path("alpha-sweep"), help="where the sweep's weights lie")
    p.add_argument("--store", type=Path, help="with --report: JSON of the tables; with --sweep-alphas: the sweep, as .npz")
    a = p.parse_args()
    a.cleanings = a.cleanings or [name for name in RARER if name not in ("nothing", "blur 0.7")]
    if a.quick: a.places, a.few, a.climb, a.parts = min(a.places, 4), 2, min(a.climb, 4), [part for part in a.parts if part != "cleanings"]
    if not a.parts: p.error("--quick leaves the cleanings out: nothing is left to measure")
    measuring = not (a.report or a.leave_one_out or a.sweep_alphas)
    if measuring and "cleanings" in a.parts and "jpeg-ls" in a.cleanings and find_spec("jpeg_ls") is None: p.error("JPEG-LS needs a package that is not installed: pip install pyjpegls, or name the --cleanings without it")
    if a.leave_one_out: a.weights = [w for w in a.weights if w in RECIPES]
    if a.leave_one_out and not a.weights: p.error(f"--leave-one-out trains {' or '.join(RECIPES)}")
    if a.report: report(join(a.report), a.store)
    elif a.leave_one_out: leave_one_out(a)
    elif a.sweep_alphas: alphas(a)
    else: measure(a)


if __name__ == "__main__":
    main()
