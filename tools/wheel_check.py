"""Build the wheel, install it into a fresh environment with the runtime requirements only, import every module and run the commands' help."""
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# run in the fresh environment, away from the checkout
CHECK = """
import importlib, pkgutil, subprocess, sys, time
from pathlib import Path
start = time.perf_counter()
import mits_nb
seconds = time.perf_counter() - start
assert seconds < 1, f"import mits_nb took {seconds:.2f} s"
modules = [m.name for m in pkgutil.walk_packages(mits_nb.__path__, "mits_nb.") if not m.name.split(".")[-1].startswith("_")]
for name in modules: importlib.import_module(name)
assert "site-packages" in mits_nb.__file__, mits_nb.__file__
from mits_nb.core import weights_path
for name in ("ctgan-tiny", "ctgan-zeros-tiny", "mitsgan-tiny", "mitsgan-robust-tiny", "mitsgan-released-tiny", "tafim-tiny", "cascade-tiny", "cyclegan-tiny", "arena-tiny"): weights_path(name, "card.md")
weights_path("mitsgan-sweep", "sweep.npz")
from mits_nb.data import load_manifest
load_manifest("luna16")
from mits_nb.data import published
published("cascade", "Table 4")
for command in ("mits_demo", "mits_tamper", "mits_protect", "mits_detect", "mits_train", "mits_data", "mits_tables"):
    subprocess.run([str(Path(sys.executable).parent / command), "--help"], check=True, stdout=subprocess.DEVNULL)
print(f"wheel check: {len(modules)} modules import, commands answer, weights and manifests are inside")
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        constraints = ROOT / "constraints.txt"
        for first in ("pip==", "torch=="):  # the pip that Python brings may resolve for many minutes what a new one resolves in seconds
            subprocess.run([*pip, next(line for line in constraints.read_text().splitlines() if line.startswith(first))], check=True)
        subprocess.run([*pip, "-c", constraints, wheel], check=True)
        subprocess.run([python, "-c", CHECK], cwd=folder, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
