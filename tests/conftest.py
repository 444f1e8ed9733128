"""Shared fixtures: the folder of real scans, and small phantoms that are made once."""
import pytest


@pytest.fixture(scope="session")
def data_dir():
    "Folder of real development scans (variable MITS_DATA, else ../shared/data); tests that need it skip without it."
    from mits_nb.data import data_folder

    folder = data_folder()
    if folder is None:
        pytest.skip("real scans not found: set MITS_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def phantom():
    "A small phantom and its nodules: 24 slices of 160 x 160 pixels."
    from mits_nb.phantom import make_phantom

    return make_phantom(seed=1, shape=(24, 160, 160), spacing=(2.5, 2.2, 2.2))
