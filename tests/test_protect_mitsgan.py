"""Edges and properties of mits_nb.protect.mitsgan."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ToyAttacker
from mits_nb.attack.nets import n_trainable
from mits_nb.attack.tamper import Tampering
from mits_nb.core import ScanError, TrainError, UsageError, WeightsError, pick_compute, torch_rng
from mits_nb.gan import checkpoints, read_checkpoint
from mits_nb.protect import mitsgan
from mits_nb.protect.mitsgan import (RELEASED, MitsGAN, MitsganConfig, NoiseNet, Pattern, PlaceBatches, Protector, ProtectorDiscriminator, ProtectTask, check_hu, cuboid_crop,
                                     evaluate_protection, finish_slices, folded, is_protected, local_mean, lung_doubts, lung_weight, middle_box, often, round_through, search_wave,
                                     summarise_protection, train_mitsgan, training_scans, with_masks)
from mits_nb.protect.rivals import TafimConfig


@pytest.fixture(scope="module")
def protector():
    torch.manual_seed(0)
    net = Protector(8, "ours", blocks=1)
    torch.nn.init.normal_(net.body[-2].weight, std=0.02)  # as after training: an answer that depends on the slice
    return net.eval()


SHORT = dict(width=8, blocks=1, steps=2, places=2, places_per_scan=8, d_width=4, search=(1, 1, 1))


def test_parameter_counts_of_the_published_networks():
    assert n_trainable(NoiseNet()) == 62
    assert n_trainable(Protector(64, "released")) == 223_295
    assert n_trainable(Protector(64, "paper")) == 223_871
    assert n_trainable(ProtectorDiscriminator(1, "released")) == 3_964
    assert n_trainable(ProtectorDiscriminator(1, "paper")) == 3_966


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_published_networks_keep_the_shape_and_the_range(variant):
    net = Protector(8, variant).eval()
    hu = torch.linspace(-1000, 1000, 40 * 36).view(1, 1, 40, 36)
    with torch.no_grad(): out = net(hu, torch.rand(1, 1, 40, 36))
    assert out.shape == hu.shape and out.min() >= -1000.01 and out.max() <= 1000.01
    constant = torch.full((1, 1, 8, 8), -1000.0)
    assert torch.equal(net(constant, torch.rand(1, 1, 8, 8)), constant)


def test_published_discriminator_answers_once_for_512_pixels():
    assert ProtectorDiscriminator(1, "released").eval()(torch.zeros(1, 1, 512, 512)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("wrong", [dict(variant="theirs"), dict(noise="pink"), dict(strength_hu=0)])
def test_bad_settings_are_named(wrong):
    with pytest.raises(UsageError, match=str(list(wrong.values())[0])): Protector(8, **wrong)
    if "variant" in wrong:
        with pytest.raises(UsageError, match="theirs"): ProtectorDiscriminator(1, **wrong)


@pytest.mark.parametrize("size", [(64, 64), (50, 47), (33, 4), (1, 1), (3, 5), (1, 65)])
def test_ours_is_bounded_for_any_size(protector, size):
    hu = -800 + 200 * torch.randn(2, 1, *size, generator=torch_rng(0))
    with torch.no_grad(): out = protector(hu, torch.randn(2, 1, *size, generator=torch_rng(1)), (0.7, 0.7))
    assert out.shape == hu.shape and (out - hu).abs().max() <= protector.strength_hu + 1e-3
    assert (out != hu).any() or size == (1, 1), "a single pixel is its own mean"


def test_rounding_is_straight_through():
    x = torch.tensor([1.4, -2.6], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [1.0, -3.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_finish_keeps_padding_and_the_12_bit_range():
    hu = torch.tensor([-3024.0, -2000.0, -1024.0, -1020.0, 3070.0, 4000.0])
    out = finish_slices(hu + torch.tensor([9.0, 9.0, -30.0, -30.3, 30.0, 30.0]), hu)
    assert out.tolist() == [-3024.0, -2000.0, -1024.0, -1024.0, 3071.0, 4000.0]


def test_lung_weight_is_full_in_lung_and_low_elsewhere():
    hu = torch.full((1, 1, 96, 96), 40.0)
    hu[..., 48:] = -850
    weight = lung_weight(hu)
    assert weight.shape == hu.shape and weight[0, 0, 48, 90] == 1 and weight[0, 0, 48, 5] == 0
    assert torch.allclose(lung_weight(torch.full((1, 1, 40, 40), -1000.0)), torch.tensor(0.05)), "air outside the body"


def test_protect_is_whole_hu_bounded_deterministic_and_pure(protector, phantom):
    scan, mits = phantom[0], MitsGAN(protector, "test")
    before = scan.hu.copy()
    a, b, other = mits.protect(scan, seed=3), mits.protect(scan, seed=3, batch=7), mits.protect(scan, seed=4)
    assert np.array_equal(scan.hu, before)
    assert a.hu.dtype == scan.hu.dtype and a.shape == scan.shape and a.spacing == scan.spacing
    assert np.array_equal(a.hu, b.hu), "the batch size must not matter"
    assert not np.array_equal(a.hu, other.hu), "another seed, another protection"
    change = np.abs(a.hu.astype(int) - scan.hu)
    assert 0 < change.max() <= protector.strength_hu + 0.5
    assert all((change[k] > 0).any() for k in range(len(change))), "every slice is protected"
    assert a.history[-1] == {"kind": "protected", "by": "test", "seed": 3, "strength_hu": protector.strength_hu}


def test_protect_leaves_padding_and_works_on_odd_and_float_scans(protector, phantom):
    scan = phantom[0]
    hu = scan.hu[:2, :51, :45].astype(np.float32) + 0.25
    hu[:, :5] = -2048
    out = MitsGAN(protector).protect(replace(scan, hu=hu))
    assert out.hu.dtype == np.float32 and (out.hu[:, :5] == -2048).all()
    rest = out.hu[:, 5:]
    assert np.array_equal(rest, np.round(rest)) and rest.min() >= -1024


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_published_variants_protect_too(variant, phantom):
    scan = phantom[0]
    out = MitsGAN(Protector(4, variant)).protect(replace(scan, hu=scan.hu[:2]))
    assert out.hu.shape == (2, *scan.shape[1:]) and "strength_hu" not in out.history[-1]  # they promise no bound
    assert out.history[-1]["largest_hu"] == np.abs(out.hu.astype(int) - scan.hu[:2]).max()


VARIANTS = ("paper", "released", "ours")


def trained(variant, width=8):
    "A network as after training: batch norms that have seen data, an answer that depends on the slice."
    torch.manual_seed(0)
    net = Protector(width, variant, blocks=1).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for values, low, high in ((m.running_mean, -.3, .3), (m.running_var, .5, 2.), (m.weight.data, .5, 1.5), (m.bias.data, -.3, .3)): values.uniform_(low, high)
    torch.nn.init.normal_(net.body[-2].weight, std=0.05)
    return net


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_changes_the_cost_and_not_the_answer(variant):
    net = trained(variant)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hu, noise = -700 + 300 * torch.randn(2, 1, 45, 38, generator=torch_rng(0)), torch.randn(2, 1, 45, 38, generator=torch_rng(1))
    ends, phase = (-1024.0, 500.0), torch.tensor([.2, .7])
    with torch.no_grad():
        plain, quick = (f(hu, noise, (.7, .7), phase, ends) for f in (net, folded(net)))
        half = folded(net, torch.bfloat16)(hu, noise, (.7, .7), phase, ends)
    assert (plain - quick).abs().max() < 0.02 and (finish_slices(plain, hu) - finish_slices(quick, hu)).abs().max() <= 1
    assert half.dtype == torch.float32 and half.shape == hu.shape
    if variant == "ours": assert (finish_slices(half, hu) - finish_slices(plain, hu)).abs().max() <= 1
    else:  # the whole slice comes out of bf16 layers: whole HU are lost, but not more than by the network as it is under autocast
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): auto = net(hu, noise, (.7, .7), phase, ends)
        assert (half - plain).square().mean() < 2 * (auto - plain).square().mean()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded(net).modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(getattr(m, "inplace", False) for m in net.modules()), "the trained network stays as it was"


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_texture_serves_all_slices(variant):
    net = trained(variant)
    hu, noise, phase = -700 + 300 * torch.randn(3, 1, 20, 24, generator=torch_rng(0)), torch.randn(1, 1, 20, 24, generator=torch_rng(1)), torch.tensor([.3])
    with torch.no_grad():
        one = net.paint(hu, net.texture(noise, (.7, .9), phase), (.7, .9), (-2000.0, 500.0))
        each = net(hu, noise.expand(3, -1, -1, -1), (.7, .9), phase.expand(3), (-2000.0, 500.0))
    assert torch.allclose(one, each, atol=1e-3)


def test_a_block_adds_its_input_and_gradients_know_it():
    block = trained("released").body[2].train()
    x = torch.randn(2, 8, 9, 9, generator=torch_rng(0), requires_grad=True)
    out = block(x)
    assert torch.equal(out, x + block.body(x)) or torch.allclose(out, x + block.body(x), atol=1e-6)
    slope, = torch.autograd.grad(out.sum(), x)
    expected, = torch.autograd.grad((x + block.body(x)).sum(), x)
    assert torch.allclose(slope, expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (47, 50), (3, 129)])
def test_protect_takes_slices_of_any_size(variant, size, phantom):
    hu = np.resize(phantom[0].hu[10], (2, *size)).astype(np.int16)
    hu[0, 0, 0] = -900
    out = MitsGAN(trained(variant)).protect(replace(phantom[0], hu=hu))
    assert out.hu.shape == hu.shape and out.hu.dtype == np.int16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [-1024, -850, -2048])
def test_constant_scans(variant, value, phantom):
    flat = np.full((2, 40, 40), value, np.int16)
    out = MitsGAN(trained(variant)).protect(replace(phantom[0], hu=flat))
    assert is_protected(out) == (not np.array_equal(out.hu, flat)), "where nothing was changed nothing is claimed"
    if variant != "ours" or value == -2048: assert np.array_equal(out.hu, flat) and not out.history  # no range to scale by; padding
    else: assert np.abs(out.hu.astype(int) - value).max() <= 88 and (value == -1024 or (out.hu != value).any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_constant_and_saturated_slices_inside_a_scan(variant, phantom):
    hu = phantom[0].hu[8:12].copy()
    hu[0], hu[1], hu[2, :80] = -1024, 3071, 32767  # empty slice, scanner's ceiling, metal in an extended scale
    out = MitsGAN(trained(variant)).protect(replace(phantom[0], hu=hu))
    assert out.hu[:2].min() >= -1024 and out.hu[:2].max() <= 3071, "12-bit values stay 12-bit values"
    assert out.hu.max() <= 32767 and out.hu[2, :80].min() > 0, "no wrap-around of int16"


@pytest.mark.parametrize("values, word", [(np.uint8, "8-bit"), ("unsigned", "0 to 4095"), ("unit", "-1 to 1"), ("nan", "NaN")])
def test_what_is_no_ct_is_refused(values, word, protector, phantom):
    hu = phantom[0].hu[:2].astype(np.float32)
    hu = {np.uint8: (hu + 1350).clip(0, 255), "unsigned": np.linspace(0, 4095, hu.size).reshape(hu.shape), "unit": np.linspace(-1, 1, hu.size).reshape(hu.shape),
          "nan": np.where(hu > 0, np.nan, hu)}[values].astype(np.float32)
    with pytest.raises(ScanError, match=word): MitsGAN(protector).protect(replace(phantom[0], hu=hu))
    with pytest.raises(ScanError): check_hu(replace(phantom[0], hu=hu))


def test_a_scan_without_lung_is_protected_with_a_warning(protector, phantom, caplog):
    assert lung_doubts(phantom[0]) == []
    empty = replace(phantom[0], hu=np.full((3, 60, 60), -1000, np.int16))
    with caplog.at_level("WARNING", "mits_nb"): MitsGAN(protector).protect(phantom[0])
    assert not caplog.records
    with caplog.at_level("WARNING", "mits_nb"): MitsGAN(protector).protect(empty)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "no lung" in caplog.text


def test_device_and_precision_can_be_chosen(protector, phantom):
    scan = replace(phantom[0], hu=phantom[0].hu[:2])
    exact, half = (MitsGAN(protector).protect(scan, compute=pick_compute("cpu", precision)).hu.astype(int) for precision in ("fp32", "bf16"))
    assert np.abs(exact - half).max() <= 1 and next(protector.parameters()).dtype == torch.float32


def test_protecting_twice_is_refused_unless_asked(protector, phantom):
    mits = MitsGAN(protector)
    once = mits.protect(phantom[0])
    assert is_protected(once) and not is_protected(phantom[0])
    with pytest.raises(UsageError, match="protected already"): mits.protect(once)
    assert len(mits.protect(once, again=True).history) == 2


def test_weights_survive_the_disk(protector, phantom, tmp_path):
    mits = MitsGAN(protector)
    mits.save_pretrained(tmp_path / "w", card="# card\n")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["card.md", "config.json", "model.safetensors"]
    again = MitsGAN.from_pretrained(tmp_path / "w")
    assert again.name == "w" and np.array_equal(again.protect(phantom[0]).hu, mits.protect(phantom[0]).hu)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other network", "no json"])
def test_broken_weights_are_one_sentence(protector, tmp_path, damage):
    folder = tmp_path / "w"
    MitsGAN(protector).save_pretrained(folder)
    if damage == "missing": (folder / "model.safetensors").unlink()
    if damage == "truncated": (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    if damage == "other network": (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), "width": 16}))
    if damage == "no json": (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError): MitsGAN.from_pretrained(folder)


@pytest.mark.parametrize("at", [(0, 0, 0), (10, 80, 80), (23, 159, 159)])
def test_crop_holds_the_cuboid_and_stays_inside(at):
    shape, spacing = (24, 160, 160), (2.5, 2.2, 2.2)
    crop = cuboid_crop(at, spacing, shape, 5)
    for a, s, n, d in zip(at, crop, shape, spacing):
        assert 0 <= s.start < s.stop <= n
        assert s.start <= max(0, a - 16 / d) and s.stop >= min(n, a + 16 / d)
    assert [s.stop - s.start for s in crop] == [s.stop - s.start for s in cuboid_crop((12, 70, 70), spacing, shape, 5)], "one size for a batch"
    box = middle_box(at, spacing, shape)
    assert all(0 <= s.start < s.stop <= n for s, n in zip(box, shape))


def test_batches_are_a_pure_function_of_step_and_generator(phantom):
    config = MitsganConfig(**SHORT)
    batches = PlaceBatches([phantom[0]], config, seed=1)
    a, b = (batches(0, torch_rng(5)) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["hu"].shape[0] == 2 and a["noise"].shape[1] == 1
    inside = torch.tensor(a["hu"].shape[1:]) - 1
    assert (a["at"] >= 0).all() and (a["at"] <= inside).all()


def test_an_update_moves_both_networks_and_never_the_attacker(phantom):
    attacker, config = ToyAttacker(), MitsganConfig(**SHORT)
    torch.manual_seed(0)
    task = ProtectTask(Protector(8, blocks=1), ProtectorDiscriminator(4, "ours"), attacker, config)
    before = {name: [p.clone() for p in net.parameters()] for name, net in {**task.networks, **task.frozen}.items()}
    losses = task.update(PlaceBatches([phantom[0]], config)(0, torch_rng(0)), lambda loss: loss.backward())
    for name, net in task.networks.items(): assert any(not torch.equal(a, b) for a, b in zip(before[name], net.parameters())), name
    for name, net in task.frozen.items(): assert all(torch.equal(a, b) for a, b in zip(before[name], net.parameters())), name
    assert {id(net) for net in task.frozen.values()} == {id(attacker.injector), id(attacker.remover), id(attacker.equalizer)}, "all of the attacker follows the training to its device"
    assert all(torch.isfinite(torch.as_tensor(v)) for v in losses.values())


def test_each_place_meets_a_cleaning_and_an_attacker_of_its_own(phantom):
    seen = []
    class Spy(ToyAttacker):
        def tamper_tensor(self, hu, at, spacing, action, noise=None):
            seen.append((self, hu.detach()))
            return super().tamper_tensor(hu, at, spacing, action)
    config = MitsganConfig(**SHORT, cleanings=("noise",), untouched=0.0)
    attackers = [Spy(), Spy()]
    task = ProtectTask(Protector(8, blocks=1), ProtectorDiscriminator(4, "ours"), attackers, config)
    batch = PlaceBatches([phantom[0]], config)(0, torch_rng(0))
    batch["draw"] = torch.tensor([4, 7])
    hu = batch["hu"].clone().requires_grad_(True)
    damage, lost = task.damage(batch, hu)
    assert [who for who, _ in seen] == [attackers[0]] * 2 + [attackers[1]] * 2  # draws 4 and 7; goal and forgery meet the same one
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][1], batch["hu"][0])  # the same noise, and there is some
    assert all(v == 0 for v in lost.values()) and torch.autograd.grad(damage, hu)[0].any()  # nothing was protected, so nothing is lost
    with pytest.raises(UsageError, match="bleach"): ProtectTask(task.networks["protector"], task.networks["discriminator"], attackers, MitsganConfig(**SHORT, cleanings=("bleach",), untouched=0.0)).damage(batch, hu)


def test_the_gradient_passes_through_the_attacker(phantom):
    attacker, config = ToyAttacker(), MitsganConfig(**SHORT)
    task = ProtectTask(Protector(8, blocks=1), ProtectorDiscriminator(4, "ours"), attacker, config)
    batch = PlaceBatches([phantom[0]], config)(0, torch_rng(0))
    protected = task.protect(batch).detach().requires_grad_(True)
    damage, _ = task.damage(batch, protected)
    slope, = torch.autograd.grad(damage, protected)
    boxes = torch.zeros(protected.shape, dtype=torch.bool)
    for i, at in enumerate(batch["at"].tolist()): boxes[(i, *middle_box(at, tuple(batch["spacing"].tolist()), protected.shape[1:]))] = True
    assert slope[~boxes].any(), "voxels outside the judged square matter only through the attacker"


def test_search_keeps_the_wave_that_damages_most(phantom):
    config = MitsganConfig(**{**SHORT, "search": (2, 2, 1)})
    task = ProtectTask(Protector(8, blocks=1), ProtectorDiscriminator(4, "ours"), ToyAttacker(), config)
    rows = search_wave(task, PlaceBatches([phantom[0]], config))
    assert len(rows) == 4 and {r["degrees"] for r in rows} == {0.0, 90.0} and {round(r["period_mm"], 3) for r in rows} == {2.7, 12.0} and rows[0]["damage_db"] == max(r["damage_db"] for r in rows)
    wave = task.networks["protector"].pattern.wave
    assert wave.norm().item() == pytest.approx(1 / rows[0]["period_mm"], rel=1e-5) and np.degrees(np.arctan2(*wave.tolist())) == pytest.approx(rows[0]["degrees"], abs=1e-3)
    with pytest.raises(UsageError, match="at least one"): search_wave(ProtectTask(task.networks["protector"], task.networks["discriminator"], ToyAttacker(), MitsganConfig(**{**SHORT, "search": (0, 1, 1)})), None)


def test_a_search_that_meets_nan_stops_and_names_the_wave(phantom):
    class Broken(ToyAttacker):
        def tamper_tensor(self, hu, *args, **kwargs): return super().tamper_tensor(hu, *args, **kwargs) * float("nan")

    task = ProtectTask(Protector(8, blocks=1), ProtectorDiscriminator(4, "ours"), Broken(), MitsganConfig(**{**SHORT, "search": (2, 2, 1)}))
    with pytest.raises(TrainError, match=r"wave of 2\.7 mm at 0 degrees is not finite"): search_wave(task, PlaceBatches([phantom[0]], task.config))


def test_a_wave_that_is_given_is_not_searched_and_trains_the_same(phantom):
    more = dict(data=[phantom[0]], **SHORT | {"search": (3, 2, 1)})
    searched = train_mitsgan("tiny", None, ToyAttacker(), **more)
    wave = tuple(searched.protector.pattern.wave.tolist())
    given = train_mitsgan("tiny", None, ToyAttacker(), wave=wave, **more | {"search": (0, 0, 0)})
    assert all(torch.equal(a, b) for a, b in zip(searched.protector.state_dict().values(), given.protector.state_dict().values()))
    assert train_mitsgan("tiny", None, ToyAttacker(), wave=(.1, 0.), **more).protector.pattern.wave.tolist() == pytest.approx([.1, 0.])


def test_the_wave_keeps_its_length_in_mm_and_is_never_finer_than_the_pixels():
    pattern = Pattern((1 / 3, 0.0))
    for spacing, pixels in ((0.5, 6.0), (1.0, 3.0), (1.4, 2.5), (5.0, 2.5)):
        column = pattern((600, 2), (spacing, spacing), torch.zeros(1))[0, 0, :, 0].numpy()
        assert 600 / np.abs(np.fft.rfft(column)).argmax() == pytest.approx(pixels, rel=0.01)
    assert not Pattern((0.0, 0.0))((4, 4), (1, 1), torch.zeros(1)).any()


def test_nothing_as_large_as_a_nodule_becomes_brighter_or_darker(phantom):
    net = trained("ours")
    torch.nn.init.constant_(net.body[-2].bias, 0.8)  # a network that would like to raise everything, and whose wave is clipped on one side
    scan = phantom[0]
    change = MitsGAN(net).protect(scan).hu - scan.hu.astype(float)
    lung = (scan.hu > -980) & (scan.hu < -500)
    assert np.abs(change).max() > 10 and abs(change[lung].mean()) < 0.05 * np.abs(change[lung]).mean()
    ones = torch.ones(1, 1, 30, 33)
    assert torch.allclose(local_mean(ones, (.7, .9), 12.0), ones), "also at the border"
    wide = torch.zeros(1, 1, 160, 160); wide[..., :80] = 1.0
    smooth = local_mean(wide, (1.0, 1.0), 12.0)[0, 0, 80]
    assert smooth[60] == 1 and smooth[100] == 0 and 0.3 < smooth[80] < 0.7


def test_a_smooth_protection_survives_a_blur(phantom):
    from mits_nb.protect.losses import blur
    kept = {}
    for smooth in (False, True):
        torch.manual_seed(0)
        net = Protector(8, wave=(1 / 9, 0.0), smooth=smooth, blocks=1).eval()
        torch.nn.init.normal_(net.body[-2].weight, std=0.2)
        change = torch.from_numpy(MitsGAN(net).protect(phantom[0]).hu - phantom[0].hu.astype(np.float32))
        kept[smooth] = (blur(change, 0.7).square().sum() / change.square().sum()).item()
    assert kept[True] > 0.6 and kept[True] > 1.3 * kept[False], kept


def test_attackers_are_tried_with_every_mask():
    attacker = ToyAttacker(); attacker.settings = Tampering()
    twins = with_masks([attacker], (20, 16))
    assert [t.settings.mask for t in twins] == [20, 16] and twins[0].injector is attacker.injector and attacker.settings.mask == Tampering().mask
    assert with_masks([attacker], ()) == [attacker]


def test_without_the_path_through_the_attacker_only_the_scan_itself_is_pushed(phantom):
    attacker, config = ToyAttacker(), MitsganConfig(**SHORT, through=False)
    task = ProtectTask(Protector(8, blocks=1), ProtectorDiscriminator(4, "ours"), attacker, config)
    batch = PlaceBatches([phantom[0]], config)(0, torch_rng(0))
    protected = task.protect(batch).detach().requires_grad_(True)
    slope, = torch.autograd.grad(task.damage(batch, protected)[0], protected)
    boxes = torch.zeros(protected.shape, dtype=torch.bool)
    for i, at in enumerate(batch["at"].tolist()): boxes[(i, *middle_box(at, tuple(batch["spacing"].tolist()), protected.shape[1:]))] = True
    assert slope[boxes].any() and not slope[~boxes].any()


def test_the_released_loss_is_a_mean_square_in_units_of_half_the_range_and_pushes_the_square_alone(phantom):
    scan = phantom[0]
    padded = scan.with_hu(np.where(np.arange(scan.shape[2]) < 2, np.int16(-2048), scan.hu)) # padding is no part of the range
    config = MitsganConfig(**{**SHORT, **{k: RELEASED[k] for k in ("variant", "noise", "squared", "through", "alpha", "fidelity")}})
    batch = PlaceBatches([padded], config)(0, torch_rng(0))
    low, high = batch["range"].tolist()
    assert (low, high) == (max(scan.hu.min(), -1024), scan.hu.max())
    task = ProtectTask(Protector(8, "released", noise="uniform"), ProtectorDiscriminator(4, "ours"), ToyAttacker(), config)
    protected = task.protect(batch).detach().requires_grad_(True)
    assert not torch.equal(task.protect(batch | {"range": torch.tensor([-1024.0, 3071.0])}), protected) # scaled by the range of its scan
    loss, _ = task.damage(batch, protected)
    boxes, expected = torch.zeros(protected.shape, dtype=torch.bool), 0.0
    for i, at in enumerate(batch["at"].tolist()):
        box = middle_box(at, tuple(batch["spacing"].tolist()), protected.shape[1:])
        boxes[(i, *box)] = True
        with torch.no_grad(): expected += ((task.attack(batch, i, protected[i]) - protected[i])[box] / ((high - low) / 2)).square().mean().item() / len(protected)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0
    slope, = torch.autograd.grad(loss, protected)
    assert slope[boxes].any() and not slope[~boxes].any()


def test_a_released_training_starts_with_blocks_that_do_nothing_and_keeps_its_own_record(phantom):
    before = train_mitsgan("tiny", None, ToyAttacker(), data=[phantom[0]], **{**RELEASED, **SHORT, "lr": 1e-9})
    blocks = [m for m in before.protector.body if isinstance(m, mitsgan.ResidualBlock)]
    x = torch.randn(1, SHORT["width"], 8, 8)
    assert len(blocks) == 3 and all(torch.allclose(block(x), x, atol=1e-5) for block in blocks)
    assert "L_m" in before.history.rows[-1] and "damage [dB]" not in before.history.rows[-1]


def test_patients_to_leave_out_can_be_named(monkeypatch):
    asked = []
    monkeypatch.setattr(mitsgan, "training_sources", lambda config, data: asked.append(config.held_out) or [])
    for config in (MitsganConfig, TafimConfig): # chapter 12 takes its scans from here as well
        training_scans(config(held_out=("A", "B"))); training_scans(config())
    assert asked == 2 * [("A", "B"), ("LIDC-IDRI-0003",)]


@pytest.mark.parametrize("variant", ["ours", "paper", "released"])
def test_training_writes_weights_that_load_and_repeats_itself(variant, phantom, tmp_path):
    train = lambda out: train_mitsgan("tiny", out, ToyAttacker(), data=[phantom[0]], seed=2, variant=variant, **SHORT)
    first, second = train(tmp_path / "a"), train(None)
    assert all(torch.equal(a, b) for a, b in zip(first.protector.state_dict().values(), second.protector.state_dict().values()))
    loaded = MitsGAN.from_pretrained(tmp_path / "a")
    assert len(loaded.history) and "| steps | 2 |" in (tmp_path / "a" / "card.md").read_text()
    assert np.array_equal(loaded.protect(phantom[0]).hu, first.protect(phantom[0]).hu)


class Faint(ToyAttacker):
    "An attacker whose forgeries turn into NaN after some calls."
    def __init__(self, after=6):
        super().__init__()
        self.calls, self.after = 0, after

    def tamper_tensor(self, hu, *args, **kwargs):
        self.calls += torch.is_grad_enabled()
        return super().tamper_tensor(hu, *args, **kwargs) * (float("nan") if self.calls > self.after else 1)


def test_training_stops_at_nan_and_keeps_the_last_good_checkpoint(phantom, tmp_path):
    settings = {**SHORT, "steps": 6}
    with pytest.raises(TrainError, match=r"nan after step 4: lower the learning rate"):
        train_mitsgan("tiny", tmp_path / "w", Faint(), data=[phantom[0]], checkpoint_every=1, **settings)
    kept = checkpoints(tmp_path / "w-training")
    assert [p.name for p in kept] == ["step-00000002", "step-00000003"] and not (tmp_path / "w").exists()
    tensors, state = read_checkpoint(kept[-1])
    assert state["step"] == 3 and all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    for name, given in {"width": dict(width=16), "attackers": dict(attacker=ToyAttacker())}.items():
        with pytest.raises(TrainError, match=f"another {name}"): train_mitsgan("tiny", tmp_path / "w", given.pop("attacker", Faint()), data=[phantom[0]], checkpoint_every=1, **settings | given)
    train_mitsgan("tiny", tmp_path / "w", Faint(99), data=[phantom[0]], checkpoint_every=1, **settings | {"lr": 1e-4})  # goes on from there, as the message advises
    assert len(MitsGAN.from_pretrained(tmp_path / "w").history) and not (tmp_path / "w-training").exists()


def test_checkpoints_by_default_come_often_enough_for_every_preset(phantom, tmp_path):
    assert often(1) == 1 and often(300) == 37 and often(400) == 50 and often(40_000) == 500
    with pytest.raises(TrainError, match="nan after step 4"): train_mitsgan("tiny", tmp_path / "w", Faint(), data=[phantom[0]], **{**SHORT, "steps": 6})
    assert read_checkpoint(checkpoints(tmp_path / "w-training")[-1])[1]["step"] == 3


def test_training_without_scans_or_with_unknown_settings_says_so():
    with pytest.raises(TrainError, match="no scans"): train_mitsgan("tiny", None, ToyAttacker(), data=[])
    with pytest.raises(UsageError, match="tinny"): train_mitsgan("tinny", None, ToyAttacker(), data=[])
    with pytest.raises(UsageError, match="widht"): train_mitsgan("tiny", None, ToyAttacker(), data=[], widht=3)


def test_evaluation_of_no_protection_finds_no_loss(phantom):
    places = np.array([[12, 80, 40], [11, 75, 120]])
    rows = evaluate_protection(lambda scan: scan, ToyAttacker(), phantom[0], places)
    assert len(rows) == 4 and all(row["lost_db"] == 0 and row["from_goal_hu"] == 0 for row in rows)
    assert set(summarise_protection(rows)) == {"inject", "remove"}


def test_shipped_weights_protect_a_phantom(phantom):
    mits = MitsGAN.from_pretrained("mitsgan-tiny")
    out = mits.protect(phantom[0])
    change = np.abs(out.hu.astype(int) - phantom[0].hu)
    assert 0 < change.max() <= mits.protector.strength_hu + 0.5 and out.history[-1]["by"] == "mitsgan-tiny"
