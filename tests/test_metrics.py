"""Edges and properties of `mits_nb.metrics`: image distances, LPIPS without a network, regions, detection scores, bootstrap."""
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mits_nb import metrics
from mits_nb.core import PlaceError, UsageError, WeightsError, import_torchvision


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    a = random.normal(-600, 300, (3, 40, 48)).round().astype(np.int16)
    return a, (a + random.normal(0, 25, a.shape)).round().astype(np.int16)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    "State dict of a SqueezeNet 1.1 with seeded random weights."
    import torch
    torchvision = import_torchvision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path_factory.mktemp("lpips") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def no_backbone(monkeypatch, tmp_path):
    "Neither variable nor cache nor network."
    monkeypatch.delenv("MITS_LPIPS_BACKBONE", raising=False)
    monkeypatch.setenv("MITS_OFFLINE", "1")
    monkeypatch.setenv("MITS_CACHE", str(tmp_path))
    metrics._fetched_backbone.cache_clear()
    yield
    metrics._fetched_backbone.cache_clear()


# ---------------------------------------------------------------- RMSE, PSNR, SSIM
def test_equal_to_scikit_image(pair):
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
    a, b = (v.astype(float) for v in pair)
    assert metrics.rmse(*pair) == pytest.approx(math.sqrt(mean_squared_error(a, b)), abs=1e-6)
    assert metrics.psnr(*pair, peak=1500) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1500), abs=1e-6)
    assert metrics.ssim(*pair, peak=1500) == pytest.approx(np.mean([structural_similarity(p, q, data_range=1500) for p, q in zip(a, b)]), abs=1e-6)


def test_int16_does_not_overflow():
    a, b = np.full((2, 8, 8), -3024, np.int16), np.full((2, 8, 8), 32000, np.int16)
    assert metrics.rmse(a, b) == 35024
    assert metrics.psnr(a, b, peak=35024) == pytest.approx(0)


@pytest.mark.parametrize("peak", [255.0, 1500.0, 4096.0])
def test_peak_moves_psnr_by_its_logarithm(pair, peak):
    assert metrics.psnr(*pair, peak=2 * peak) - metrics.psnr(*pair, peak=peak) == pytest.approx(20 * math.log10(2))
    assert metrics.rmse(*pair) * 10 ** (metrics.psnr(*pair, peak=peak) / 20) == pytest.approx(peak)


def test_symmetry_and_identity(pair):
    a, b = pair
    assert metrics.rmse(a, b) == metrics.rmse(b, a) and metrics.ssim(a, b) == pytest.approx(metrics.ssim(b, a))
    assert metrics.rmse(a, a) == 0 and metrics.psnr(a, a) == math.inf and metrics.ssim(a, a) == 1


def test_slice_and_volume_agree(pair):
    a, b = pair
    assert metrics.rmse(a[0], b[0]) == metrics.rmse(a[:1], b[:1])
    assert metrics.ssim(a, b) == pytest.approx(np.mean([metrics.ssim(p, q) for p, q in zip(a, b)]))


def test_small_windows():
    a, b = np.zeros((1, 4, 5)), np.ones((1, 4, 5))
    assert 0 < metrics.ssim(a, b) <= 1  # a 3 x 3 window
    with pytest.raises(UsageError, match="3 x 3"): metrics.ssim(a[:, :2], b[:, :2])


@pytest.mark.parametrize("call", [metrics.rmse, metrics.psnr, metrics.ssim, metrics.lpips, metrics.lpips_distance, metrics.fidelity])
def test_bad_shapes(call):
    with pytest.raises(UsageError, match="shapes"): call(np.zeros((3, 40, 40)), np.zeros((2, 40, 40)))
    with pytest.raises(UsageError): call(np.zeros(7), np.zeros(7))
    with pytest.raises(UsageError): call(np.zeros((0, 40, 40)), np.zeros((0, 40, 40)))
    with pytest.raises(UsageError): call(np.zeros((1, 1, 1, 1, 40, 40)), np.zeros((1, 1, 1, 1, 40, 40)))
    with pytest.raises(UsageError, match="types"): call(np.zeros((40, 40), complex), np.zeros((40, 40)))
    with pytest.raises(UsageError, match="types"): call(np.full((40, 40), "x"), np.zeros((40, 40)))


@pytest.mark.parametrize("peak", [0, -1, float("nan")])
def test_bad_peak(pair, peak):
    with pytest.raises(UsageError): metrics.psnr(*pair, peak=peak)
    with pytest.raises(UsageError): metrics.ssim(*pair, peak=peak)


# ---------------------------------------------------------------- batches, tensors, number formats
ALL = [metrics.rmse, metrics.psnr, metrics.ssim]


@pytest.mark.parametrize("call", ALL)
@pytest.mark.parametrize("shape", [(4, 1, 16, 18), (2, 3, 16, 18), (2, 1, 3, 16, 18), (3, 2, 2, 9, 8)])
def test_batches_are_item_by_item(call, shape):
    import torch
    random = np.random.default_rng(shape)
    a, b = random.normal(0, 100, shape), random.normal(0, 100, shape)
    expected = [call(p.reshape(-1, *shape[-2:]), q.reshape(-1, *shape[-2:])) for p, q in zip(a, b)]
    got = call(a, b)
    assert isinstance(got, np.ndarray) and got.shape == (shape[0],) and got == pytest.approx(expected, abs=1e-9)
    tensor = call(torch.from_numpy(a), torch.from_numpy(b))
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (shape[0],) and tensor.numpy() == pytest.approx(expected, abs=1e-9)
    one = call(torch.from_numpy(a[0, 0]), b[0, 0])  # a tensor and an array
    assert one.shape == () and float(one) == pytest.approx(call(a[0, 0], b[0, 0]), abs=1e-9)


