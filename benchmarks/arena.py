"""Attackers x protections x detectors (chapter 20), and the tables of both papers, stored as the chapter shows them.

    python benchmarks/arena.py --out FOLDER [--data phantom] [--seeds 12 13 14 16] [--places 4] [--pixels 352] [--detectors FOLDER] [--tables FOLDER] [--store arena-tiny]
    python benchmarks/arena.py --keep --tables FOLDER --store arena-tiny [--data phantom]

Every attacker, protection and scan is a cell in FOLDER/cells: call it again after an interruption. `--tables` is a folder that mits_tables has written; its tables are stored beside the arena. `--keep` renews the tables and the sentences of what is stored, and measures nothing; where nothing is stored yet, the tables alone are. `--store` writes weights/NAME/phantom.json, or scans.json for other data, and card.md; an arena with `--detectors` is stored
beside the one without them, as "rivals". Phantoms here have pixels of about 1 mm on a
smaller grid than those of the tables: half the work, and the same question.
"""
import argparse
from dataclasses import asdict
from pathlib import Path

from mits_nb.core import from_preset, read_json, versions, weights_path, write_json
from mits_nb.evaluate import ATTACKERS, PROTECTIONS, Bench, CellStore, EvaluateConfig, arena_matrix, arena_run, find_tests, findings, plain


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", default="phantom")
    parser.add_argument("--seeds", type=int, nargs="+", default=[12, 13, 14, 16])
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--honest-places", type=int, default=100)
    parser.add_argument("--pixels", type=int, default=352)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--attackers", nargs="+", default=list(ATTACKERS), choices=list(ATTACKERS))
    parser.add_argument("--protections", nargs="+", default=list(PROTECTIONS), choices=PROTECTIONS)
    parser.add_argument("--detectors")
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--store")
    parser.add_argument("--keep", action="store_true")
    a = parser.parse_args()
    name = "phantom.json" if a.data == "phantom" else "scans.json"
    tables = read_json(a.tables / "tables.json") if a.tables else {"tables": [], "about": None}
    tables = {"tables": tables["tables"], "tables_about": tables["about"] and tables["about"] | {"data": Path(a.data).name}} # a name: where the scans lie is nobody's business
    if a.keep and not (a.tables and a.store): parser.error("--keep needs --tables and --store")
    if a.keep:
        file = weights_path(a.store) / name
        stored = (read_json(file) if file.is_file() else {}) | tables # no arena there: tables alone
        for part in ("arena", "rivals"):
            if part in stored: stored[part]["findings"] = findings(stored[part]["cells"], stored[part])
        print("stored", write_json(file, stored))
        return
    if a.out is None: parser.error("give --out, or --keep with --tables and --store")
    shape, spacing = (a.slices, a.pixels, a.pixels), (2.5, round(352 / a.pixels, 3), round(352 / a.pixels, 3))
    config = from_preset(EvaluateConfig, "tiny", seeds=tuple(a.seeds), shape=shape, spacing=spacing, arena_places=a.places, honest_places=a.honest_places)
    bench, store = Bench(config, find_tests(a.data, config)), CellStore(a.out)
    arena = store.compute([arena_run(bench, a.attackers, a.protections, a.detectors)], "arena")["arena"]
    for measure in ("pd", "called", "lost_db", "noise"):
        rows, columns, values = arena_matrix(arena, measure)
        print(f"\n{measure:>16} " + " ".join(f"{c:>15}" for c in columns))
        for row, line in zip(rows, values): print(f"{row:>16} " + " ".join(f"{v:15.2f}" for v in line))
    print("\n" + "\n".join(arena["findings"]))
    about = {"data": Path(a.data).name, "settings": plain(asdict(config)), "weights": {bench.weights[role]: digest for role, digest in bench.uses(*bench.weights).items()}, "scans": {n: store.get(bench.data_cell(n)) for n in bench.tests}, "versions": versions()}
    write_json(a.out / name, {"about": about, "arena": arena, **tables})
    if a.store:
        folder = weights_path("ctgan-tiny").parent / a.store
        before = {"about": about, "tables": []} | (read_json(folder / name) if (folder / name).is_file() else {}) | (tables if a.tables else {})
        stored = before | ({"rivals": arena | {"about": about}} if a.detectors else {"about": about, "arena": arena})
        print("stored", write_json(folder / name, stored))
        (folder / "card.md").write_text("# Results of the arena and of the tables\n\nNo weights: figures that chapter 20 shows, measured by `benchmarks/arena.py` and `mits_tables` with the weights whose fingerprints stand under `about`.\n", encoding="utf-8")


if __name__ == "__main__": main()
