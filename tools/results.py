"""Render docs/results.md, the current figures of forger, protector and detector, from the JSON files that the measurements wrote. Nothing is typed in.

Read are the files in mits_nb/weights/*/. A file that is not there leaves a line that says so, and so do figures of weights that have been replaced since.

    python tools/results.py            write docs/results.md
    python tools/results.py --check    fail when docs/results.md is out of date
"""
import json
import sys
from functools import reduce
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "mits_nb" / "weights"
# shipped weights: what they are, the chapter, and the command that remakes them
SHIPPED = {
    "ctgan-tiny": ("forger; the hole starts as a soap film", "09_attack.ctgan", "mits_train attack --out {}"),
    "ctgan-zeros-tiny": ("forger; the hole starts empty, as published", "09_attack.ctgan", "mits_train attack --variant zeros --out {}"),
    "mitsgan-tiny": ("protector", "11_protect.mitsgan", "mits_train protect --out {}"),
    "mitsgan-robust-tiny": ("protector, trained against forgers who clean first", "11_protect.mitsgan", "mits_train protect --variant robust --out {}"),
    "mitsgan-released-tiny": ("protector: network and losses of the released code, with a price of the change", "11_protect.mitsgan", "mits_train protect --variant released --out {}"),
    "tafim-tiny": ("rival of the protector", "12_protect.rivals", "mits_train protect --variant tafim --out {}"),
    "cascade-tiny": ("detector", "18_detect.training", "mits_train detect --out {}"),
    "cyclegan-tiny": ("second forger for the detector: takes noise out", "19_detect.rivals", "python -c \"from mits_nb.detect.rivals import train_cyclegan; train_cyclegan('tiny', '{}')\""),
}
ATTACK = "MITS_DATA=scans python benchmarks/attack_quality.py --leave-one-out FOLDER --out mits_nb/weights/ctgan-tiny/leave_one_out.json"
PROTECT = "MITS_DATA=scans python benchmarks/protection.py --weights mitsgan-tiny mitsgan-robust-tiny mitsgan-released-tiny --out protection.json\nMITS_DATA=scans python benchmarks/protection.py --leave-one-out FOLDER --out left-out.json\npython benchmarks/protection.py --report protection.json left-out.json --store mits_nb/weights/mitsgan-tiny/protection.json"
DETECT = ("MITS_DATA=scans python benchmarks/detection.py --scans real --unseen NAME=FOLDER ... --out real.json\n"
          "python benchmarks/detection.py --scans phantom --places 6 --unseen NAME=FOLDER ... --out phantom.json\n"
          "python benchmarks/detection.py --report real.json phantom.json --store mits_nb/weights/cascade-tiny/detection.json")
TABLES = "MITS_DATA=scans python benchmarks/detector_tables.py --make --sets SETS --out RESULTS --store cascade-tiny"
EVALUATE = "mits_tables --data {data} --out outputs/tables\npython benchmarks/arena.py --data {data} --out outputs/arena --tables outputs/tables --store arena-tiny"
DATA = {"phantom": "phantoms", "scans": "the real scans"}


def read(name: str):
    "A measured file of the shipped weights, or None."
    file = WEIGHTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def show(value) -> str:
    "A figure as a reader wants it: three decimals below 2, one above; nothing for what was not measured."
    if value is None or value == "" or (isinstance(value, float) and not np.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, str)):
        return str(value)
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"


def table(heads: list[str], rows: list[list], words: int = 1) -> str:
    "A Markdown table; the first columns are words, the others are figures."
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *([show(v) for v in row] for row in rows)))


def interval(low: float, high: float) -> str:
    "A confidence interval in words that sort with the figures."
    return f"{show(low)} to {show(high)}"


def share(found: int, asked: int) -> str:
    "A count as a share with its 95 % interval (Wilson)."
    from scipy.stats import binomtest

    ci = binomtest(int(found), int(asked)).proportion_ci(method="wilson")
    return f"{100 * found / asked:.0f} % ({100 * ci.low:.0f} to {100 * ci.high:.0f})"


