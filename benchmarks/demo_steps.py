"""Seconds and memory of every step of the demo chain, each as a share of the whole run, so that machines can be compared.

    python benchmarks/demo_steps.py [--scan PATH] [--repeats 3] [--json FILE]

Each repetition is a process of its own, so that peak memory means what it says.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def one_run(scan: str | None, seed: int) -> dict:
    "metrics.json of one run."
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from mits_nb.cli import mits_demo; sys.exit(mits_demo(sys.argv[1:]))"
        words = ["--out", folder, "--seed", str(seed)] + (["--scan", scan] if scan else [])
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", help="real scan (default: the phantom)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    runs = [one_run(args.scan, 0) for _ in range(args.repeats)]
    steps = {name: statistics.median(run["seconds"][name] for run in runs) for name in runs[0]["seconds"]}
    total = sum(steps.values())
    slices = runs[0]["data"]["shape"][0]
    print(f"{runs[0]['data']['source']}: {slices} slices, {runs[0]['compute']}, median of {len(runs)} runs")
    for name, seconds in steps.items():
        print(f"{name:<17}{seconds:8.2f} s {100 * seconds / total:6.1f} % {1000 * seconds / slices:9.1f} ms a slice")
    print(f"{'total':<17}{total:8.2f} s; peak memory {max(run['peak_rss_mb'] for run in runs):.0f} MB")
    if args.json:
        Path(args.json).write_text(json.dumps({"seconds": steps, "peak_rss_mb": [run["peak_rss_mb"] for run in runs], "data": runs[0]["data"], "versions": runs[0]["versions"]}, indent=1))


if __name__ == "__main__":
    main()
