"""How well does the cascade detect, on scans that nobody trained on?

    MITS_DATA=folder python benchmarks/detection.py [--weights cascade-tiny] [--unseen NAME=FOLDER ...] [--places 12] [--scans real phantom] [--out detection.json]
    MITS_DATA=folder python benchmarks/detection.py --only "unseen: CycleGAN in-painter" ... [--scans real phantom] [--out one.json]
    python benchmarks/detection.py --report FILE... [--store mits_nb/weights/cascade-tiny/detection.json]

First form: measures and writes all rows. Second form: the slices of single conditions, by name, and nothing else. Third form: joins such files, prints the tables, and stores them as chapter 18 shows them. A file that --store has written may be among those joined: its rows are taken over, and rows of the same
scans and condition in the others replace them. Slices by attacker and treatment (the attackers of the training first, then each --unseen one, the CycleGAN in-painter of chapter 19, soap film and copy-move, other masks and touch-ups, a blur and noise afterwards);
regions (Pd at 1 % false alarms per place, places ranked by their suspicion, and the same places before they were forged; F1 of regions, F1 of voxels); the eight whole scans of the paper's Table 4 with its 3-D rule; unforged scans; controls without a generator.
Goals: F1 >= 0.95 and AUC >= 0.985 on slices; Pd at 1 % >= 0.95; voxel F1 >= 0.90; unseen >= 95 % of the aligned AUC; no error on the eight scans; at most one false region in 20 unforged scans.
"""
import argparse, time

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from mits_nb.attack.ctgan import CTGAN, HELD_OUT
from mits_nb.core import UsageError, read_json, rng, versions, weights_path, write_json
from mits_nb.data import development_scans, lung_places
from mits_nb.detect.cascade import Cascade
from mits_nb.detect.heatmap import heatmap
from mits_nb.detect.rivals import CycleForger, CycleNet
from mits_nb.detect.training import CONTROLS, Source, eight_scans, forge_round, forged_copy, painted, pasted_back, perturbed_scan, phantom_source, place_scores, score_at, with_settings
from mits_nb.evaluate import CopyMove, SoapFilm, weights_digest
from mits_nb.metrics import classification, localisation, match_regions, pd_at_fa, roc_auc
from mits_nb.phantom import make_phantom
from mits_nb.protect.rivals import load_protector
from mits_nb.scan import read_scan

TRAINED = {"ctgan-tiny": "ctgan-tiny", "ctgan-zeros-tiny": "ctgan-zeros-tiny"}
PARTS = ("slices", "places", "regions", "scans", "controls", "parity")


def blurred(sigma):
    def treat(scan, seed): return scan.with_hu(np.stack([np.rint(gaussian_filter(s.astype(np.float32), sigma)) for s in scan.hu]).astype(scan.hu.dtype))
    return treat


def noisy(hu_sd):
    def treat(scan, seed): return scan.with_hu(np.rint(scan.hu + rng(seed, "noise").normal(0, hu_sd, scan.shape)).astype(scan.hu.dtype))
    return treat


def conditions(a):
    "(name, attackers or a call that makes them for a source, treatment): aligned first; those of --only, where it is given."
    trained = [CTGAN.from_pretrained(n) for n in TRAINED.values()]
    rows = [("aligned", trained, None)] + [(f"unseen: {name}", [CTGAN.from_pretrained(folder)], None) for name, folder in (u.split("=", 1) for u in a.unseen)]
    cycle = CycleNet.from_pretrained(weights_path("cyclegan-tiny"))
    rows += [("unseen: CycleGAN in-painter", [CycleForger(cycle, t) for t in trained], None)]
    rows += [("unseen: soap film, nothing generated", [SoapFilm(t) for t in trained], None), ("unseen: copy-move, nothing generated", lambda source: [CopyMove.within(t, source) for t in trained], None)]
    rows += [("mask 16", [with_settings(t, mask=16) for t in trained], None), ("released touch-up", [with_settings(t, touch_up="released") for t in trained], None),
             ("released paste and touch-up", [with_settings(t, touch_up="released", paste="released") for t in trained], None), ("no touch-up", [with_settings(t, touch_up=None) for t in trained], None)]
    rows += [("blur 0.5 px afterwards", trained, blurred(.5)), ("blur 0.8 px afterwards", trained, blurred(.8)), ("blur 1.3 px afterwards", trained, blurred(1.3)),
             ("noise 10 HU afterwards", trained, noisy(10)), ("noise 25 HU afterwards", trained, noisy(25)), ("noise 45 HU afterwards", trained, noisy(45))]
    if unknown := set(a.only or ()) - {name for name, *_ in rows}: raise UsageError(f"no condition {sorted(unknown)[0]!r}: use one of {', '.join(repr(name) for name, *_ in rows)}")
    return [row for row in rows if not a.only or row[0] in a.only]


