"""Shared fixtures: the folder of real scans, and small phantoms that are made once."""
import pytest
import torch

from mits_nb.attack.tamper import Equalizer, Tampering, tamper_tensor
from mits_nb.core import torch_rng


class ToyAttacker:
    "The pipeline of chapter 8 around two small frozen networks."

    def __init__(self):
        generator, nets = torch_rng(0, "toy attacker"), []
        for _ in range(2):
            net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 4, stride=4), torch.nn.LeakyReLU(0.2), torch.nn.ConvTranspose3d(2, 1, 16, stride=4, padding=6), torch.nn.Tanh())
            for p in net.parameters():
                p.data = torch.randn(p.shape, generator=generator) * 0.1
                p.requires_grad_(False)
            nets.append(net)
        self.injector, self.remover = nets
        self.settings, self.equalizer = Tampering(), Equalizer().fit(-850 + 60 * torch.randn(5000, generator=generator))

    def tamper_tensor(self, hu, at, spacing, action, noise=None):
        return tamper_tensor(hu, at, spacing, self.injector if action == "inject" else self.remover, self.settings, self.equalizer, noise, action)


@pytest.fixture
def no_bars(monkeypatch):
    "Progress bars appear after two seconds: a test of what a command says must not depend on how busy the machine is."
    monkeypatch.setenv("TQDM_DISABLE", "1")


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