@pytest.mark.parametrize("call", [*ALL, metrics.lpips])
def test_chunks_do_not_matter(call, backbone, monkeypatch):
    random = np.random.default_rng(5)
    a, b = random.normal(-600, 200, (2, 7, 40, 40)), random.normal(-600, 200, (2, 7, 40, 40))
    options = {"backbone": backbone} if call is metrics.lpips else {}
    mask = random.random(a.shape) < 0.3
    mask[0, 2:5] = False
    whole = [call(a, b, **options), call(a, b, mask=mask, **options)]
    original = metrics._mean_of_map
    monkeypatch.setattr(metrics, "_mean_of_map", lambda *args, **kw: original(*args, **{**kw, "pixels": 3 * 1600}))
    for expected, got in zip(whole, [call(a, b, **options), call(a, b, mask=mask, **options)]): assert got == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64"])
def test_tensor_formats(dtype):
    import torch
    dtype = getattr(torch, dtype)
    low, high = (-120, 120) if dtype == torch.int8 else (0, 250) if dtype == torch.uint8 else (-1000, 3000)
    a, b = (torch.randint(low, high, (3, 12, 12), generator=torch.Generator().manual_seed(k)).to(dtype) for k in (0, 1))
    p, q = a.double().numpy(), b.double().numpy()
    for call in ALL:
        got = call(a, b)
        assert got.dtype == torch.float64 and float(got) == pytest.approx(call(p, q), abs=1e-9)


def test_halves_do_not_overflow():
    import torch
    a, b = torch.full((1, 1, 8, 8), -3024.0).half(), torch.full((1, 1, 8, 8), 32000.0).half()
    assert metrics.rmse(a, b).item() == 35024 and torch.isfinite(metrics.ssim(a, b)).all()


@pytest.mark.parametrize("dtype", ["float16", ">i2", ">f4", "uint16", "uint8", "bool", "int64", "longdouble"])
def test_array_formats(dtype):
    a, b = (np.random.default_rng(k).integers(0, 2 if dtype == "bool" else 200, (2, 9, 9)).astype(dtype) for k in (0, 1))
    a.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in ALL: assert call(a, b) == pytest.approx(call(a.astype(float), b.astype(float)), abs=1e-9)
    assert metrics.rmse(a[:, ::2, ::-1], b[:, ::2, ::-1]) == metrics.rmse(a[:, ::2].copy(), b[:, ::2].copy())


@pytest.mark.parametrize("call", ALL)
def test_gradients_equal_finite_differences(call):
    import torch
    a, b = (torch.randn(2, 1, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 50 for k in (0, 1))
    mask = torch.rand(2, 1, 9, 10, generator=torch.Generator().manual_seed(2)) < 0.5
    for m in (None, mask): assert torch.autograd.gradcheck(lambda x: call(a, x, mask=m) if call is metrics.rmse else call(a, x, peak=200.0, mask=m), b.clone().requires_grad_(True))


def test_gradient_of_rmse_at_zero_is_zero():
    import torch
    x = torch.ones(1, 1, 8, 8, requires_grad=True)
    metrics.rmse(torch.ones(1, 1, 8, 8), x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_tensors_stay_where_they_are():
    "The meta device computes shapes and devices only: nothing may be pulled to the CPU on the way."
    import torch
    a = torch.zeros(2, 1, 9, 9, device="meta")
    for call in ALL: assert call(a, a).device.type == "meta" and call(a, a).shape == (2,)
    if torch.cuda.is_available():
        b = torch.randn(2, 1, 9, 9)
        for call in ALL: assert call(b.cuda(), b.cuda() + 1).device.type == "cuda" and torch.allclose(call(b.cuda(), b.cuda() + 1).cpu(), call(b, b + 1))


def test_one_peak_for_each_item():
    random = np.random.default_rng(3)
    a, b = random.normal(0, 9, (3, 1, 8, 8)), random.normal(0, 9, (3, 1, 8, 8))
    peaks = [10.0, 100.0, 4096.0]
    assert metrics.psnr(a, b, peaks) == pytest.approx([metrics.psnr(p, q, peak) for p, q, peak in zip(a, b, peaks)])
    with pytest.raises(UsageError, match="each of the 3 items"): metrics.psnr(a, b, peaks[:2])
    with pytest.raises(UsageError, match="positive"): metrics.psnr(a, b, [1.0, 0.0, 1.0])


# ---------------------------------------------------------------- values that are not finite, constant images
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_arrays_that_are_not_finite_are_refused(bad):
    a, b = np.zeros((2, 16, 16)), np.ones((2, 16, 16))
    b[1, 8, 8] = bad
    mask = np.ones(a.shape, bool)
    mask[1, 4:13, 4:13] = False  # wide enough for the windows of SSIM
    for call in ALL:
        with pytest.raises(UsageError, match="not finite"), np.errstate(all="ignore"): call(a, b)
        assert math.isfinite(call(a, b, mask=mask))
    with pytest.raises(UsageError, match="not finite"), np.errstate(all="ignore"): metrics.fidelity(a, b, with_lpips=False)


def test_nan_in_both_is_not_identical():
    a = np.full((1, 16, 16), np.nan)
    for call in ALL:
        with pytest.raises(UsageError, match="not finite"): call(a, a)


def test_tensors_let_nan_through():
    import torch
    a = torch.zeros(2, 1, 8, 8)
    b = torch.ones(2, 1, 8, 8)
    b[1, 0, 3, 3] = math.nan
    for call in ALL:
        got = call(a, b)
        assert torch.isfinite(got[0]) and torch.isnan(got[1])


def test_constant_images():
    a, b = np.full((1, 8, 8), 50.0), np.full((1, 8, 8), 90.0)
    c = 0.01 * 4096
    assert metrics.rmse(a, b) == 40 and metrics.ssim(a, b) == pytest.approx((2 * 50 * 90 + c * c) / (50**2 + 90**2 + c * c))
    assert metrics.ssim(a, a.copy()) == 1 and metrics.psnr(a, a.copy()) == math.inf


def test_ssim_far_from_zero_keeps_its_digits():
    "Variances of small numbers on a large offset: the textbook formula loses them."
    random = np.random.default_rng(0)
    a = random.random((1, 20, 20)); b = a + 0.1 * random.random((1, 20, 20))
    import torch
    p, q = (torch.from_numpy(v) for v in (a, b))
    near, far = metrics.ssim_map(p, q, 1.0), metrics.ssim_map(p + 1e6, q + 1e6, 1.0)
    structure = near / ((2 * (m := _window_means(p)) * (n := _window_means(q)) + 1e-4) / (m**2 + n**2 + 1e-4))
    assert torch.allclose(far, structure, atol=1e-6)  # there the means agree, what is left is structure


def _window_means(p):
    import torch
    return torch.nn.functional.avg_pool2d(p[:, None], 7, 1)[:, 0]


# ---------------------------------------------------------------- regions
def test_masks_by_hand(pair):
    from skimage.metrics import structural_similarity
    a, b = pair
    mask = np.zeros(a.shape, bool)
    mask[1, 10:20, 10:25], mask[2, 5:9, 40:] = True, True
    difference = (a.astype(float) - b)[mask]
    assert metrics.rmse(a, b, mask) == pytest.approx(math.sqrt((difference**2).mean()), abs=1e-6)
    assert metrics.psnr(a, b, 1500, mask) == pytest.approx(20 * math.log10(1500 / math.sqrt((difference**2).mean())), abs=1e-6)
    maps = np.stack([structural_similarity(p.astype(float), q.astype(float), data_range=4096, full=True)[1] for p, q in zip(a, b)])
    centres = mask.copy()
    centres[:, :3] = centres[:, -3:] = centres[:, :, :3] = centres[:, :, -3:] = False
    assert metrics.ssim(a, b, mask=mask) == pytest.approx(maps[centres].mean(), abs=1e-6)
    assert metrics.hu_range(a, mask) == np.ptp(np.maximum(a, -1024)[mask])


@pytest.mark.parametrize("call", ALL)
def test_a_full_mask_changes_nothing(pair, call):
    import torch
    assert call(*pair, mask=np.ones(pair[0].shape, bool)) == pytest.approx(call(*pair), rel=1e-12)
    assert call(*pair, mask=np.ones(pair[0].shape[1:], bool)) == pytest.approx(call(*pair), rel=1e-12)  # one mask for all slices
    assert call(*pair, mask=torch.ones(pair[0].shape, dtype=torch.bool)) == pytest.approx(call(*pair), rel=1e-12)


def test_a_cut_and_its_mask_agree_where_maps_are_local(pair):
    a, b = pair
    cut = metrics.square((1, 20, 20), a.shape, 16)
    mask = metrics.box_mask(cut, a.shape)
    assert metrics.rmse(a, b, mask) == pytest.approx(metrics.rmse(a[cut], b[cut]), rel=1e-12)
    outside = b.copy()
    outside[~mask] = 3000
    assert metrics.rmse(a, outside, mask) == metrics.rmse(a, b, mask)


@pytest.mark.parametrize("call", [*ALL, metrics.lpips, metrics.lpips_distance, metrics.fidelity])
def test_bad_masks(call, pair, backbone):
    options = {"backbone": backbone} if call in (metrics.lpips, metrics.lpips_distance, metrics.fidelity) else {}
    with pytest.raises(UsageError, match="empty"): call(*pair, mask=np.zeros(pair[0].shape, bool), **options)
    with pytest.raises(UsageError, match="does not fit"): call(*pair, mask=np.ones((3, 40, 47), bool), **options)
    with pytest.raises(UsageError, match="True and False"): call(*pair, mask=np.ones(pair[0].shape), **options)
    border = np.zeros(pair[0].shape, bool)
    border[:, :3] = True
    if call is metrics.ssim:
        with pytest.raises(UsageError, match="within 3 pixels of the edge"): call(*pair, mask=border)


def test_an_item_without_a_region_is_named_empty():
    a, mask = np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 8, 8), bool)
    mask[0] = True
    with pytest.raises(UsageError, match="empty"): metrics.rmse(a, a + 1, mask)


