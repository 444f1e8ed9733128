"The local detector: parts by hand, parameter counts, both uses, training."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mits_nb.core import DetectError, TrainError, UsageError, WeightsError, from_preset, torch_rng
from mits_nb.detect.cnn import (CLEAN, FORGED, HARD, PAIRED, RIM, ChannelAttention, Detector, DetectorConfig, PatchSet, cut_patch, dense_targets, draw_batch,
                                folded, doubled, local_pool, max_pool_same, random_view, standardise, train_detector)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Detector(width=.125).eval()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(0, .3)
                m.running_var.uniform_(.5, 2)
    return net


def number(net): return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    assert number(Detector()) == 10_883_461 and number(Detector(width=.25)) == 696_109
    assert number(Detector(attention=False)) == 8_781_090


def test_same_padding_adds_right_and_below_only():
    x = torch.arange(64.).view(1, 1, 8, 8)
    pooled = max_pool_same(x)
    assert pooled.shape == (1, 1, 4, 4) and pooled[0, 0, 0].tolist() == [18., 20., 22., 23.]
    assert (max_pool_same(x - 1000) == pooled - 1000).all() # the padding never wins, however negative the data


def test_pooling_commutes_with_relu():
    x = torch.randn(1, 3, 8, 8, generator=torch_rng(0, "x"))
    assert torch.equal(F.relu(max_pool_same(x)), max_pool_same(F.relu(x)))


def test_doubling_gives_sums_and_maxima():
    x = torch.randn(2, 3, 13, 17, generator=torch_rng(0, "x"))
    assert torch.allclose(doubled(x, 8, torch.add) / 64, F.avg_pool2d(x, 8, 1), atol=1e-6)
    assert torch.equal(doubled(x, 4, torch.maximum), F.max_pool2d(x, 4, 1))
    with pytest.raises(UsageError): doubled(x, 6, torch.add)