def over_scans(values: list[float]) -> list:
    "Mean over scans, and its 95 % interval: scans are drawn again, not cases."
    from mits_nb.metrics import bootstrap_ci

    if len(values) < 2:
        return [float(np.mean(values)), "-", show(min(values)), show(max(values))]
    ci = bootstrap_ci(np.mean, list(range(len(values))), values)
    return [ci["value"], interval(ci["low"], ci["high"]), show(min(values)), show(max(values))]


def records(rows: list[dict], columns: dict[str, str]) -> str:
    "A table of records: the columns that at least one of them has."
    kept = {key: head for key, head in columns.items() if any(key in row for row in rows)}
    return table(list(kept.values()), [[row.get(key) for key in kept] for row in rows])


def stale(used: dict[str, str]) -> str:
    "A warning where figures belong to weights that are no longer those shipped; otherwise nothing. `used`: name -> digest."
    from mits_nb.evaluate import weights_digest

    changed = [name for name, digest in used.items() if (WEIGHTS / name).is_dir() and weights_digest(WEIGHTS / name) != digest]
    return f"**Measured with earlier weights** ({', '.join(changed)}): measure again.\n\n" if changed else ""


def section(title: str, text: str, command: str, body: str | None) -> str:
    "One measurement: what it is, its tables or the word that it is missing, and the command that remakes it."
    made = body or "*Not measured yet.*"
    return f"### {title}\n\n{text}\n\n{made}\n\nRemake it:\n\n```sh\n{command}\n```"


def weights() -> str:
    "The shipped weights: size, training time, recipe."
    rows = []
    for name, (what, chapter, command) in SHIPPED.items():
        folder = WEIGHTS / name
        if not folder.is_dir():
            rows.append([f"`{name}`", what, "not shipped yet", "-", f"`{command.format('FOLDER')}`"])
            continue
        size = sum(f.stat().st_size for f in folder.rglob("*.s*") if f.suffix in (".safetensors", ".skops")) / 1000
        seconds = (read(f"{name}/history.json") or {}).get("seconds")
        rows.append([f"[`{name}`](../mits_nb/weights/{name}/card.md)", f"{what} ([chapter {int(chapter[:2])}](../nbs/{chapter}.ipynb))", f"{size:,.0f} kB", f"{seconds / 60:.0f}" if seconds else "-", f"`{command.format('FOLDER')}`"])
    return table(["weights", "what", "size", "minutes of training, where noted", "remake it"], rows, words=5)


def forger() -> str | None:
    "Quality of forgeries on scans that no forger was trained on."
    found = read("ctgan-tiny/leave_one_out.json")
    if found is None:
        return None
    rows, auc = found["rows"], found.get("auc", {})
    places, lesions = sum(r["inject"]["places"] for r in rows), sum(r["inject"]["found"] for r in rows)
    lines = [["injections that give a lesion of 8 to 30 mm", share(lesions, places), "(95 % by place)", f"{100 * min(r['inject']['rate'] for r in rows):.0f} %", f"{100 * max(r['inject']['rate'] for r in rows):.0f} %"]]
    kinds = {"tissue removed, rendered nodules, whole masked centre": ("remove_rendered", "removed_centre"),
             "step across the seam, injection (1 is none)": ("traces", "inject", "seam"), "step across the seam, removal": ("traces", "remove", "seam"),
             "noise inside over outside, injection": ("traces", "inject", "noise"), "noise inside over outside, removal": ("traces", "remove", "noise"),
             "error of the remover's filling, HU": ("inpainting", "remover"), "error of harmonic in-painting, HU": ("inpainting", "harmonic"),
             "error of biharmonic in-painting, HU": ("inpainting", "biharmonic")}
    for name, keys in kinds.items():
        lines.append([name, *over_scans([reduce(dict.__getitem__, keys, r) for r in rows])])
    for action, word in (("inject", "injected"), ("remove", "removed")):
        if auc:
            lines.append([f"AUC of a plain classifier on other patients, {word} (0.5: cannot tell)", *over_scans([a[action] for a in auc.values()])])
    return f"{len(rows)} scans: {', '.join(r['scan'] for r in rows)}.\n\n" + table(["what", "mean over scans", "95 % interval", "lowest scan", "highest scan"], lines)


