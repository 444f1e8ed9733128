"""The rows of the detector's tables (chapter 19): every ablation and rival trained and tested, with intervals by scan.

    python benchmarks/detector_tables.py --sets FOLDER --out RESULTS [--rows Ours ResNet50 ...] [--seeds 0 1 2] [--close 0.02] [--preset tiny] [--whole phantom] [--store cascade-tiny]
    python benchmarks/detector_tables.py --make --sets FOLDER --out RESULTS ...
    python benchmarks/detector_tables.py --quick --out RESULTS

`--sets` is a folder that `mits_data forge all` made (its subfolder `all`), or one with patches.npz (hu int16 (n, 68, 68), kind uint8 (n,)), global.npz and test.npz (slices under the keys hu_0, hu_1, ...; tampered, scan, action), and for the rows CTGAN-INJ and CTGAN-REM
patches-inject.npz and patches-remove.npz; `write_sets` writes such a folder. `--make` makes one first, where it is not there, from the scans and phantoms of chapter 18: patches, second stage and test from different phantoms, the test patients of the shipped weights kept out (the other real patients are in the patches and in the second stage, as for the shipped weights). `--whole` measures Table 4 on the eight scans that `mits_tables --data` makes of the same word: phantom, a data set or a folder. `--quick` builds a miniature of
everything from phantoms, in minutes. The first seed trains every row; the others only those whose accuracy is within `--close` of the row Ours, and Ours itself. Every finished row is a JSON file in RESULTS, every network
lies in RESULTS/networks, trainings go on from checkpoints: call it again after an interruption. `--store` joins all rows that are there into weights/NAME/tables.json, which the chapter shows.
"""
import argparse
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mits_nb.attack.ctgan import CTGAN, HELD_OUT
from mits_nb.core import UsageError, from_preset, read_json, rng, versions, weights_path, write_json
from mits_nb.data import development_scans, lung_places
from mits_nb.detect.cnn import CLEAN, FORGED, PAIRED, DetectorConfig, PatchSet, cut_patch
from mits_nb.detect.rivals import CYCLEGAN, ROWS, TABLE1, TABLE2, TABLE3, CycleNet, TablesConfig, ablation, beside_paper, cyclegan_patches, cyclegan_set, fingerprint, honest_volumes, row_cascade, scan_row, table_rows
from mits_nb.detect.training import (ForgedSlices, OneKind, Source, TrainingConfig, build_patches, forged_slices, load_patches, load_slices, phantom_source, read_set, real_sources, save_patches, save_slices,
                                     set_slices, slice_patches)
from mits_nb.detect.windows import window_centres
from mits_nb.evaluate import Bench, EvaluateConfig, digest, find_tests, forged_whole, plain, scan_digest, whole_tests
from mits_nb.phantom import make_phantom
from mits_nb.scan import read_scan


def write_sets(folder, patches, slices, test):
    "patches: {'': PatchSet, 'inject': PatchSet, 'remove': PatchSet}, the last two where there are any; slices and test: `ForgedSlices`."
    folder = Path(folder)
    for action, part in patches.items(): save_patches(folder / f"patches{action and '-' + action}.npz", part)
    save_slices(folder / "global.npz", slices)
    save_slices(folder / "test.npz", test)


def read_sets(folder):
    "Patches by kind, slices of the second stage, test slices: of a folder that `write_sets` wrote, or that mits_data forge did (its kind all)."
    folder, patches = Path(folder), {}
    if (folder / "sets.json").is_file():
        for action in ("", "inject", "remove"): patches[action] = PatchSet.joined([slice_patches(s, seed=i) for i, s in enumerate(set_slices(folder, "local_train", action))])
        return patches, read_set(folder, "global_train"), read_set(folder, "test")
    for action in ("", "inject", "remove"):
        file = folder / f"patches{action and '-' + action}.npz"
        if file.is_file() or not action: patches[action] = load_patches(file)
    return patches, load_slices(folder / "global.npz"), load_slices(folder / "test.npz")