def test_ring_by_hand():
    mask = np.zeros((2, 9, 9), bool)
    mask[0, 3:6, 3:6] = True
    around = metrics.ring(mask, 2)
    assert not around[1].any() and around[0].sum() == 49 - 9 and not (around & mask).any() and around[0, 1, 1] and not around[0, 0, 0]
    assert np.array_equal(metrics.ring(mask[0], 2), around[0])
    corner = np.zeros((5, 5), bool)
    corner[0, 0] = True
    assert metrics.ring(corner, 1).sum() == 3
    assert not metrics.ring(np.ones((4, 4), bool), 3).any() and not metrics.ring(np.zeros((4, 4), bool), 3).any()


@pytest.mark.parametrize("mask, width", [(np.ones((4, 4)), 1), (np.ones(4, bool), 1), (np.ones((4, 4), bool), 0)])
def test_bad_rings(mask, width):
    with pytest.raises(UsageError): metrics.ring(mask, width)


def test_box_outside():
    with pytest.raises(PlaceError): metrics.box_mask(np.s_[5:6, 0:3, 0:3], (4, 8, 8))


def test_by_region(pair, backbone):
    a, b = pair
    forged = a.copy()
    box = metrics.square((1, 20, 20), a.shape, 12)
    forged[box] = b[box]
    got = metrics.fidelity_by_region(a, forged, box, width=4, with_lpips=False)
    assert set(got) == {"whole", "square", "ring"} and got["ring"]["note"] == "identical" and got["ring"]["ssim"] < 1
    assert got["square"] == metrics.fidelity(a[box], b[box], with_lpips=False)
    assert got["whole"]["rmse_hu"] == pytest.approx(got["square"]["rmse_hu"] * math.sqrt(144 / a.size))
    mask = metrics.ring(metrics.box_mask(box, a.shape), 4)
    ring = metrics.fidelity_by_region(a, b, box, width=4, backbone=backbone)["ring"]
    assert ring["rmse_hu"] == pytest.approx(metrics.rmse(a, b, mask)) and ring["lpips"] == pytest.approx(metrics.lpips(a, b, backbone, mask), abs=1e-7)
    assert metrics.fidelity_by_region(a[:1], b[:1], np.s_[0:1, 0:40, 0:48], with_lpips=False)["ring"] is None
    json.dumps(got, allow_nan=False)
    with pytest.raises(UsageError): metrics.fidelity_by_region(a[0], b[0], box)