def frame(tables: dict, name: str) -> list[dict]:
    "One of the stored tables as records."
    return [dict(zip(tables[name]["columns"], row)) for row in tables.get(name, {"data": []})["data"]]


def protector() -> str | None:
    "Cost and effect of the protections, real and phantom."
    found = read("mitsgan-tiny/protection.json")
    if found is None:
        return None
    parts = []
    for group, word in (("real, held out", "On a patient that no network was trained on"), ("phantoms", "On phantoms")):
        rows = [r for r in frame(found["tables"], f"cost and effect, {group}") if " x" not in r["protector"] and r["protector"] not in ("pgd 10 HU", "pgd 40 HU", "nothing")]
        left = {(r["attacker"], r["protector"]): r for r in frame(found["tables"], f"after a blur of 0.7 pixels, {group}")}
        lines = []
        for r in sorted(rows, key=lambda r: (r["attacker"], r["action"])):
            after = left.get((r["attacker"], r["protector"]))
            lines.append([r["attacker"], r["action"], r["protector"], f"{r['slice PSNR [dB]']:.1f}", r["slice SSIM"], f"{r['forged [dB]']:.1f}", f"{r['protected, forged [dB]']:.1f}", f"{r['lost [dB]']:.1f}", f"{r['low']:.1f} to {r['high']:.1f}",
                          "-" if after is None else f"{100 * after['share left']:.0f} % ({100 * after['low']:.0f} to {100 * after['high']:.0f})", "-" if r["lesion gone"] is None else f"{100 * r['lesion gone']:.0f} %", r["places"]])
        heads = ["forger", "action", "protection", "slice, dB", "slice, SSIM", "forged, dB", "protected, then forged, dB", "lost, dB", "95 % interval", "left after a blur", "lesion gone", "places"]
        if lines:
            parts.append(f"**{word}.**\n\n" + table(heads, lines, words=3))
    if each := frame(found["tables"], "patient by patient") + [r | {"patient": "all"} for r in frame(found["tables"], "all patients")]:
        heads = ["patient left out", "protection", "forger", "action", "slice, dB", "slice, SSIM", "forged, dB", "protected, then forged, dB", "lost, dB", "95 % interval", "places"]
        lines = [[r["patient"], r["protector"], r["attacker"], r["action"], f"{r['slice PSNR [dB]']:.1f}", r["slice SSIM"], f"{r['forged [dB]']:.1f}", f"{r['protected, forged [dB]']:.1f}", f"{r['lost [dB]']:.1f}", f"{r['low']:.1f} to {r['high']:.1f}", r["places"]] for r in each]
        parts.append("**Patient by patient: each protector trained without the one that is measured.** The forgers are those that ship, who know every patient but LIDC-IDRI-0003. The intervals of single patients draw places, those of all draw patients and places.\n\n" + table(heads, lines, words=4))
    if blurred := frame(found["tables"], "all patients, after a blur of 0.7 pixels"):
        lines = [[r["protector"], r["attacker"], f"{r['lost [dB]']:.2f}", f"{100 * r['share left']:.0f} % ({100 * r['low']:.0f} to {100 * r['high']:.0f})"] for r in blurred]
        parts.append("The same over all four patients when the forger first blurs by 0.7 pixels:\n\n" + table(["protection", "forger", "lost, dB", "share of the loss without the blur"], lines, words=2))
    unforged = frame(found["tables"], "unforged scans")
    if unforged:
        heads = ["protector", "scan", "nodules", "volume change, mean %", "largest %", "lung sd, HU"]
        lines = [[r["protector"], r["scan"], r["nodules"], *(f"{r[h]:.1f}" for h in heads[3:5]), r["lung sd, HU"]] for r in unforged]
        parts.append("**What somebody who measures nodules and noise on the protected scan would find.**\n\n" + table(heads, lines, words=2))
    return "\n\n".join(parts)


SCORES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "auc": "AUC", "f1_alone": "F1, each slice alone", "auc_alone": "AUC, each slice alone", "slices": "slices"}


