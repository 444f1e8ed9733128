"""One case per notebook: it runs top to bottom, in a process of its own."""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))


def run(path: Path) -> tuple[bool, float]:
    "Execute one notebook with the flags of settings.ini; real scans are used where they are found."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    from mits_nb.data import data_folder

    skip = set(get_config().tst_flags.split())
    force = {"data"} if data_folder() is not None else set()
    return test_nb(path, skip_flags=skip, force_flags=force, basepath=get_config().config_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capfd):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        passed, seconds = pool.submit(run, path).result()
    assert passed, capfd.readouterr().err[-4000:]
    assert seconds < 300, f"{path.name} took {seconds:.0f} s: a chapter should run in 90 s on two cores"