def test_sources(a):
    "Scans that no training has seen."
    real = [Source.of(n, read_scan(p)) for n, p in development_scans().items() if n in HELD_OUT] if "real" in a.scans else []
    made = [phantom_source(s) for s in a.seeds] if "phantom" in a.scans else []
    return real + made


def group(name): return "phantom" if name.startswith("phantom") else "real"


def measure_slices(a, cascade, sources, found):
    for name, attackers, treat in conditions(a):
        for source in sources:
            start = time.perf_counter()
            rows = place_scores(cascade, source, attackers(source) if callable(attackers) else attackers, a.places, 7, treat=treat)
            found["slices"] += [{"condition": name, "patient": source.name, "group": group(source.name), **row} for row in rows]
            print(f"{name:32s} {source.name:16s} AUC {roc_auc([r['p'] for r in rows], [r['tampered'] for r in rows]):.3f} ({time.perf_counter() - start:.0f} s)", flush=True)


def measure_regions(a, cascade, sources, found):
    attackers = [CTGAN.from_pretrained(n) for n in TRAINED.values()]
    for source in sources:
        honest = cascade.inspect(source.scan, False)
        for at in lung_places(source.scan, a.honest_places, 3, 4., source.mask):
            found["places"].append({"patient": source.name, "group": group(source.name), "score": honest.suspicion(at), "tampered": False, "action": ""})
        for i in range(a.rounds):
            forged = forge_round(source.scan, attackers[i % len(attackers)], 4, 70 + i, source.mask, source.nodules)
            notes, report = [n for n in forged.history if n["kind"] == "forged"], cascade.inspect(forged, False)
            for n in notes:
                found["places"].append({"patient": source.name, "group": group(source.name), "score": report.suspicion(n["at"]), "before": honest.suspicion(n["at"]), "tampered": True, "action": n["action"]})
            match = match_regions([r["centre_mm"] for r in report.regions], [forged.voxel_to_world(n["at"]) for n in notes])
            place = localisation(painted([n["at"] for n in notes], forged), painted([r["centre_voxel"] for r in report.regions], forged))
            found["regions"].append({"patient": source.name, "group": group(source.name), **{k: match[k] for k in ("tp", "fp", "fn")}, "voxel_f1": place["f1"], "distance_mm": [d for *_, d in match["pairs"]]})
        print(f"regions of {source.name}: " + str({k: sum(r[k] for r in found["regions"] if r["patient"] == source.name) for k in ("tp", "fp", "fn")}), flush=True)


def measure_scans(a, cascade, sources, found):
    attackers, protectors = [CTGAN.from_pretrained(n) for n in TRAINED.values()], [load_protector(n) for n in ("mitsgan-tiny", "mitsgan-robust-tiny", "tafim-tiny")]
    def note(kind, name, scan, truth):
        report = cascade.inspect(scan, False)
        match = match_regions([r["centre_mm"] for r in report.regions], truth)
        found["scans"].append({"kind": kind, "scan": name, "group": group(name), "slices": len(report.slices), "called": sum(s["tampered"] for s in report.slices), **{k: match[k] for k in ("tp", "fp", "fn")}})
        print(found["scans"][-1], flush=True)
    for source in {s.name: s for s in sources[:1] + [s for s in sources if group(s.name) == "phantom"][:1]}.values(): # the first scan, and the first phantom if it is another
        scan, _ = make_phantom(seed=17, shape=(22, 512, 512), spacing=(2.5, .7, .7), n_nodules=0)
        for name, _, whole in eight_scans(source, Source.of("phantom-17", scan, []), attackers):
            note("eight", f"{source.name} {name}", whole, [whole.voxel_to_world(n["at"]) for n in whole.history if n["kind"] == "forged"])
    if "real" in a.scans:
        for name, path in development_scans().items(): note("unforged" if name in HELD_OUT else "unforged, seen in training", name, read_scan(path), [])
        for source in sources:
            if group(source.name) == "real":
                note("unforged, perturbed", source.name, perturbed_scan(source.scan, 5), [])
                for p in protectors: note(f"unforged, protected by {p.name}", source.name, p.protect(source.scan, 5, again=True), [])
    if "phantom" in a.scans:
        for seed in a.honest: note("unforged", f"phantom-{seed}", phantom_source(seed).scan, [])


