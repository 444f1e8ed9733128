"""Edges and properties of `mits_nb.metrics`: image distances, LPIPS without a network, regions, detection scores."""
import json
import math
import warnings

import numpy as np
import pytest

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


@pytest.mark.parametrize("call", [metrics.rmse, metrics.psnr, metrics.ssim, metrics.lpips_distance, metrics.fidelity])
def test_bad_shapes(call):
    with pytest.raises(UsageError, match="shapes"): call(np.zeros((3, 40, 40)), np.zeros((2, 40, 40)))
    with pytest.raises(UsageError): call(np.zeros(7), np.zeros(7))
    with pytest.raises(UsageError): call(np.zeros((0, 40, 40)), np.zeros((0, 40, 40)))


@pytest.mark.parametrize("peak", [0, -1, float("nan")])
def test_bad_peak(pair, peak):
    with pytest.raises(UsageError): metrics.psnr(*pair, peak=peak)
    with pytest.raises(UsageError): metrics.ssim(*pair, peak=peak)


# ---------------------------------------------------------------- LPIPS
def test_lpips_equals_the_package(pair, backbone):
    import torch
    ours, reason = metrics.lpips_distance(*pair, backbone)
    assert reason is None and ours > 0
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        import_torchvision()
        import lpips
        theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)  # with the package's own way to its linear layers
    features = torch.load(backbone, weights_only=True)
    theirs.net.load_state_dict({name: features["features." + name.split(".", 1)[1]] for name in theirs.net.state_dict()})
    batch = [torch.from_numpy(np.clip((v.astype(np.float32) + 600) / 750, -1, 1))[:, None].repeat(1, 3, 1, 1) for v in pair]
    with torch.inference_mode(): expected = float(theirs(*batch).mean())
    assert ours == pytest.approx(expected, abs=1e-6)


def test_lpips_backbone_features_are_in_the_right_order(backbone):
    import torch
    model = metrics._lpips_model(str(backbone), backbone.stat().st_mtime_ns)
    with torch.random.fork_rng(devices=[]): net = import_torchvision().models.squeezenet1_1(weights=None).eval()
    net.load_state_dict(torch.load(backbone, weights_only=True))
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        for stop, found in zip((2, 5, 8, 10, 11, 12, 13), model.net(x)): assert torch.equal(net.features[:stop](x), found)


def test_lpips_is_quiet_and_leaves_random_streams_alone(pair, backbone, capsys, recwarn):
    import torch
    metrics._lpips_model.cache_clear()
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
