"Heatmaps: both methods, sizes, geometry, bad input."
import numpy as np
import pytest
import torch

from mits_nb.core import DetectError, UsageError, weights_path
from mits_nb.detect.cnn import Detector
from mits_nb.detect.heatmap import as_slices, dense_heatmaps, ends_in_tissue, heatmap
from mits_nb.detect.windows import grid_mask, grid_shape, to_pixels, window_centres
from mits_nb.phantom import make_phantom
from mits_nb.scan import Scan


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Detector(width=.125).eval()


def noise(*shape): return np.random.default_rng(0).normal(-800, 100, shape).astype(np.float32)


@pytest.mark.parametrize("method", ["dense", "windows"])
@pytest.mark.parametrize("shape", [(32, 32), (2, 40, 64), (1, 70, 51), (1, 33, 47), (1, 96, 96)])
def test_every_size_gives_its_grid(net, shape, method):
    maps = heatmap(noise(*shape), net, method)
    assert maps.shape == (shape[0] if len(shape) == 3 else 1, *grid_shape(shape[-2:])) and maps.dtype == np.float32
    assert (maps[:, ~grid_mask(shape[-2:])] == 0).all() and (maps[:, grid_mask(shape[-2:])] > 0).all() and maps.max() <= 1


def test_a_slice_of_512_gives_121(net):
    maps = heatmap(np.full((512, 512), -900, np.int16), net)
    assert maps.shape == (1, 121, 121) and (maps > 0).sum() == 12477


def test_scan_array_tensor_and_single_slice_agree(net):
    hu = noise(2, 48, 48).round().astype(np.int16)
    a = heatmap(hu, net)
    for other in (Scan(hu, (2.5, .7, .7)), torch.from_numpy(hu), hu.astype(np.float32)): assert np.array_equal(heatmap(other, net), a)
    assert np.allclose(heatmap(hu[1], net)[0], a[1], atol=1e-3)


def test_windows_method_is_the_network_on_each_window(net):
    hu = noise(40, 48)
    maps = heatmap(hu, net, "windows")[0]
    for y, x in window_centres((40, 48))[::3]:
        p = net.probability(torch.from_numpy(hu[None, None, y - 16:y + 16, x - 16:x + 16]))
        assert abs(maps[(y - 16) // 4, (x - 16) // 4] - float(p)) < 2e-3


def test_inspecting_changes_neither_scan_nor_network(net):
    hu = noise(1, 40, 40)
    kept, state = hu.copy(), {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    heatmap(hu, net)
    assert net.training and np.array_equal(hu, kept) and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    net.eval()


def test_a_slice_depends_on_itself_only(net):
    hu = noise(3, 40, 40)
    other = hu.copy()
    other[1] += 300
    a, b = heatmap(hu, net), heatmap(other, net)
    assert np.array_equal(a[[0, 2]], b[[0, 2]]) and not np.array_equal(a[1], b[1])


def test_a_crop_is_judged_like_that_part_of_its_slice(monkeypatch):
    trained = Detector.from_pretrained(weights_path("cascade-tiny") / "detector")
    scan, _ = make_phantom(seed=12, shape=(3, 352, 352), spacing=(2.5, 1., 1.))
    y, x = 84, 172
    whole = dense_heatmaps(scan.hu, trained)[:, y // 4:y // 4 + 13, x // 4:x // 4 + 13]
    crop = scan.hu[:, y:y + 80, x:x + 80]
    assert not ends_in_tissue(scan.hu).any() and ends_in_tissue(crop).all()
    def agreement(): return np.corrcoef(dense_heatmaps(crop, trained).ravel(), whole.ravel())[0, 1]
    continued = agreement()
    monkeypatch.setattr("mits_nb.detect.heatmap.ends_in_tissue", lambda hu: np.zeros(len(hu), bool))
    assert continued > .9 and agreement() < .7  # zeros beyond the border look like a forgery


def test_a_slice_that_ends_in_tissue_beside_one_that_does_not(net):
    hu = np.stack([noise(48, 48), np.full((48, 48), -1000, np.float32)])
    both = dense_heatmaps(hu, net)
    assert ends_in_tissue(hu).tolist() == [True, False] and all(np.allclose(both[i], dense_heatmaps(hu[i:i + 1], net)[0], atol=1e-3) for i in (0, 1))


def test_a_constant_slice_is_fine(net):
    for value in (-3024, -1000, 0, 3000): assert np.isfinite(heatmap(np.full((40, 40), value, np.int16), net)).all()


def test_values_that_are_not_finite_name_the_slice(net):
    hu = noise(3, 40, 40)
    hu[2, 5, 5] = np.nan
    with pytest.raises(DetectError, match="slice 2"): heatmap(hu, net)
    hu[2, 5, 5] = np.inf
    with pytest.raises(DetectError, match="not finite"): heatmap(hu, net)


@pytest.mark.parametrize("bad", [np.zeros((31, 64)), np.zeros((3, 40, 20)), np.zeros(64), np.zeros((2, 2, 40, 40)), np.zeros((0, 40, 40)), np.full((40, 40), "a")])
def test_other_shapes_are_errors(net, bad):
    with pytest.raises(DetectError): heatmap(bad, net)


def test_unknown_method_is_an_error(net):
    with pytest.raises(UsageError, match="unknown method"): heatmap(noise(40, 40), net, "fast")


def test_as_slices_makes_no_copy():
    hu = np.zeros((2, 40, 40), np.int16)
    assert as_slices(hu) is hu and as_slices(hu[0]).base is hu


def test_back_to_pixels():
    cells = np.arange(121 * 121, dtype=np.float32).reshape(121, 121)
    picture = to_pixels(cells, 512)
    for y, x in window_centres()[::977]: assert (picture[y - 2:y + 2, x - 2:x + 2] == cells[(y - 16) // 4, (x - 16) // 4]).all()
    assert (picture[:14] == 0).all() and (picture[-14:] == 0).all()
    with pytest.raises(DetectError): to_pixels(cells, 256)


def test_tensors_of_any_kind_and_ragged_lists():
    hu = np.full((2, 40, 48), -850, np.int16)
    for given in (torch.from_numpy(hu), torch.from_numpy(hu).to(torch.bfloat16), torch.from_numpy(hu).float().requires_grad_()):
        assert as_slices(given).shape == hu.shape and abs(as_slices(given).astype(float) + 850).max() < 4
    with pytest.raises(DetectError, match="different sizes"): as_slices([hu[0], hu[0, :36]])