def measure_controls(a, cascade, sources, found):
    for source in sources:
        for kind in CONTROLS:
            for i in range(a.rounds):
                places, scan = [], source.scan
                for at in lung_places(source.scan, 60, 90 + i, 6., source.mask):
                    if all((np.abs(at - q) * source.scan.spacing).max() > 40 for q in places): places.append(at)
                places = places[:4]
                for at in places: scan = pasted_back(scan, tuple(at), kind)
                report = cascade.inspect(scan, False)
                found["controls"] += [{"kind": kind, "patient": source.name, "group": group(source.name), "called": score_at(report.regions, scan.voxel_to_world(at)) > 0} for at in places]
        print(f"controls of {source.name}: " + str({k: float(np.mean([c['called'] for c in found['controls'] if c['kind'] == k and c['patient'] == source.name])) for k in CONTROLS}), flush=True)


def measure_parity(a, cascade, sources, found):
    "Middle slices of forged places and the same slices before, each alone: by the dense pass, and window by window as published (some ten seconds a slice)."
    attackers = [CTGAN.from_pretrained(n) for n in TRAINED.values()]
    for source in sources[:1] + [s for s in sources[1:] if group(s.name) == "phantom"][:1]:
        for i in range(a.places):
            forged, _ = forged_copy(source, i, attackers, 7)
            z = int(forged.history[-1]["at"][0])
            for tampered, hu in ((True, forged.hu[z:z + 1]), (False, source.scan.hu[z:z + 1])):
                for method in ("dense", "windows"):
                    heat = heatmap(hu, cascade.detector, method)
                    found["parity"].append({"patient": source.name, "group": group(source.name), "method": method, "tampered": tampered, "p": float(cascade.slice_probability(heat)[0]), "hottest": float(heat.max())})
        rows = [r for r in found["parity"] if r["patient"] == source.name]
        print(f"parity on {source.name}: " + str({m: round(roc_auc([r["p"] for r in rows if r["method"] == m], [r["tampered"] for r in rows if r["method"] == m]), 4) for m in ("dense", "windows")}), flush=True)


