"""Clean the notebooks, export the modules, and fail when git then shows a change in either: notebooks are the source."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WATCHED = ["nbs", "mits_nb", "pyproject.toml"]


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)


def main() -> int:
    if git("rev-parse", "--is-inside-work-tree").returncode:
        print("sync check: not a git checkout, nothing to compare with")
        return 1
    tools = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(tools / command)], cwd=ROOT, check=True)
    changed = git("diff", "--exit-code", "--stat", "--", *WATCHED)
    new = git("ls-files", "--others", "--exclude-standard", "--", *WATCHED).stdout
    if changed.returncode or new:
        print("notebooks and modules are out of step; run `make sync` and commit:\n" + changed.stdout + new)
        return 1
    print("sync check: notebooks and modules are in step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