MADE = {"tiny": dict(phantoms=20, rounds=12, phantom_rounds=3)} # about a third of the shipped detector's examples, three times: for both kinds of forgery and for each


def make_sets(folder, config, data=None, places=(3, 6), tests=(12, 13, 14, 16, 17)):
    "The sets of chapter 18. Slices of one size only: every fourth phantom, with coarse pixels, is for the patches alone. `places` of each scan: for the second stage, for the test."
    attackers, real = [CTGAN.from_pretrained(name) for name in ("ctgan-tiny", "ctgan-zeros-tiny")], real_sources(data)
    phantom = lambda seed: (f"phantom-{seed}", lambda: phantom_source(seed, config.phantom_shape))
    fine = lambda start, n: [phantom(seed) for seed in range(start, start + 2 * n) if seed % 4 != 3][:n]
    learn = [(*s, config.rounds) for s in real] + [(*phantom(1200 + i), config.phantom_rounds) for i in range(config.phantoms)]
    patches = {action: build_patches(learn, [OneKind(a, action) if action else a for a in attackers], config, 0) for action in ("", "inject", "remove")}
    held_out = [(name, lambda path=path, name=name: Source.of(name, read_scan(path))) for name, path in (development_scans() if data != () else {}).items() if name in HELD_OUT]
    slices = forged_slices([(*s, places[0]) for s in real + fine(1300, max(2, config.phantoms // 2))], attackers, 1)
    test = forged_slices([(*s, places[1]) for s in held_out + [phantom(seed) for seed in tests]], attackers, 7)
    write_sets(folder, patches, slices, test)
    write_json(Path(folder) / "names.json", {"test": [name for name, *_ in held_out] + [f"phantom-{seed}" for seed in tests]})


def miniature(seeds, places):
    "Phantoms forged at single places by the shipped CT-GAN."
    forger, cut, slices = CTGAN.from_pretrained("ctgan-tiny"), [], []
    for number, seed in enumerate(seeds):
        scan, _ = make_phantom(seed=seed, shape=(8, 288, 288), spacing=(3., 1.2, 1.2))
        grid, numbers = window_centres(scan.shape[1:]), rng(seed, "miniature")
        for i, at in enumerate(lung_places(scan, places, seed=seed, margin_mm=4)):
            action, z = ("inject", "remove")[i % 2], int(at[0])
            forged = forger.tamper(scan, tuple(int(v) for v in at), action=action, seed=i)
            cut += [(action, cut_patch(forged.hu[z], at[1:]), FORGED), (action, cut_patch(scan.hu[z], at[1:]), PAIRED), (action, cut_patch(scan.hu[z], grid[numbers.integers(len(grid))]), CLEAN)]
            slices += [(forged.hu[z], True, number, action), (scan.hu[z], False, number, "")]
    patches = {a: PatchSet(np.stack([hu for b, hu, _ in cut if a in ("", b)]), np.array([k for b, _, k in cut if a in ("", b)], np.uint8)) for a in ("", "inject", "remove")}
    hu, tampered, scan, action = zip(*slices)
    return patches, ForgedSlices(list(hu), np.array(tampered), np.array(scan), np.array(action))


def quick_sets(out):
    "A folder of sets."
    patches, slices = miniature(range(1600, 1604), 8)
    _, test = miniature(range(60, 62), 6)
    write_sets(out / "sets", patches, slices, test)
    return out / "sets"


def sets_of(name, patches, slices, test, memory):
    "What a row learns from and is tested on."
    if name != "CycleGAN":
        action = ROWS[name].action
        if action not in patches: raise UsageError(f"row {name} needs patches-{action}.npz in the sets")
        return patches[action], slices, test
    if not memory:
        net = CycleNet.from_pretrained(weights_path("cyclegan-tiny"))
        memory["slices"], memory["test"] = (cyclegan_set(honest_volumes(s), net, seed) for seed, s in ((0, slices), (1, test)))
        memory["patches"] = cyclegan_patches(memory["slices"], 10)
    return memory["patches"], memory["slices"], memory["test"]


def whole_scans(bench, patches, slices, config, out):
    "Table 4: one JSON for each scan and method, with the scan's fingerprint."
    cascades = {m: row_cascade(ROWS[m], patches[""], slices, config, 0, out / "networks") for m in ("Ours", "XceptionNet", "ResNet50")}
    made_by = {m: digest(plain([asdict(config), fingerprint(patches[""], slices), asdict(c.config), c.calibration])) for m, c in cascades.items()}
    found = {}
    for role, name in whole_tests(bench).items():
        scan = forged_whole(bench, name, role)
        for method, cascade in cascades.items():
            file, voxels = out / f"scan-{role}-{method.lower()}.json", scan_digest(scan)
            key = {"patient": name, "voxels": voxels, "made by": made_by[method]}
            if not file.is_file() or not key.items() <= read_json(file).items(): write_json(file, scan_row(cascade, scan) | key)
            found.setdefault(role, {})[method] = read_json(file)
            print(role, method, found[role][method], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--close", type=float, default=.02)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--whole", metavar="DATA")
    parser.add_argument("--store")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    config, small = from_preset(TablesConfig, a.preset), {}
    if a.quick:
        if not (a.out / "sets" / "test.npz").is_file(): quick_sets(a.out)
        a.sets, a.whole, small = a.out / "sets", a.whole or "phantom", dict(shape=(10, 256, 256), spacing=(2.5, 1.3, 1.3))
        config = replace(config, width=.125, slice_steps=20, slice_batch=4, first=dict(batch=32, dense_batch=8, steps=60, dropout=.2), second=dict(components=8))
    if a.sets is None: parser.error("give --sets, or --quick")
    if a.make and not (a.sets / "test.npz").is_file(): make_sets(a.sets, from_preset(TrainingConfig, a.preset, **MADE.get(a.preset, {})))
    (patches, slices, test), memory, results = read_sets(a.sets), {}, []
    for i, seed in enumerate(a.seeds):
        means = {r["row"]: r["scores"]["accuracy"] for r in results if r["seed"] == a.seeds[0]}
        for name in a.rows:
            if i and abs(means[name] - means.get("Ours", means[name])) >= a.close: continue
            results.append(ablation(name, *sets_of(name, patches, slices, test, memory), seed, config, a.out))
            print(f"{name:>15} seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in results[-1]["scores"].items() if isinstance(v, float)) + f", {results[-1]['seconds']:.0f} s", flush=True)
    shown = from_preset(EvaluateConfig, a.preset, **small)
    scans = whole_scans(Bench(shown, find_tests(a.whole, shown)), patches, slices, config, a.out) if a.whole else {}
    rows = table_rows(results)
    for title, table in (("Table 1", TABLE1), ("Table 2", {**TABLE2, **CYCLEGAN}), ("Table 3", TABLE3)): print(f"\n{title}\n{beside_paper(rows, table).to_string()}", flush=True)
    names = read_json(a.sets / "names.json")["test"] if (a.sets / "names.json").is_file() else []
    text = (f"Preset {a.preset}: {config.detector.steps} steps for a network on windows (the first lesson of `mits_train detect` has {from_preset(DetectorConfig, a.preset).steps}), {config.slice_steps} of {config.slice_batch} slices for one on whole slices; "
            f"{next(iter(rows.values()))['slices']} test slices of {next(iter(rows.values()))['scans']} scans that no row has learnt from{' (' + ', '.join(names) + ')' if names else ''}; rivals asked for every {config.step}. window; made by benchmarks/detector_tables.py.")
    stored = {"about": {"text": text, "scans": names, "seeds": a.seeds, "close": a.close, "versions": versions()}, "rows": rows, "scans": scans}
    write_json(a.out / "tables.json", stored)
    if a.store: print("stored", write_json(weights_path(a.store) / "tables.json", stored))


if __name__ == "__main__": main()