def detector_card() -> str | None:
    "What was measured when the shipped detector was trained."
    measured = (read("cascade-tiny/history.json") or {}).get("measured")
    if not measured:
        return None
    ways = {"paired": "tampered places, forged and before", "scan": "every slice of every scan"}
    rows = [{"data": f"{group}, {word}", **values[key]} for group, values in measured.items() for key, word in ways.items() if key in values]
    parts = [records(rows, {"data": "scans, way of counting", **SCORES})]
    alarms = [[f"{group}, {kind}", share(a["slices_called"], a["slices"]), a["slices"], a["regions"]] for group, values in measured.items() for kind, a in values.get("alarms", {}).items()]
    if alarms:
        parts.append("Unforged scans (the interval counts slices as if they were independent, so it is too narrow):\n\n" + table(["scans", "slices called tampered", "slices", "false regions"], alarms))
    return "\n\n".join(parts)


def detection() -> str | None:
    "The long measurement of the detector."
    found = read("cascade-tiny/detection.json")
    if found is None:
        return None
    low_high = {"low": "95 %, from", "high": "to"}
    parts = [stale(found.get("weights", {})) + records([{**r, "slices": int(r["slices"]), "name": f"{r['group']}, {r['condition']}"} for r in found["slices"]], {"name": "scans, forger", **SCORES, **low_high})]
    regions = {"group": "scans", "places": "forged places", "pd_at_1_percent": "Pd at 1 % false alarms", "same_places_before": "the same places before forging", "auc": "AUC", "region_f1": "F1 of regions", "voxel_f1": "F1 of voxels", "distance_mm": "distance, mm", **low_high}
    parts.append("Regions:\n\n" + records(found["regions"], regions))
    if found.get("controls"):
        parts.append("Controls without a generator: cut out and pasted back, and other harmless handling.\n\n"
                     + table(["scans, control", "called forged", "places"], [[f"{r['group']}, {r['kind']}", share(round(r["mean"] * r["size"]), r["size"]), int(r["size"])] for r in found["controls"]]))
    return "\n\n".join(parts)


def ablations() -> str | None:
    "Ablations and rivals of the detector."
    found = read("cascade-tiny/tables.json")
    if found is None:
        return None
    rows = [{"row": name, **r, "interval": interval(*r["accuracy_interval"]) if r.get("accuracy_interval") else None, "n": len(r.get("seeds", ()))} for name, r in found["rows"].items()]
    return found["about"]["text"] + "\n\n" + records(rows, {"row": "row", "accuracy": "accuracy", "interval": "95 % interval, by scan", "precision": "precision", "recall": "recall", "f1": "F1", "auc": "AUC", "n": "seeds", "slices": "slices", "parameters": "parameters"})


def evaluation(data: str) -> dict | None:
    "What `mits_tables` and benchmarks/arena.py found on some data, or None."
    return read(f"arena-tiny/{data}.json")


def published(content: dict | None) -> str | None:
    "Every table of both papers, ours and theirs."
    if content is None:
        return None
    from mits_nb.evaluate import WEIGHTS as ROLES, table_view

    about = content.get("tables_about") or content["about"]
    used = {ROLES.get(role, role): digest for role, digest in about["weights"].items()}  # tables name roles, the arena names weights
    seen = f" The detector has learnt from {', '.join(about['seen_in_training'])}: its figures there flatter it." if about.get("seen_in_training") else ""
    parts = [stale(used) + f"Measured on: {', '.join(about['scans'])}.{seen}"]
    for t in content["tables"]:
        view = table_view(t)
        heads = ["", *(word for c in view["columns"] for word in (c, "paper")), "n"]
        lines = []
        for line in view["lines"]:
            ours = [c["ours"] + (f" ({c['interval']})" if c.get("interval") else "") + (f" [{c['note']}]" if c.get("note") else "") for c in line["cells"]]
            lines.append([line["name"], *(v for a, c in zip(ours, line["cells"]) for v in (a, c["paper"])), line["n"]])
        notes = [f"[{i}] {mark}." for i, mark in enumerate(view["marks"], 1)] + list(t.get("notes", []))
        parts.append(f"**{t['paper']}, {t['table']}.** {t['title']}\n\n" + table(heads, lines) + ("\n\n" + " ".join(notes) if notes else ""))
    return "\n\n".join(parts)