@pytest.mark.parametrize("h, w", [(8, 8), (9, 12), (16, 11), (1, 3)])
def test_local_pool_sees_a_window_around_every_second_cell(h, w):
    x = torch.randn(1, 2, h, w, generator=torch_rng(0, "x"))
    pooled = local_pool(x, "max")
    assert pooled.shape[2:] == ((h + 1) // 2 + 1, (w + 1) // 2 + 1)
    i, j = pooled.shape[2] - 1, 1
    rows, columns = [min(max(k, 0), h - 1) for k in range(2 * i - 4, 2 * i + 4)], [min(max(k, 0), w - 1) for k in range(2 * j - 4, 2 * j + 4)]
    assert torch.equal(pooled[0, :, i, j], x[0][:, rows][:, :, columns].amax((1, 2)))


def test_dense_attention_of_a_flat_picture_is_the_global_one():
    attention = ChannelAttention(8)
    x = torch.randn(1, 8, 1, 1, generator=torch_rng(0, "x")).expand(1, 8, 11, 14).contiguous()
    assert torch.allclose(attention(x), attention(x, dense=True), atol=1e-6)


@pytest.mark.parametrize("h, w", [(32, 32), (64, 36), (44, 40)])
def test_dense_answers_one_pair_per_window(net, h, w):
    with torch.inference_mode(): assert net(torch.zeros(2, 1, h, w), dense=True).shape == (2, 2, h // 4 - 7, w // 4 - 7)


def test_dense_moves_with_the_picture(net):
    "Shift the input by one stride, and the answers shift by one cell (away from the rim, and by two cells: attention looks at every second one)."
    hu = torch.randn(1, 1, 160, 160, generator=torch_rng(0, "hu")) * 200 - 700
    with torch.inference_mode(): a, b = net(hu[..., :-8, :-8], dense=True), net(hu[..., 8:, 8:], dense=True)
    assert torch.allclose(a[..., 14:-12, 14:-12], b[..., 12:-14, 12:-14], atol=1e-4) and a[..., 14:-12, 14:-12].numel() > 0


def test_folding_changes_nothing_but_speed(net):
    hu = torch.randn(2, 1, 64, 64, generator=torch_rng(0, "hu")) * 200 - 700
    quick = folded(net)
    with torch.inference_mode():
        for dense in (False, True): assert torch.allclose(net(hu[..., :32, :32] if not dense else hu, dense), quick(hu[..., :32, :32] if not dense else hu, dense), atol=1e-4)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) # the original is as it was


def test_probability_is_one_number_per_window_and_keeps_the_mode(net):
    hu = torch.randn(5, 1, 32, 32, generator=torch_rng(0, "hu")) * 200 - 700
    p = net.probability(hu)
    assert p.shape == (5,) and p.dtype == torch.float32 and ((0 <= p) & (p <= 1)).all()
    assert torch.equal(p, net.probability(hu.numpy()))
    net.train()
    net.probability(hu)
    assert net.training
    net.eval()
    assert net.probability(torch.zeros(0, 1, 32, 32)).shape == (0,)


@pytest.mark.parametrize("bad", [torch.zeros(1, 32, 32), torch.zeros(1, 1, 16, 16), torch.zeros(2, 3, 32, 32), torch.full((1, 1, 32, 32), float("nan")), torch.full((1, 1, 32, 32), float("inf"))])
def test_bad_windows_are_errors(net, bad):
    with pytest.raises(DetectError): net.probability(bad)


def test_padding_values_do_not_matter():
    assert torch.equal(standardise(torch.full((1, 1, 4, 4), -3024.)), standardise(torch.full((1, 1, 4, 4), -1000.)))
    with pytest.raises(UsageError): Detector(scaling="log")
    with pytest.raises(UsageError): Detector(width=0)


def test_weights_go_to_a_folder_and_back(net, tmp_path):
    net.save_pretrained(tmp_path / "d")
    hu = torch.randn(3, 1, 32, 32, generator=torch_rng(0, "hu")) * 200 - 700
    assert torch.equal(Detector.from_pretrained(tmp_path / "d").probability(hu), net.probability(hu))
    (tmp_path / "d" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError): Detector.from_pretrained(tmp_path / "d")


def patches(n=64, seed=0):
    "Noise is unforged; the same noise blurred in the middle is forged."
    from scipy.ndimage import gaussian_filter
    numbers = np.random.default_rng(seed)
    hu, kind = numbers.normal(-800, 80, (n, 68, 68)), np.arange(n) % 4
    for i in np.flatnonzero(kind == FORGED): hu[i, 18:50, 18:50] = gaussian_filter(hu[i, 18:50, 18:50], 1.5)
    return PatchSet(hu.astype(np.int16), kind.astype(np.uint8))


def test_dense_targets_weigh_only_what_is_known():
    label, weight = dense_targets(torch.tensor([CLEAN, PAIRED, RIM, FORGED]))
    assert torch.allclose(weight.sum((1, 2)), torch.ones(4)) and label[:3].sum() == 0 and (label[3] == 1).all()
    assert (weight[0] > 0).all() and (weight[2] > 0).sum() == 1 and (weight[3] > 0).sum() == 9 and weight[3, 3:6, 3:6].min() > 0


def test_batches_are_balanced_and_repeatable():
    config = DetectorConfig(batch=200, dense_batch=10)
    a, b = (draw_batch(patches(), config, torch_rng(5, "batch")) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a) and a["windows"].shape == (200, 1, 32, 32) and a["crops"].shape == (10, 1, 64, 64)
    assert .4 < a["label"].float().mean() < .6
    assert torch.equal(a["crops"][:, :, 16:48, 16:48], a["windows"][:10])


@pytest.mark.parametrize("lesson, shares", [(1, {CLEAN: 3 / 18, PAIRED: 4 / 18, RIM: 2 / 18, FORGED: .5, HARD: 0}), (2, {CLEAN: 3 / 26, PAIRED: 4 / 26, RIM: 2 / 26, FORGED: .5, HARD: 4 / 26})])
def test_kinds_have_their_shares_however_many_there_are(lesson, shares):
    kind = np.repeat(np.array([CLEAN, PAIRED, RIM, FORGED] + [HARD] * (lesson > 1), np.uint8), [40, 3, 7, 5] + [20] * (lesson > 1))
    hu = np.broadcast_to(kind.astype(np.int16)[:, None, None], (len(kind), 68, 68))  # each patch says of what kind it is
    batch = draw_batch(PatchSet(hu, kind), DetectorConfig(batch=4000, dense_batch=1), torch_rng(5, "shares"))
    drawn = batch["windows"][:, 0, 0, 0]
    for k, share in shares.items(): assert abs(float((drawn == k).float().mean()) - share) < .035  # more than four standard errors
    assert torch.equal(batch["label"] == 1, drawn == FORGED)


def test_views_are_the_25_shifts_and_8_symmetries():
    one = torch.arange(68. * 68).view(1, 68, 68).expand(4000, -1, -1)
    views = random_view(one, torch_rng(0, "views"))
    assert len(torch.unique(views.flatten(1)[:, [0, 63]], dim=0)) == 200


def test_patches_outside_the_slice_are_air():
    patch = cut_patch(np.full((40, 40), 7, np.int16), (0, 39))
    assert patch.shape == (68, 68) and patch[34, 33] == 7 and (patch[:34] == -1000).all() and (patch[:, 35:] == -1000).all()


def test_one_class_or_wrong_shapes_cannot_be_learnt():
    good = patches(8)
    for bad in (PatchSet(good.hu, np.zeros(8, np.uint8)), PatchSet(good.hu, np.full(8, FORGED, np.uint8)), PatchSet(good.hu[:, :60], good.kind), PatchSet(good.hu, good.kind[:4])):
        with pytest.raises(TrainError): bad.check()


def test_a_short_training_learns_and_repeats():
    config = DetectorConfig(width=.125, batch=32, dense_batch=8, steps=12, lr=3e-3, dropout=0.)
    runs = [train_detector(patches(), config, seed=1) for _ in range(2)]
    losses = [h["windows"] for _, h in runs]
    assert losses[0] == losses[1] and losses[0][-1] < .69
    state = [net.state_dict() for net, _ in runs]
    assert all(torch.equal(state[0][k], state[1][k]) for k in state[0])




def test_checkpoints_of_another_training_are_refused(tmp_path):
    config = from_preset(DetectorConfig, "tiny", width=.125, batch=8, dense_batch=2, steps=2)
    train_detector(patches(), config, seed=1, out=tmp_path / "lesson")
    train_detector(patches(), config, seed=1, out=tmp_path / "lesson") # the same again: finished
    for data, more, word in ((patches(seed=1), {}, "patches"), (patches(), {"batch": 16}, "batch")):
        with pytest.raises(TrainError, match=f"another {word}"): train_detector(data, replace(config, **more), seed=1, out=tmp_path / "lesson")