# ---------------------------------------------------------------- LPIPS
def package(backbone, **options):
    "The `lpips` package itself, with its own way to its linear layers, and the given backbone put into it."
    import torch
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        import_torchvision()
        import lpips
        model = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False, **options)
    features = torch.load(backbone, weights_only=True)
    model.net.load_state_dict({name: features["features." + name.split(".", 1)[1]] for name in model.net.state_dict()})
    return model


def pictures(*arrays):
    import torch
    return [torch.from_numpy(np.clip((v.astype(np.float32) + 600) / 750, -1, 1))[:, None].repeat(1, 3, 1, 1) for v in arrays]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (40, 48), (128, 96)])
def test_lpips_equals_the_package(size, backbone):
    import torch
    random = np.random.default_rng(size)
    a = random.normal(-600, 300, (3, *size)).round().astype(np.int16)
    b = (a + random.normal(0, 60, a.shape)).round().astype(np.int16)
    with torch.inference_mode(): expected = package(backbone)(*pictures(a, b)).flatten().numpy()
    assert expected.min() > 1e-3  # the tolerance means something
    assert metrics.lpips(a, b, backbone) == pytest.approx(expected.mean(), abs=1e-6)
    assert metrics.lpips(a[:, None], b[:, None], backbone) == pytest.approx(expected, abs=1e-6)
    assert metrics.lpips_distance(a, b, backbone) == (pytest.approx(expected.mean(), abs=1e-6), None)


def test_lpips_of_a_region_equals_the_package(pair, backbone):
    import torch
    a, b = pair
    mask = np.zeros(a.shape, bool)
    mask[0, 5:20, 7:30], mask[2, 1:4] = True, True
    with torch.inference_mode(): expected = package(backbone, spatial=True)(*pictures(a, b))[:, 0].numpy()
    assert metrics.lpips(a, b, backbone, mask) == pytest.approx(expected[mask].mean(), abs=1e-6)
    assert metrics.lpips_distance(a, b, backbone, mask=mask)[0] == pytest.approx(expected[mask].mean(), abs=1e-6)
    assert metrics.lpips(a, b, backbone, np.ones(a.shape, bool)) == pytest.approx(expected.mean(), abs=1e-6)


def test_lpips_gradient_equals_the_package_and_differences(pair, backbone):
    import torch
    a, b = pictures(*pair)
    b.requires_grad_(True)
    package(backbone)(a, b).mean().backward()
    x = torch.from_numpy(pair[1].astype(np.float32)).requires_grad_(True)
    metrics.lpips(torch.from_numpy(pair[0].astype(np.float32)), x, backbone).backward()
    inside = torch.from_numpy((pair[1] > -1350) & (pair[1] < 150))
    assert torch.allclose(x.grad[inside], b.grad.sum(1)[inside] / 750, rtol=1e-3, atol=1e-9) and x.grad[inside].abs().max() > 1e-7
    assert not x.grad[~inside].any()  # outside the window nothing moves


def test_lpips_gradient_is_finite_on_constant_images(backbone):
    import torch
    x = torch.full((1, 1, 32, 32), -600.0, requires_grad=True)
    for other in (x.detach().clone(), torch.full_like(x, -900.0)):
        metrics.lpips(other, x, backbone).sum().backward()
        assert torch.isfinite(x.grad).all()


def test_unit_features_equal_the_package_and_have_a_gradient_at_zero():
    import torch
    features = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    features[0, :, 1, 1] = 0
    features.requires_grad_(True)
    unit = metrics._unit(features)
    assert torch.equal(unit.detach(), features.detach() / (features.detach().square().sum(1, keepdim=True).sqrt() + 1e-10))
    unit.square().sum().backward()  # the package's own formula gives NaN here
    assert torch.isfinite(features.grad).all() and not features.grad[0, :, 1, 1].any()


def test_lpips_trains_after_a_first_call_in_inference_mode(pair, backbone):
    import torch
    metrics._lpips_net.cache_clear()
    a, b = (torch.from_numpy(v.astype(np.float32)) for v in pair)
    with torch.inference_mode(): first = metrics.lpips(a, b, backbone)
    b.requires_grad_(True)
    again = metrics.lpips(a, b, backbone)
    again.backward()
    assert first.item() == again.item() and b.grad.any()