def arena(content: dict | None) -> str | None:
    "Attackers against protections, as the detector sees them."
    if content is None or "arena" not in content:
        return None
    from mits_nb.evaluate import MEASURES, alarms_view, arena_matrix, gains_view, judges_view

    first = content["arena"]["cells"][0]
    parts = [stale(content["about"]["weights"]) + f"**The arena.** Measured on: {', '.join(content['about']['scans'])}; {first['n']} forged places in {first['patients']} patients for each figure."]
    for measure in ("pd", "fa", "auc", "called", "lost_db", "lesion_gone"):
        attackers, protections, values = arena_matrix(content["arena"], measure)
        title = MEASURES[measure][0]
        parts.append(f"**{title[0].upper()}{title[1:]}.**\n\n" + table(["attacker", *protections], [[a, *(float(v) for v in line)] for a, line in zip(attackers, values)]))
    parts += [f"**{view['title']}.**\n\n" + table(view["columns"], view["rows"]) for view in (gains_view(content["arena"]), alarms_view(content["arena"]))]
    parts += [f"- {finding}" for finding in content["arena"].get("findings", ())]
    if rivals := content.get("rivals"):
        view = judges_view(rivals)
        parts.append(stale(rivals["about"]["weights"]) + f"**{view['title']}.** Networks of [chapter 19](../nbs/19_detect.rivals.ipynb), trained alike and for a short time, beside the shipped cascade and the noise ratio. Measured on: {', '.join(rivals['about']['scans'])}.\n\n" + table(view["columns"], view["rows"]))
    return "\n\n".join(parts)


def render() -> str:
    "The text of docs/results.md."
    parts = [
        "<!-- Rendered by tools/results.py from the JSON files in mits_nb/weights: measure, then `make results`. -->",
        "# Results",
        "> What the shipped networks do today, on phantoms and on scans of patients that they never saw.",
        "Every figure on this page was read from a file that a measurement wrote; none is typed in. The shipped networks are small (preset `tiny`): they teach. "
        "What the papers report is set beside ours in the chapters. `scans` is a folder of real scans as in [chapter 3](../nbs/03_data.ipynb), FOLDER, SETS and RESULTS are yours to choose; what each script measures and how long it takes is in [benchmarks](../benchmarks/README.md). "
        "Intervals are 95 %. With one held-out patient, an interval over places says how sure the figure is for *him*, not for the next one.",
        "## Weights", weights(),
        "## The forger",
        section("Forgeries on scans that the forger never saw", "One training for each real scan, without that scan, and two test phantoms ([chapter 9](../nbs/09_attack.ctgan.ipynb)).", ATTACK, forger()),
        "## The protector",
        section("Cost and effect", "*Lost* is what protection takes from the forged square: the PSNR of the forgery on the unprotected scan less that on the protected one ([chapter 13](../nbs/13_protect.sweep.ipynb)). `pgd` is told the place: the ceiling.", PROTECT, protector()),
        "## The detector",
        section("The shipped weights on held-out scans", "Their card ([chapter 18](../nbs/18_detect.training.ipynb)).", SHIPPED["cascade-tiny"][2].format("FOLDER"), detector_card()),
        section("Forgers met and unmet, regions, controls", "The long measurement ([chapter 18](../nbs/18_detect.training.ipynb)).", DETECT, detection()),
        section("Ablations and rivals", "Each row is trained and tested on the same slices ([chapter 19](../nbs/19_detect.rivals.ipynb)).", TABLES, ablations()),
    ]
    if (ROOT / "mits_nb" / "evaluate.py").is_file():
        parts.append("## Both papers, and the arena")
        parts += [section(f"Every published table, on {word}", "Ours beside the paper's, as one command computes them; then attackers, protections and detectors against each other ([chapter 20](../nbs/20_evaluate.ipynb)).", EVALUATE.format(data=data),
                          "\n\n".join(filter(None, (published(evaluation(data)), arena(evaluation(data))))) or None) for data, word in DATA.items()]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    target, text = ROOT / "docs" / "results.md", render()
    if "--check" in sys.argv:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            print("docs/results.md is out of date: run `make results` and commit")
            return 1
        print("docs/results.md is in step with the measured files")
        return 0
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