def tables(found):
    "The tables that chapter 18 shows; those that nothing was measured for stay empty."
    slices = pd.DataFrame(found["slices"], columns=None if found["slices"] else ["group", "condition", "action", "tampered", "p", "alone"])
    def scores(g):
        truth, alone = g.tampered.tolist(), classification(g.tampered.tolist(), (g.alone >= .5).tolist())
        return pd.Series({**{k: classification(truth, (g.p >= .5).tolist())[k] for k in ("accuracy", "precision", "recall", "f1")}, "auc": roc_auc(g.p.tolist(), truth), "f1_alone": alone["f1"], "auc_alone": roc_auc(g.alone.tolist(), truth), "slices": len(g)})
    def scored(g, columns, **how): return g.groupby(columns, **how).apply(scores, include_groups=False).reset_index().to_dict("records") if len(g) else []
    places = pd.DataFrame(found["places"], columns=None if found["places"] else ["group", "score", "before", "tampered"])
    regions = []
    for name, g in places.groupby("group"):
        r = [x for x in found["regions"] if x["group"] == name]
        tp, fp, fn = (sum(x[k] for x in r) for k in ("tp", "fp", "fn"))
        regions.append({"group": name, "places": int(g.tampered.sum()), "pd_at_1_percent": pd_at_fa(g.score.tolist(), g.tampered.tolist()), "same_places_before": pd_at_fa(g.score.where(~g.tampered, g.before).tolist(), g.tampered.tolist()), "auc": roc_auc(g.score.tolist(), g.tampered.tolist()), "tp": tp, "fp": fp, "fn": fn,
                        "region_f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None, "voxel_f1": float(np.mean([x["voxel_f1"] for x in r])), "distance_mm": float(np.median(sum((x["distance_mm"] for x in r), []))) if tp else None})
    controls = pd.DataFrame(found["controls"]).groupby(["group", "kind"], sort=False).called.agg(["mean", "size"]).reset_index().to_dict("records") if found["controls"] else []
    parity = [{"group": name, "method": method, "slices": len(g), **{f"auc_{k}": roc_auc(g[v].tolist(), g.tampered.tolist()) for k, v in (("second_stage", "p"), ("hottest_cell", "hottest"))}}
              for (name, method), g in pd.DataFrame(found["parity"], columns=None if found["parity"] else ["group", "method"]).groupby(["group", "method"])]
    return {"parity": parity, "slices": scored(slices, ["group", "condition"], sort=False), "actions": scored(slices[slices.condition == "aligned"], ["group", "action"]), "regions": regions, "scans": found["scans"], "controls": controls}


KEYS = {"slices": ("group", "condition"), "actions": ("group", "action"), "regions": ("group",), "scans": ("kind", "scan"), "controls": ("group", "kind"), "parity": ("group", "method")} # what tells the rows of a table apart


def joined(files, weights):
    "The tables of several files, measured or stored. What was measured now replaces stored rows with the same key; raises `UsageError` for a stored file of other weights."
    parts = {f: read_json(f) for f in files}
    stored = {f: p for f, p in parts.items() if "versions" in p}
    for f, p in stored.items():
        if p["weights"] != weights: raise UsageError(f"{f} was measured with other weights than {', '.join(weights)}: measure again")
    measured = [p for f, p in parts.items() if f not in stored]
    new, done = tables({k: sum((p.get(k, []) for p in measured), []) for k in PARTS}), {}
    for name, columns in KEYS.items():
        rows = {}
        for row in [row for p in stored.values() for row in p.get(name, [])] + new[name]: rows[tuple(row[c] for c in columns)] = row
        groups = list(dict.fromkeys(row.get("group") for row in rows.values()))
        done[name] = list(rows.values()) if name == "scans" else sorted(rows.values(), key=lambda row: groups.index(row.get("group"))) # rows of a group stay together
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="cascade-tiny")
    parser.add_argument("--unseen", nargs="*", default=[], metavar="NAME=FOLDER", help="forgers that no training has met")
    parser.add_argument("--scans", nargs="+", choices=("real", "phantom"), default=["real", "phantom"])
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="single conditions of the slices, by name; nothing else is measured")
    parser.add_argument("--parts", nargs="+", choices=("slices", "regions", "scans", "controls", "parity"), default=["slices", "regions", "scans", "controls"], help="parity takes four minutes for ten places of a scan, and is left out unless it is named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[12, 13, 14], help="test phantoms")
    parser.add_argument("--honest", nargs="+", type=int, default=list(range(20, 40)), help="unforged phantoms")
    parser.add_argument("--places", type=int, default=12, help="places per scan and condition, five slices each")
    parser.add_argument("--honest-places", type=int, default=200, help="unforged places per scan, for false alarms")
    parser.add_argument("--rounds", type=int, default=4, help="forged copies with four places each, per scan")
    parser.add_argument("--out", default="detection.json")
    parser.add_argument("--report", nargs="+")
    parser.add_argument("--store")
    a = parser.parse_args()
    if not a.report:
        cascade, sources, found = Cascade.from_pretrained(a.weights), test_sources(a), {k: [] for k in PARTS}
        for part in ["slices"] if a.only else a.parts:
            {"slices": measure_slices, "regions": measure_regions, "scans": measure_scans, "controls": measure_controls, "parity": measure_parity}[part](a, cascade, sources, found)
            write_json(a.out, found)
        return
    weights = {a.weights: weights_digest(a.weights)}
    done = joined(a.report, weights)
    for name, rows in done.items(): print(f"\n{name}\n" + pd.DataFrame(rows).round(3).to_string(index=False))
    if a.store: write_json(a.store, done | {"weights": weights, "versions": versions()})


if __name__ == "__main__": main()