def test_lpips_ignores_autocast(pair, backbone):
    import torch
    a, b = (torch.from_numpy(v.astype(np.float32)) for v in pair)
    expected = metrics.lpips(a, b, backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(metrics.lpips(a, b, backbone), expected)


def test_lpips_stages_compute_what_torchvision_computes(backbone):
    import torch
    stages, weights = metrics._lpips_net(str(backbone), backbone.stat().st_mtime_ns, "cpu")
    with torch.random.fork_rng(devices=[]): net = import_torchvision().models.squeezenet1_1(weights=None).eval()
    net.load_state_dict(torch.load(backbone, weights_only=True))
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        found = x
        for stop, stage, weight in zip((2, 5, 8, 10, 11, 12, 13), stages, weights, strict=True):
            found = stage(found)
            assert torch.equal(net.features[:stop](x), found) and weight.shape == (1, found.shape[1], 1, 1)
    assert not any(p.requires_grad for stage in stages for p in stage.parameters())


def test_lpips_is_quiet_and_leaves_random_streams_alone(pair, backbone, capsys, recwarn):
    import torch
    metrics._lpips_net.cache_clear()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    metrics.lpips_distance(*pair, backbone)
    assert torch.equal(torch.rand(3), expected)
    assert capsys.readouterr().out == "" and not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_lpips_zero_cases_and_sampling(pair, backbone):
    a, b = pair
    assert metrics.lpips_distance(a, a, backbone) == (0.0, None)
    bone = a.copy()
    bone[0, :9], c = 500, None
    c = bone.copy()
    c[0, :9] = 900  # both white in the lung window
    assert metrics.lpips_distance(bone, c, backbone) == (0.0, None)
    one = a.copy()
    one[1] = b[1]
    whole, single = metrics.lpips_distance(a, one, backbone)[0], metrics.lpips_distance(a[1], b[1], backbone)[0]
    assert whole == pytest.approx(single / 3)
    repeated, other = np.stack([a[0]] * 6), np.stack([b[0]] * 6)
    assert metrics.lpips_distance(repeated, other, backbone, max_slices=2)[0] == pytest.approx(metrics.lpips_distance(a[0], b[0], backbone)[0])


def test_lpips_says_what_to_do_without_weights(pair, no_backbone, monkeypatch, tmp_path):
    with pytest.raises(WeightsError, match="set MITS_LPIPS_BACKBONE"): metrics.lpips(*pair)
    with pytest.raises(WeightsError, match="set MITS_LPIPS_BACKBONE"): metrics.lpips_backbone()
    monkeypatch.setenv("MITS_LPIPS_BACKBONE", str(tmp_path / "none.pth"))
    with pytest.raises(WeightsError, match="none.pth"): metrics.lpips(*pair)


def test_lpips_takes_the_official_file_from_the_cache_by_its_checksum(pair, backbone, no_backbone, monkeypatch, tmp_path):
    import hashlib
    from mits_nb import data
    kept = tmp_path / "squeezenet" / metrics.BACKBONE
    kept.parent.mkdir()
    kept.write_bytes(backbone.read_bytes())
    with pytest.raises(WeightsError): metrics.lpips(*pair)  # not the official bytes, and no network
    right = hashlib.sha256(kept.read_bytes()).hexdigest()
    manifest = data.load_manifest("squeezenet")
    assert manifest["files"][0]["sha256"] == metrics.BACKBONE_SHA256 and manifest["files"][0]["name"] == metrics.BACKBONE
    manifest["files"][0]["sha256"] = right
    monkeypatch.setattr(data, "load_manifest", lambda name: manifest)
    monkeypatch.setattr(metrics, "BACKBONE_SHA256", right)
    metrics._fetched_backbone.cache_clear()
    assert metrics.lpips(*pair) == metrics.lpips(*pair, backbone)


def test_lpips_without_weights(pair, no_backbone):
    value, reason = metrics.lpips_distance(*pair)
    assert value is None and reason == metrics.NO_BACKBONE
    assert metrics.lpips_distance(*pair) == (value, reason)
    result = metrics.fidelity(*pair)
    assert result["lpips"] is None and result["lpips_reason"] == reason and result["rmse_hu"] > 0


def test_lpips_tries_the_network_once(pair, no_backbone, monkeypatch):
    calls = []
    def refuse(*args, **kwargs):
        calls.append(args)
        raise metrics.DataError("no network in this test: none needed")
    monkeypatch.setattr(metrics, "fetch", refuse)
    for _ in range(3): assert metrics.lpips_distance(*pair)[0] is None
    assert len(calls) == 1


def test_lpips_variable(pair, backbone, no_backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("MITS_LPIPS_BACKBONE", str(backbone))
    assert metrics.lpips_distance(*pair) == metrics.lpips_distance(*pair, backbone)
    monkeypatch.setenv("MITS_LPIPS_BACKBONE", str(tmp_path / "none.pth"))
    value, reason = metrics.lpips_distance(*pair)
    assert value is None and reason == metrics.BAD_BACKBONE and str(tmp_path) not in reason


def test_lpips_bad_argument(pair, backbone, tmp_path):
    import torch
    with pytest.raises(WeightsError, match="no LPIPS backbone"): metrics.lpips_distance(*pair, tmp_path / "none.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(WeightsError, match="cannot be read"): metrics.lpips_distance(*pair, tmp_path / "junk.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(WeightsError, match="cannot be read"): metrics.lpips_distance(*pair, tmp_path / "junk.safetensors")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="no SqueezeNet"): metrics.lpips_distance(*pair, tmp_path / "other.pth")
    (tmp_path / metrics.BACKBONE).write_bytes(backbone.read_bytes())
    with pytest.raises(WeightsError, match="sha256"): metrics.lpips_distance(*pair, tmp_path / metrics.BACKBONE)


def test_lpips_refuses_pickled_code(pair, tmp_path):
    import torch

    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError): metrics.lpips_distance(*pair, tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def test_lpips_too_small(backbone):
    assert metrics.lpips_distance(np.zeros((31, 64)), np.ones((31, 64)), backbone) == (None, metrics.TOO_SMALL)
    assert metrics.lpips_distance(np.zeros((32, 32)), np.full((32, 32), -900.0), backbone)[0] > 0


# ---------------------------------------------------------------- fidelity and square
KEYS = {"rmse_hu", "psnr_4096_db", "psnr_range_db", "range_hu", "ssim", "lpips", "lpips_reason", "note"}


def test_fidelity_matches_its_parts(pair):
    a, b = pair
    result = metrics.fidelity(a, b, with_lpips=False)
    assert set(result) == KEYS and result["note"] is None
    assert result["rmse_hu"] == metrics.rmse(a, b) and result["ssim"] == metrics.ssim(a, b)
    assert result["psnr_4096_db"] == pytest.approx(metrics.psnr(a, b, 4096))
    span = max(int(a.max()), -1024) - max(int(a.min()), -1024)
    assert result["range_hu"] == span and result["psnr_range_db"] == pytest.approx(metrics.psnr(a, b, span))
    assert result["lpips"] is None and result["lpips_reason"] == metrics.NOT_ASKED


def test_fidelity_fits_json(pair):
    a, b = pair
    flat = np.full((1, 40, 40), -850, np.int16)
    for x, y, note in ((a, a, "identical"), (flat, flat + 1, "flat reference"), (a.astype(np.float32), b.astype(np.float32), None), (a[0], b[0], None)):
        result = metrics.fidelity(x, y, with_lpips=False)
        assert set(result) == KEYS and result["note"] == note
        json.dumps(result, allow_nan=False)
    assert metrics.fidelity(a, a, with_lpips=False)["psnr_4096_db"] is None
    assert metrics.fidelity(flat, flat + 1, with_lpips=False)["psnr_range_db"] is None


def test_padding_does_not_widen_the_range(pair):
    a, b = pair
    padded = a.copy()
    padded[:, :4] = -3024
    assert metrics.fidelity(padded, padded, with_lpips=False)["range_hu"] == int(padded.max()) + 1024


@pytest.mark.parametrize("at", [(0, 0, 0), (3, 20, 30), (9, 99, 119), (5, 16, 104)])
def test_square_lies_inside_and_around(at):
    z, y, x = metrics.square(at, (10, 100, 120))
    assert z == slice(at[0], at[0] + 1) and y.stop - y.start == x.stop - x.start == 32
    assert 0 <= y.start <= at[1] < y.stop <= 100 and 0 <= x.start <= at[2] < x.stop <= 120


def test_square_in_the_middle_and_in_small_slices():
    assert metrics.square((1, 50, 60), (3, 100, 100)) == (slice(1, 2), slice(34, 66), slice(44, 76))
    assert metrics.square(np.array([0, 3, 3]), (1, 8, 100))[1] == slice(0, 8)


@pytest.mark.parametrize("at", [(-1, 0, 0), (10, 0, 0), (0, 100, 0), (0, 0, 120), (0, 0)])
def test_square_outside(at):
    with pytest.raises(PlaceError, match="outside the volume"): metrics.square(at, (10, 100, 120))


# ---------------------------------------------------------------- detection
def test_classification_by_hand():
    got = metrics.classification([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0])
    assert (got["tp"], got["fp"], got["tn"], got["fn"]) == (2, 1, 4, 1)
    assert got["accuracy"] == 6 / 8 and got["precision"] == got["recall"] == got["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("truth, predicted", [([0, 0], [0, 0]), ([1, 1], [0, 0]), ([0, 0], [1, 1])])
def test_classification_without_a_denominator(truth, predicted):
    got = metrics.classification(truth, predicted)
    assert got["precision"] == got["recall"] == got["f1"] == 0.0
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize("seed", range(8))
def test_ranking_scores_equal_scikit_learn(seed):
    from sklearn.metrics import roc_auc_score, roc_curve
    random = np.random.default_rng(seed)
    n = int(random.integers(5, 400))
    truth = np.r_[True, False, random.random(n) < 0.3]
    scores = random.normal(truth * 1.0, 1).round(int(random.integers(0, 3)))  # with ties
    assert metrics.roc_auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    for fa in (0, 0.01, 0.1, 0.5, 1): assert metrics.pd_at_fa(scores, truth, fa) == pytest.approx(tpr[fpr <= fa + 1e-12].max(), abs=1e-12)


def test_ranking_extremes():
    assert metrics.roc_auc([3, 4, 1, 2], [1, 1, 0, 0]) == 1 and metrics.roc_auc([1, 2, 3, 4], [1, 1, 0, 0]) == 0
    assert metrics.roc_auc([5, 5, 5], [1, 0, 0]) == 0.5
    assert metrics.pd_at_fa([5, 5, 5], [1, 0, 0]) == 0


@pytest.mark.parametrize("scores, truth", [([1, 2], [1, 1]), ([1, 2], [0, 0]), ([1, float("nan")], [1, 0]), ([1, 2, 3], [1, 0]), ([], [])])
def test_ranking_bad_input(scores, truth):
    with pytest.raises(UsageError): metrics.roc_auc(scores, truth)
    with pytest.raises(UsageError): metrics.pd_at_fa(scores, truth)


@pytest.mark.parametrize("fa", [-0.1, 1.1])
def test_bad_false_alarm_rate(fa):
    with pytest.raises(UsageError): metrics.pd_at_fa([1, 2], [0, 1], fa)


def test_threshold_of_false_alarms():
    assert metrics.threshold_at_fa(np.r_[np.zeros(99), .5]) == 0  # one of a hundred may alarm
    assert metrics.threshold_at_fa(np.r_[np.zeros(98), .5]) == .5  # 0.99 of a case may not
    assert metrics.threshold_at_fa([1, 2, 3], 1.) == -np.inf and metrics.threshold_at_fa([3, 1, 2], 0.) == 3
    for bad in (([], .01), ([1.], 2.), ([1.], -.1)):
        with pytest.raises(UsageError): metrics.threshold_at_fa(*bad)


def test_iou():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert metrics.iou(a, b) == 1
    a[:2] = True
    assert metrics.iou(a, b) == 0 and metrics.iou(a, a) == 1
    b[1:3] = True
    assert metrics.iou(a, b) == metrics.iou(b, a) == pytest.approx(1 / 3)
    with pytest.raises(UsageError): metrics.iou(a, b[:2])


def test_match_regions():
    truth = [(0, 0, 0), (50, 0, 0)]
    got = metrics.match_regions([(1, 0, 0), (2, 0, 0), (49, 0, 0), (0, 90, 0)], truth)
    assert (got["tp"], got["fp"], got["fn"]) == (2, 2, 0)
    assert [(i, j) for i, j, _ in got["pairs"]] == [(0, 0), (2, 1)]
    assert metrics.match_regions([], truth) | {"pairs": None} == {"tp": 0, "fp": 0, "fn": 2, "precision": 0.0, "recall": 0.0, "f1": 0.0, "pairs": None}
    assert metrics.match_regions([(0, 0, 0)], [])["fp"] == 1
    assert metrics.match_regions([(16, 0, 0)], truth)["tp"] == 1 and metrics.match_regions([(16.1, 0, 0)], truth)["tp"] == 0


def test_confusion_equals_scikit_learn():
    from sklearn.metrics import confusion_matrix
    random = np.random.default_rng(0)
    truth, said = random.random(99) < 0.3, random.random(99) < 0.5
    assert (metrics.confusion(truth, said) == confusion_matrix(truth, said)).all()
    assert (metrics.confusion([1, 1], [1, 1]) == [[0, 0], [0, 2]]).all()


@pytest.mark.parametrize("bad", [0.3, 2, -1, float("nan")])
def test_probabilities_are_not_decisions(bad):
    with pytest.raises(UsageError, match="threshold"): metrics.classification([0, 1], [1, bad])
    with pytest.raises(UsageError, match="threshold"): metrics.roc_auc([0.1, 0.2], [1, bad])
    with pytest.raises(UsageError, match="threshold"): metrics.iou([0, 1], [1, bad])


def test_labels_may_be_tensors():
    import torch
    truth, scores = torch.tensor([1, 0, 1, 0]), torch.tensor([0.9, 0.1, 0.4, 0.6], requires_grad=True)
    assert metrics.roc_auc(scores, truth) == 0.75 and metrics.classification(truth, scores > 0.5)["accuracy"] == 0.5


@pytest.mark.parametrize("seed", range(6))
def test_roc_curve_equals_scikit_learn(seed):
    from sklearn.metrics import roc_curve
    random = np.random.default_rng(seed)
    truth = np.r_[True, False, random.random(60) < 0.4]
    scores = random.normal(truth * 1.0, 1).round(seed % 3)  # with ties
    for mine, theirs in zip(metrics.roc_curve(scores, truth), roc_curve(truth, scores, drop_intermediate=False), strict=True): assert mine == pytest.approx(theirs, abs=1e-12)
    fa, pd, thresholds = metrics.roc_curve(scores, truth)
    for a, p, t in zip(fa, pd, thresholds): assert ((scores >= t) & truth).sum() == pytest.approx(p * truth.sum()) and ((scores >= t) & ~truth).sum() == pytest.approx(a * (~truth).sum())


def test_localisation_edges():
    empty, one = np.zeros((3, 3), bool), np.eye(3, dtype=bool)
    assert set(metrics.localisation(empty, empty).values()) == {1.0}
    assert set(metrics.localisation(one, empty).values()) == {0.0} and set(metrics.localisation(empty, one).values()) == {0.0}
    with pytest.raises(UsageError, match="shapes"): metrics.localisation(one, one[:2])


@pytest.mark.parametrize("found, truth, mm", [([(0, 0)], [(0, 0, 0)], 16), ([0, 0, 0], [(0, 0, 0)], 16), ([(0, 0, np.nan)], [(0, 0, 0)], 16), ([(0, 0, 0)], [(0, 0, 0)], -1), ([(0, 0, 0)], [(0, 0, 0)], np.nan)])
def test_match_regions_bad_input(found, truth, mm):
    with pytest.raises(UsageError): metrics.match_regions(found, truth, mm)


def test_match_regions_nothing_at_all():
    got = metrics.match_regions([], [])
    assert (got["tp"], got["fp"], got["fn"], got["f1"], got["pairs"]) == (0, 0, 0, 0.0, [])


# ---------------------------------------------------------------- bootstrap
def test_bootstrap_equals_scipy_for_one_case_each():
    from scipy.stats import bootstrap
    values = np.random.default_rng(0).normal(0, 1, 17)
    for level in (0.5, 0.95):
        got = metrics.bootstrap_ci(np.mean, np.arange(17), values, level=level, resamples=321, seed=5)
        library = bootstrap((values,), np.mean, n_resamples=321, confidence_level=level, method="percentile", rng=np.random.default_rng(5)).confidence_interval
        assert (got["low"], got["high"]) == pytest.approx(tuple(library), abs=1e-9) and got["value"] == values.mean()


def test_bootstrap_draws_whole_patients():
    "Each patient has one value, ten times: resampling patients must see as much spread as one case each, whatever the order of the rows."
    names = np.array([f"patient {k}" for k in range(9)])
    values = np.random.default_rng(1).normal(0, 1, 9)
    single = metrics.bootstrap_ci(np.mean, names, values, resamples=200)
    order = np.random.default_rng(2).permutation(90)
    many = metrics.bootstrap_ci(np.mean, np.repeat(names, 10)[order], np.repeat(values, 10)[order], resamples=200)
    assert (many["low"], many["high"], many["value"]) == pytest.approx((single["low"], single["high"], single["value"])) and many["patients"] == 9
    seen = []
    metrics.bootstrap_ci(lambda who: seen.append(np.unique(who, return_counts=True)[1]) or 0.0, np.repeat(names, 10), np.repeat(np.arange(9), 10), resamples=20)
    assert all((counts % 10 == 0).all() for counts in seen)


def test_bootstrap_is_reproducible_and_fits_json():
    who, scores, truth = np.arange(40) // 4, np.arange(40) % 7, np.arange(40) % 3 == 0
    first, again, other = (metrics.bootstrap_ci(metrics.roc_auc, who, scores, truth, resamples=50, seed=s) for s in (1, 1, 2))
    assert first == again != other and first["low"] <= first["value"] <= first["high"]
    json.dumps(first, allow_nan=False)


def test_bootstrap_skips_draws_of_one_class():
    who, truth = np.arange(6), np.array([1, 0, 0, 0, 0, 0])
    got = metrics.bootstrap_ci(metrics.roc_auc, who, np.arange(6), truth, resamples=300)
    assert 60 < got["skipped"] < 150  # (5/6)^6 = 33 % have no tampered patient
    with pytest.raises(UsageError): metrics.bootstrap_ci(metrics.roc_auc, who, np.arange(6), np.zeros(6))
    with pytest.raises(UsageError, match="could not be scored"): metrics.bootstrap_ci(metrics.roc_auc, who // 3, np.arange(6), truth, resamples=1, seed=next(
        s for s in range(99) if len(set(np.random.default_rng(s).integers(0, 2, 2))) == 1 and np.random.default_rng(s).integers(0, 2, 2)[0] == 1))


@pytest.mark.parametrize("patients, arrays, options", [
    (np.zeros(5), [np.arange(5)], {}), ([], [[]], {}), (np.arange(5), [np.arange(4)], {}), (np.arange(5), [], {}), (np.zeros((5, 1)), [np.arange(5)], {}),
    (np.arange(5), [np.arange(5)], {"level": 1}), (np.arange(5), [np.arange(5)], {"level": 0}), (np.arange(5), [np.arange(5)], {"resamples": 0})])
def test_bootstrap_bad_input(patients, arrays, options):
    with pytest.raises(UsageError): metrics.bootstrap_ci(np.mean, patients, *arrays, **options)


# ---------------------------------------------------------------- properties
hu = st.integers(-2048, 3071)
fast = settings(max_examples=40, deadline=None)
shapes = hnp.array_shapes(min_dims=2, max_dims=3, min_side=3, max_side=9)


@st.composite
def two_images(draw):
    shape = draw(shapes)
    return tuple(draw(hnp.arrays(np.int16, shape, elements=hu)) for _ in range(2))


@fast
@given(two_images())
def test_property_distances(images):
    a, b = images
    e, s = metrics.rmse(a, b), metrics.ssim(a, b)
    assert e == metrics.rmse(b, a) and s == pytest.approx(metrics.ssim(b, a), abs=1e-9) and -1 - 1e-9 <= s <= 1 + 1e-9
    assert (e == 0) == np.array_equal(a, b) == (metrics.psnr(a, b) == math.inf)
    assert e <= np.abs(a.astype(int) - b).max() + 1e-9 and e >= np.abs(a.astype(float) - b).mean() - 1e-9
    for flip in (np.s_[..., ::-1], np.s_[..., ::-1, :]): assert metrics.rmse(a[flip], b[flip]) == pytest.approx(e) and metrics.ssim(a[flip], b[flip]) == pytest.approx(s, abs=1e-9)


@fast
@given(two_images(), st.integers(-5000, 5000), st.integers(1, 40), st.floats(1, 1e5))
def test_property_invariances(images, offset, factor, peak):
    a, b = (v.astype(float) for v in images)
    assert metrics.rmse(a + offset, b + offset) == pytest.approx(metrics.rmse(a, b))
    assert metrics.rmse(a * factor, b * factor) == pytest.approx(factor * metrics.rmse(a, b))
    assert metrics.ssim(a * factor, b * factor, peak * factor) == pytest.approx(metrics.ssim(a, b, peak), abs=1e-9)
    if (e := metrics.rmse(a, b)): assert metrics.psnr(a, b, peak) == pytest.approx(20 * math.log10(peak / e), abs=1e-9)


@fast
@given(two_images(), st.floats(0.01, 0.99))
def test_property_nearer_is_better(images, t):
    a, b = (v.astype(float) for v in images)
    between = a + t * (b - a)
    assert metrics.rmse(a, between) == pytest.approx(t * metrics.rmse(a, b), abs=1e-6)
    if not np.array_equal(a, b): assert metrics.psnr(a, between) > metrics.psnr(a, b)


@fast
@given(two_images(), st.integers(0, 2**32))
def test_property_a_mean_lies_between_its_parts(images, seed):
    a, b = images
    mask = np.random.default_rng(seed).random(a.shape) < 0.5
    if not mask.any() or mask.all(): return
    inside, outside, share = metrics.rmse(a, b, mask), metrics.rmse(a, b, ~mask), mask.mean()
    assert metrics.rmse(a, b) ** 2 == pytest.approx(share * inside**2 + (1 - share) * outside**2)


cases = st.integers(2, 40).flatmap(lambda n: st.tuples(hnp.arrays(int, n, elements=st.integers(-4, 4)), hnp.arrays(bool, n)))


@fast
@given(cases)
def test_property_ranking(case):
    scores, truth = case
    if truth.all() or not truth.any(): return
    auc, (fa, pd, _) = metrics.roc_auc(scores, truth), metrics.roc_curve(scores, truth)
    assert 0 <= auc <= 1 and auc == pytest.approx(np.trapezoid(pd, fa) if hasattr(np, "trapezoid") else np.trapz(pd, fa))
    assert metrics.roc_auc(-scores, truth) == pytest.approx(1 - auc) and metrics.roc_auc(scores, ~truth) == pytest.approx(1 - auc)
    assert metrics.roc_auc(np.exp(scores), truth) == pytest.approx(auc)  # only the order counts
    assert (np.diff(fa) >= 0).all() and (np.diff(pd) >= 0).all() and (fa[0], pd[0], fa[-1], pd[-1]) == (0, 0, 1, 1)
    rates = [metrics.pd_at_fa(scores, truth, x) for x in np.linspace(0, 1, 11)]
    assert (np.diff(rates) >= 0).all() and rates[-1] == 1 and rates[0] == pd[fa == 0].max()


@fast
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(hnp.arrays(bool, n), hnp.arrays(bool, n))))
def test_property_counts(case):
    truth, said = case
    got, swapped = metrics.classification(truth, said), metrics.classification(said, truth)
    assert got["tp"] + got["fp"] + got["tn"] + got["fn"] == len(truth) and all(0 <= got[k] <= 1 for k in ("accuracy", "precision", "recall", "f1"))
    assert got["f1"] == swapped["f1"] and got["precision"] == swapped["recall"]
    assert min(got["precision"], got["recall"]) - 1e-12 <= got["f1"] <= max(got["precision"], got["recall"]) + 1e-12
    place = metrics.localisation(truth, said)
    assert place["f1"] == pytest.approx(2 * place["iou"] / (1 + place["iou"])) and place["iou"] <= place["f1"]
    if truth.any() or said.any(): assert place["f1"] == got["f1"]


