"""Edges and properties of mits_nb.protect.rivals."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ToyAttacker
from mits_nb.attack.nets import n_trainable
from mits_nb.core import MitsError, PlaceError, ScanError, TrainError, UsageError, WeightsError, rng, torch_rng
from mits_nb.gan import checkpoints
from mits_nb.metrics import rmse
from mits_nb.scan import Scan
from mits_nb.protect.mitsgan import MitsganConfig, PlaceBatches, cuboid_crop, evaluate_protection, is_protected
from mits_nb.protect.rivals import (GaussianNoise, Nothing, Pgd, Tafim, TafimConfig, TafimNet, TafimTask, TafimUnet, ascend, erased_box,
                                    in_windows, place_damage, place_groups, tafim_loss, train_tafim)


class DetachedAttacker(ToyAttacker):
    "The same forgeries, as numbers that fell from the sky."

    def tamper_tensor(self, hu, *args, **kwargs):
        return super().tamper_tensor(hu.detach(), *args, **kwargs)


TINY = dict(width=4, levels=3, global_px=16, steps=2, places=2, places_per_scan=8, margin_px=4)
PLACE = (12, 80, 40)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return TafimNet(4, 3, 16, 40.0).eval()


def batch_for(scan, places=2):
    return PlaceBatches([scan], MitsganConfig(places=places, places_per_scan=8, margin_px=4))(0, torch_rng(0))


# The U-Net and its windows

def test_parameters_of_unet_64_by_hand():
    # down: 16 in out + out; up: 16 (own + from below) out + out; the top returns one picture; no norm has parameters
    c = (64, 128, 256, 512, 512, 512)
    down = (16 * 2 * 64 + 64) + sum(16 * a * b + b for a, b in zip(c, c[1:]))
    up = (16 * 512 * 512 + 512) + sum(16 * 2 * b * a + a for a, b in zip(c[:4], c[1:5])) + (16 * 2 * 64 * 1 + 1)
    assert n_trainable(TafimUnet()) == down + up == 29_236_609
    assert n_trainable(TafimNet()) == 29_236_609 + 256 ** 2
    assert n_trainable(TafimUnet(6, 3)) - n_trainable(TafimUnet()) == 16 * 4 * 64 + 16 * 128 * 2 + 2, "colour as released: four more channels in, two out"


def test_layers_of_unet_64_start_as_released():
    torch.manual_seed(0)
    unet = TafimUnet()
    convs = [m for m in unet.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    assert len(convs) == 12 and all((m.kernel_size, m.stride, m.padding) == ((4, 4), (2, 2), (1, 1)) for m in convs)
    assert all(abs(m.weight.std().item() - 0.02) < 0.002 and not m.bias.any() for m in convs)
    assert sum(isinstance(m, torch.nn.InstanceNorm2d) for m in unet.modules()) == 9  # 4 down (not the first, not the last), 5 up (not the picture)
    assert sum(isinstance(m, torch.nn.Dropout) for m in unet.modules()) == 1


@pytest.mark.parametrize("size", [(64, 64), (50, 47), (3, 200), (1, 1), (33, 129)])
def test_unet_takes_any_size(size):
    out = TafimUnet(width=2, levels=6).eval()(torch.randn(2, 2, *size, generator=torch_rng(0)))
    assert out.shape == (2, 1, *size) and torch.isfinite(out).all() and out.abs().max() <= 1


def test_levels_are_wired_down_to_the_bottom():
    unet = TafimUnet(width=2, levels=4).eval()
    x = torch.randn(1, 2, 64, 64, generator=torch_rng(0), requires_grad=True)
    unet(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in unet.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("wrong", [dict(levels=1), dict(width=0)])
def test_a_unet_that_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError, match="U-Net"): TafimUnet(**wrong)


@pytest.mark.parametrize("size", [(16, 16), (45, 70), (5, 33)])
def test_windows_tile_without_gap_or_overlap(size):
    x = torch.randn(1, 2, *size, generator=torch_rng(1))
    seen = []
    def f(part):
        seen.append(part.shape[-2:])
        return part[:, :1]
    assert torch.equal(in_windows(f, x, 24, 4), x[:, :1]), "an f that copies must give a copy"
    assert set(seen) == {(24, 24)}, "every window has the size that the network was trained for"
    local = lambda part: torch.nn.functional.avg_pool2d(part[:, :1], 5, 1, 2)
    inner = (..., slice(2, -2), slice(2, -2))
    assert torch.allclose(in_windows(local, x, 24, 4)[inner], local(x)[inner], atol=1e-6), "what looks 2 pixels far is exact with a margin of 4"


def test_windows_without_a_middle_are_refused():
    with pytest.raises(UsageError, match="middle"): in_windows(lambda x: x, torch.zeros(1, 1, 9, 9), 8, 4)


def test_the_global_perturbation_repeats_and_its_phase_shifts_it(net):
    n = len(net.everywhere)
    tile = net.tile((3 * n, 2 * n + 5), torch.tensor([0.0, (3 * n + 7) / n ** 2, 1.0]))
    assert tile.shape == (3, 1, 3 * n, 2 * n + 5)
    assert torch.equal(tile[0, 0, :n, :n], net.everywhere) and torch.equal(tile[..., n:2 * n, n:2 * n], tile[..., :n, :n])
    assert torch.equal(tile[1, 0, :n, :n], torch.roll(net.everywhere, (-3, -7), (0, 1)))
    assert torch.isfinite(tile[2]).all()


def test_every_phase_of_a_large_tile_can_be_drawn():
    n = 256
    net, numbers = TafimNet(2, 2, n, 10.0), torch.arange(n * n, dtype=torch.float32)
    with torch.no_grad(): net.everywhere.copy_(numbers.view(n, n))  # every pixel says where it comes from
    for offset in (0.0, 0.5):  # exactly on a step, and between two
        corners = net.tile((1, 1), (numbers + offset) / n ** 2).flatten()
        assert torch.equal(corners, numbers), "each shift of the tile belongs to one phase"


def test_bad_settings_of_the_net_are_named():
    with pytest.raises(UsageError, match="reach_hu"): TafimNet(2, 2, 8, reach_hu=0)
    with pytest.raises(UsageError, match="global_px"): TafimNet(2, 2, 0)


# TAFIM's loss and training

def test_loss_by_hand():
    loss = tafim_loss(torch.tensor([-750.0]), torch.tensor([0.0]), torch.tensor([75.0, -75.0]), torch.tensor([0.0]), target_hu=0.0)
    assert loss.item() == pytest.approx(1 + 0 + 10 * (0.01 + 0))
    assert tafim_loss(torch.tensor([5.0]), torch.tensor([5.0]), torch.zeros(3), torch.zeros(3), target_hu=5.0).item() == 0


def test_erased_box_is_what_both_masks_erase():
    box = erased_box((12, 40, 40), (2.0, 1.0, 1.0), (24, 80, 80))
    assert [s.stop - s.start for s in box] == [7, 15, 15]
    assert all(s.start <= a < s.stop for s, a in zip(box, (12, 40, 40)))


def slope_of_target_terms(attacker, scan):
    "Gradient of Eq. (4) without its price (lambda = 0) with respect to the protected crops."
    task = TafimTask(TafimNet(4, 3, 16, 40.0), attacker, TafimConfig(**{**TINY, "weight": 0.0}))
    batch = batch_for(scan)
    own, everywhere = (v.detach().requires_grad_(True) for v in task.protect(batch))
    loss, _ = task.loss(batch, own, everywhere)
    if not loss.requires_grad: return [torch.zeros_like(own)] * 2
    return torch.autograd.grad(loss, (own, everywhere), allow_unused=True)


def test_the_gradient_passes_through_the_attacker(phantom):
    for slope in slope_of_target_terms(ToyAttacker(), phantom[0]): assert slope.abs().sum() > 0
    for slope in slope_of_target_terms(DetachedAttacker(), phantom[0]): assert slope is None or not slope.any(), "all of it comes through M"


def test_an_update_moves_both_perturbations_and_never_the_attacker(phantom):
    torch.manual_seed(0)
    net, attacker = TafimNet(4, 3, 16, 40.0), ToyAttacker()
    task = TafimTask(net, attacker, TafimConfig(**{**TINY, "weight": 0.0}))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    frozen = [p.clone() for part in (attacker.injector, attacker.remover) for p in part.parameters()]
    losses = task.update(batch_for(phantom[0]), lambda loss: loss.backward())
    assert not torch.equal(before["everywhere"], net.everywhere) and not torch.equal(before["unet.down.0.0.weight"], net.unet.down[0][0].weight)
    assert all(torch.equal(a, b) for a, b in zip(frozen, [p for part in (attacker.injector, attacker.remover) for p in part.parameters()]))
    assert all(torch.isfinite(torch.as_tensor(v)) for v in losses.values())


def test_training_lowers_the_loss_of_a_fixed_batch(phantom):
    torch.manual_seed(0)
    task = TafimTask(TafimNet(4, 3, 16, 40.0), ToyAttacker(), TafimConfig(**{**TINY, "lr": 1e-3, "global_lr": 1e-2}))
    batch = batch_for(phantom[0], places=1)
    losses = [task.update(batch, lambda loss: loss.backward())["loss"].item() for _ in range(12)]
    assert losses[-1] < losses[0]


def test_training_writes_weights_that_load_and_repeats_itself(phantom, tmp_path):
    train = lambda out, seed=2: train_tafim("tiny", out, ToyAttacker(), data=[phantom[0]], seed=seed, **TINY)
    first, second, other = train(tmp_path / "a"), train(None), train(None, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.net.state_dict().values(), second.net.state_dict().values()))
    assert not torch.equal(first.net.everywhere, other.net.everywhere)
    loaded = Tafim.from_pretrained(tmp_path / "a")
    assert loaded.name == "a" and len(loaded.history) and "| steps | 2 |" in (tmp_path / "a" / "card.md").read_text()
    assert not (tmp_path / "a-training").exists(), "a later training starts anew"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["card.md", "config.json", "history.json", "model.safetensors"]
    assert np.array_equal(loaded.protect(phantom[0]).hu, first.protect(phantom[0]).hu)


def test_a_training_that_ends_in_nan_leaves_a_good_checkpoint(phantom, tmp_path):
    class Faint(ToyAttacker):
        calls = 0

        def tamper_tensor(self, hu, *args, **kwargs):
            self.calls += 1
            return super().tamper_tensor(hu, *args, **kwargs) * (float("nan") if self.calls > 12 else 1)

    with pytest.raises(TrainError): train_tafim("tiny", tmp_path / "w", Faint(), data=[phantom[0]], **{**TINY, "steps": 6})
    assert checkpoints(tmp_path / "w-training") and not (tmp_path / "w").exists()


def test_training_without_scans_or_with_unknown_settings_says_so():
    with pytest.raises(TrainError, match="no scans"): train_tafim("tiny", None, ToyAttacker(), data=[])
    with pytest.raises(UsageError, match="tinny"): train_tafim("tinny", None, ToyAttacker(), data=[])
    with pytest.raises(UsageError, match="widht"): train_tafim("tiny", None, ToyAttacker(), data=[], widht=3)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other network"])
def test_broken_weights_are_one_sentence(net, tmp_path, damage):
    folder = tmp_path / "w"
    Tafim(net).save_pretrained(folder)
    if damage == "missing": (folder / "model.safetensors").unlink()
    if damage == "truncated": (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    if damage == "other network": (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), "width": 8}))
    with pytest.raises(WeightsError): Tafim.from_pretrained(folder)


def test_unknown_weights_are_named():
    with pytest.raises(WeightsError, match="no-such-tafim"): Tafim.from_pretrained("no-such-tafim")


# What all protectors promise

def protectors(net):
    return [Tafim(net, "t"), GaussianNoise(15.0), Pgd(ToyAttacker(), PLACE, 12.0, steps=2)]


def test_protection_is_whole_hu_deterministic_pure_and_noted(net, phantom):
    scan = phantom[0]
    before = scan.hu.copy()
    for p in protectors(net):
        a, b, other = p.protect(scan, seed=3), p.protect(scan, seed=3), p.protect(scan, seed=4)
        assert np.array_equal(scan.hu, before), p.name
        assert a.hu.dtype == scan.hu.dtype and a.shape == scan.shape and a.spacing == scan.spacing
        assert np.array_equal(a.hu, b.hu) and not np.array_equal(a.hu, other.hu), p.name
        assert not np.array_equal(a.hu, before)
        note = a.history[-1]
        assert (note["kind"], note["by"], note["seed"]) == ("protected", p.name, 3) and is_protected(a)


def test_protecting_twice_is_refused_unless_asked(net, phantom):
    once = GaussianNoise(5.0).protect(phantom[0])
    for p in protectors(net):
        with pytest.raises(UsageError, match="protected already"): p.protect(once)
        assert [note["by"] for note in p.protect(once, again=True).history] == ["gaussian-noise", p.name]


def test_nothing_changes_nothing_and_claims_nothing(phantom):
    out = Nothing().protect(phantom[0], seed=7)
    assert out is phantom[0] and not is_protected(out) and Nothing.name == "nothing"


def test_padding_stays_and_scans_of_odd_size_and_fractions_work(net, phantom):
    scan = phantom[0]
    hu = scan.hu[:, :75, :71].astype(np.float32) + 0.25
    hu[:, :, :9] = -2048
    odd, place = replace(scan, hu=hu), (12, 40, 20)
    for p in (Tafim(net), GaussianNoise(15.0), Pgd(ToyAttacker(), place, 12.0, steps=2)):
        out = p.protect(odd).hu
        assert out.dtype == np.float32 and (out[:, :, :9] == -2048).all(), p.name
        changed = out[out != hu]
        assert changed.size and np.array_equal(changed, np.round(changed)) and changed.min() >= -1024, p.name


def test_scans_that_are_no_lung_ct_have_defined_answers(net, phantom):
    scan = phantom[0]
    some = (Tafim(net), GaussianNoise(15.0), Pgd(ToyAttacker(), (7, 20, 20), 12.0, steps=2))
    for p in some:
        out = p.protect(replace(scan, hu=np.full((14, 40, 40), -1000, np.int16))).hu
        assert out.dtype == np.int16 and out.min() >= -1024 and out.max() <= 3071 and np.abs(out.astype(int) + 1000).max() < 100, p.name
    for hu in (np.full((14, 40, 40), 0), np.full((14, 40, 40), 3071), (scan.hu[:14, :40, :40] + 1350).clip(0, 255)):  # no air: a picture or another modality
        for p in some:
            with pytest.raises(ScanError, match="none below -200 HU"): p.protect(replace(scan, hu=hu.astype(np.int16)))


def test_what_was_not_changed_is_not_called_protected(net, phantom, caplog):
    empty = replace(phantom[0], hu=np.full((14, 40, 40), -2048, np.int16))
    for p in (Tafim(net), GaussianNoise(15.0)):
        caplog.clear()
        with caplog.at_level("WARNING", "mits_nb"): out = p.protect(empty)
        assert np.array_equal(out.hu, empty.hu) and not is_protected(out) and "not protected" in caplog.text, "nothing but padding: nothing to do, nothing to claim"


def test_voxels_that_are_not_finite_are_a_mits_error(net, phantom):
    hu = phantom[0].hu.astype(np.float32)
    hu[12, 80, 40] = np.nan
    broken = replace(phantom[0], hu=hu)
    for p in protectors(net):
        with pytest.raises(MitsError): p.protect(broken)


# TAFIM on scans

def test_tafim_is_bounded_by_its_reach_and_reaches_every_slice(net, phantom):
    scan = phantom[0]
    a, b = Tafim(net).protect(scan, seed=1), Tafim(net).protect(scan, seed=1, batch=7)
    change = np.abs(a.hu.astype(int) - scan.hu)
    assert 0 < change.max() <= net.reach_hu + 0.5 and all((slice_ > 0).any() for slice_ in change)
    assert np.abs(a.hu.astype(int) - b.hu).max() <= 1, "the batch size decides nothing but the last bit"


# The floor

def test_noise_has_the_strength_that_it_was_given(phantom):
    scan = replace(phantom[0], hu=np.full((4, 64, 64), -850, np.int16))
    change = GaussianNoise(8.0).protect(scan).hu.astype(float) + 850
    assert abs(change.std() - (64 + 1 / 12) ** 0.5) < 0.2 and abs(change.mean()) < 0.2
    a, b = (GaussianNoise(8.0).protect(replace(scan, hu=scan.hu[:n])).hu for n in (2, 4))
    assert np.array_equal(a, b[:2]) and not np.array_equal(b[0], b[1]), "slice k has its own noise, whatever follows"


def test_a_place_near_another_group_keeps_its_protection():
    scan = Scan(rng(0, "plain").normal(-800, 30, (14, 96, 144)).astype(np.int16), (2.5, 1.0, 1.0))
    first, second = (7, 48, 40), (7, 48, 78) # cuboids that do not touch, boxes with context that do
    assert len(place_groups(np.array([first, second]), scan.spacing, scan.shape)) == 2
    alone, both = (Pgd(ToyAttacker(), places, 12.0, steps=2).protect(scan).hu for places in (first, [first, second]))
    box = cuboid_crop(first, scan.spacing, scan.shape, 0)
    assert (alone[box] != scan.hu[box]).any() and np.array_equal(alone[box], both[box])


@pytest.mark.parametrize("sigma", [0, -1.0, float("nan"), float("inf")])
def test_impossible_noise_is_refused(sigma):
    with pytest.raises(UsageError, match="sigma_hu"): GaussianNoise(sigma)


def test_matching_noise_agrees_in_the_region(phantom):
    scan = phantom[0]
    climbed = Pgd(ToyAttacker(), PLACE, 20.0, steps=2).protect(scan)
    box = cuboid_crop(PLACE, scan.spacing, scan.shape, 0)
    noisy = GaussianNoise.matching(scan, climbed, box).protect(scan)
    assert rmse(scan.hu[box], noisy.hu[box]) == pytest.approx(rmse(scan.hu[box], climbed.hu[box]), rel=0.01)
    with pytest.raises(UsageError, match="no strength"): GaussianNoise.matching(scan, scan)
    faint = scan.hu.copy()
    faint[0, 0, 0] += 1
    with pytest.raises(UsageError, match="too small"): GaussianNoise.matching(scan, scan.with_hu(faint))


# The ceiling

def test_ascend_keeps_the_best_whole_numbers_within_the_bound():
    hu = torch.full((4, 6, 6), -800.0)
    goal = hu + 30 * torch.randn(hu.shape, generator=torch_rng(0))
    best, values = ascend(lambda v: -(v - goal).square().mean(), hu, 10.0, steps=12, rule="sign", generator=torch_rng(1))
    assert torch.equal(best, best.round()) and (best - hu).abs().max() <= 10 and len(values) == 13
    assert -(best - goal).square().mean().item() == pytest.approx(max(values)) and max(values) > values[0]
    assert torch.allclose(best, hu + (goal - hu).clamp(-10, 10), atol=3.1), "a bowl: the answer is known"


def test_the_best_iterate_counts_not_the_last():
    hu = torch.full((2, 4, 4), -800.0)
    best, values = ascend(lambda v: -(v - hu).square().mean() + 0.1 * v.mean(), hu, 20.0, 3, "sign", step_hu=9.0)
    assert values[-1] < values[0] and torch.equal(best, hu), "every step overshoots: the start was best"


def test_ascend_moves_only_where_it_may():
    hu, where = torch.full((3, 5, 5), -800.25), torch.zeros(3, 5, 5, dtype=torch.bool)
    where[1, 1:3] = True
    for rule in ("sign", "l2"):
        best, _ = ascend(lambda v: v.sum(), hu, 5.0, 3, rule, where=where, generator=torch_rng(0))
        assert torch.equal(best[~where], hu[~where]) and (best[where] > hu[where]).all()


def test_voxels_that_do_not_matter_are_left_alone():
    hu, slope = torch.full((2, 4, 4), -800.0), torch.zeros(2, 4, 4)
    slope[0, 1] = 1.0
    for rule in ("sign", "l2"):
        best, _ = ascend(lambda v: (slope * v).sum(), hu, 40.0, 4, rule, generator=torch_rng(0))
        assert torch.equal(best[slope == 0], hu[slope == 0]) and (best[slope > 0] > hu[slope > 0]).all(), rule


def test_sign_steps_need_not_know_the_size_of_the_gradient():
    hu = torch.full((2, 4, 4), -800.0)
    slope = torch.linspace(1e-6, 1e3, hu.numel()).view_as(hu)
    best = {rule: ascend(lambda v: (slope * v).sum(), hu, 10.0, 1, rule, step_hu=4.0)[0] - hu for rule in ("sign", "l2")}
    assert (best["sign"] == 4).all() and best["l2"].min() == 0 and best["l2"].max() > 4


@pytest.mark.parametrize("wrong, named", [(dict(rule="newton"), "newton"), (dict(steps=0), "steps"), (dict(bound_hu=0), "bound_hu"), (dict(bound_hu=float("nan")), "bound_hu")])
def test_impossible_ascents_are_refused(wrong, named):
    with pytest.raises(UsageError, match=named): ascend(lambda v: v.sum(), torch.zeros(2, 3, 3), **{"bound_hu": 5.0, **wrong})
    with pytest.raises(UsageError, match=named): Pgd(ToyAttacker(), PLACE, **wrong)


def test_unknown_actions_and_places_are_refused(phantom):
    with pytest.raises(UsageError, match="duplicate"): Pgd(ToyAttacker(), PLACE, actions=("inject", "duplicate"))
    with pytest.raises(UsageError, match="actions"): Pgd(ToyAttacker(), PLACE, actions=())
    with pytest.raises(PlaceError): Pgd(ToyAttacker(), "here")
    with pytest.raises(PlaceError, match="outside"): Pgd(ToyAttacker(), (12, 80, 400)).protect(phantom[0])


def test_an_attacker_without_gradient_is_refused(phantom):
    class Constant(ToyAttacker):
        def tamper_tensor(self, hu, *args, **kwargs): return super().tamper_tensor(hu, *args, **kwargs).detach()
    with pytest.raises(UsageError, match="no gradient"): Pgd(Constant(), PLACE, steps=1).protect(phantom[0])


@pytest.mark.parametrize("bound", [5, 20])
def test_pgd_stays_in_its_cuboid_and_its_bound(phantom, bound):
    scan = phantom[0]
    out = Pgd(ToyAttacker(), PLACE, bound, steps=3).protect(scan)
    change = out.hu.astype(int) - scan.hu
    inside = np.zeros(scan.shape, bool)
    inside[cuboid_crop(PLACE, scan.spacing, scan.shape, 0)] = True
    assert not change[~inside].any() and 0 < np.abs(change).max() <= bound
    assert out.history[-1]["places"] == [list(map(float, PLACE))]


def test_pgd_does_more_with_a_larger_bound_and_more_than_noise(phantom):
    scan, attacker = phantom[0], ToyAttacker()
    box = cuboid_crop(PLACE, scan.spacing, scan.shape, 0)
    def damage(protected): return float(np.mean([row["from_goal_hu"] for row in evaluate_protection(lambda scan: protected, attacker, scan, np.array([PLACE]))]))
    done = {}
    for bound in (5, 30):
        pgd = Pgd(attacker, PLACE, bound, steps=5)
        protected = pgd.protect(scan)
        noisy = GaussianNoise.matching(scan, protected, box).protect(scan)
        done[bound] = damage(protected)
        assert done[bound] > 1.5 * damage(noisy), bound
        assert max(pgd.values[0]) > pgd.values[0][0], "the climb climbs from its random start"
    assert done[30] > 1.5 * done[5]


def test_neighbours_are_climbed_together_and_strangers_apart(phantom):
    scan = phantom[0]
    near, far = [(12, 80, 40), (12, 84, 42)], (12, 80, 120)
    assert place_groups(np.array([near[0], far, near[1]]), scan.spacing, scan.shape) == [[1], [0, 2]]
    chain = np.array([(12, 80, 30), (12, 80, 60), (12, 80, 45)])
    assert place_groups(chain, scan.spacing, scan.shape) == [[0, 1, 2]], "a place between two others joins them"
    both = Pgd(ToyAttacker(), [*near, far], 12.0, steps=2)
    out = both.protect(scan)
    assert len(both.values) == 2
    alone = Pgd(ToyAttacker(), far, 12.0, steps=2).protect(scan)
    box = cuboid_crop(far, scan.spacing, scan.shape, 0)
    assert np.array_equal(out.hu[box], alone.hu[box]), "a place far away does not matter"


def test_an_expectation_over_cleanings_survives_the_cleaning(phantom):
    scan, attacker = phantom[0], ToyAttacker()
    def blur(hu, spacing, generator):
        return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(hu[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0]
    crop = cuboid_crop(PLACE, scan.spacing, scan.shape, 8)
    hu, at = torch.from_numpy(scan.hu[crop].astype(np.float32)), tuple(float(p - s.start) for p, s in zip(PLACE, crop))
    plain = place_damage(attacker, hu, [at], scan.spacing)
    class Cleaner(ToyAttacker):
        def tamper_tensor(self, v, at, spacing, action, noise=None): return super().tamper_tensor(blur(v, spacing, None), at, spacing, action)
    after = {}
    for name, cleanings in (("blind", ()), ("aware", (blur,))):
        out = Pgd(attacker, PLACE, 20.0, steps=8, cleanings=cleanings).protect(scan)
        v = torch.from_numpy(out.hu[crop].astype(np.float32))
        after[name] = float(np.mean([torch.linalg.norm((Cleaner().tamper_tensor(v, at, scan.spacing, a) - Cleaner().tamper_tensor(hu, at, scan.spacing, a))[4:-4]).item() for a in ("inject", "remove")]))
    assert after["aware"] > after["blind"]
    assert torch.isfinite(plain(hu))