centres = st.lists(st.tuples(*[st.integers(0, 40)] * 3), max_size=7)


@fast
@given(centres, centres, st.integers(0, 30))
def test_property_matching(found, truth, mm):
    from scipy.optimize import linear_sum_assignment
    got = metrics.match_regions(found, truth, mm)
    assert got["tp"] + got["fp"] == len(found) and got["tp"] + got["fn"] == len(truth)
    assert len({i for i, _, _ in got["pairs"]}) == len({j for _, j, _ in got["pairs"]}) == got["tp"] and all(d <= mm for *_, d in got["pairs"])
    near = np.linalg.norm(np.reshape(found, (-1, 1, 3)) - np.reshape(truth, (1, -1, 3)).astype(float), axis=-1) <= mm
    best = near[linear_sum_assignment(~near)].sum()
    assert best / 2 <= got["tp"] <= best
    assert metrics.match_regions(found, truth, mm + 5)["tp"] * 2 >= got["tp"]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(0, 100), st.floats(-50, 50))
def test_property_bootstrap_moves_with_its_data(patients, seed, shift):
    values = np.random.default_rng(seed).normal(0, 1, 3 * patients)
    who = np.arange(3 * patients) % patients
    a, b = (metrics.bootstrap_ci(np.mean, who, v, resamples=60) for v in (values, values + shift))
    for key in ("value", "low", "high"): assert b[key] == pytest.approx(a[key] + shift, abs=1e-9)
    means = np.array([values[who == k].mean() for k in range(patients)])
    assert means.min() - 1e-9 <= a["low"] <= a["high"] <= means.max() + 1e-9
    assert metrics.bootstrap_ci(np.mean, who, values, resamples=60, level=0.5)["low"] >= a["low"]
