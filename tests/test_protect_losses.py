"""Edges and properties of mits_nb.protect.losses."""
import math

import pytest
import torch

from mits_nb.attack.tamper import Equalizer, Tampering, centre_mask, cuboid_box, harmonic_inpaint, tamper_tensor
from mits_nb.core import UsageError, torch_rng
from mits_nb.protect.losses import (domain_loss, finite_difference_check, fooling_loss, forgery_damage, protector_losses, tamper_gradients,
                                    tamper_loss)

AT, SPACING = (8.0, 24.0, 25.5), (2.5, 0.8, 0.8)


def lung(seed=0, shape=(16, 48, 48)):
    "A patch of noisy lung with a vessel, float64 HU."
    hu = -850 + 30 * torch.randn(shape, generator=torch_rng(seed, "test lung"), dtype=torch.float64)
    hu[:, 8:12] += 700
    return hu


class FrozenNet(torch.nn.Module):
    "A small frozen in-painter that reads the whole cube."

    def __init__(self):
        super().__init__()
        generator = torch_rng(0, "test in-painter")
        self.first, self.second = torch.nn.Conv3d(1, 2, 4, stride=4), torch.nn.ConvTranspose3d(2, 1, 16, stride=4, padding=6)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
            p.requires_grad_(False)
        self.double()

    def forward(self, x):
        return 0.4 * torch.tanh(self.second(torch.nn.functional.leaky_relu(self.first(x), 0.2)))


NETS = {"network": FrozenNet(), "harmonic": lambda cond: harmonic_inpaint(cond, centre_mask(32, 16))}


def attack(kind="network"):
    "The whole pipeline of chapter 8 around a frozen in-painter."
    equalizer = Equalizer().fit(lung(3)).double()
    return lambda hu: tamper_tensor(hu, AT, SPACING, NETS[kind], Tampering(), equalizer)


def test_domain_loss_is_minus_the_cross_entropy_and_stays_finite():
    real, fake = torch.randn(50, generator=torch_rng(0)), torch.randn(50, generator=torch_rng(1))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert torch.allclose(domain_loss(real, fake), -bce(real, torch.ones(50)) - bce(fake, torch.zeros(50)), atol=1e-6)
    assert torch.isfinite(domain_loss(torch.tensor([500.0]), torch.tensor([500.0])))
    assert torch.isclose(domain_loss(torch.zeros(1), torch.zeros(1)), torch.tensor(-2 * math.log(2)))


@pytest.mark.parametrize("form", ["saturating", "nonsaturating"])
def test_both_forms_push_towards_looking_untouched(form):
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(fooling_loss(logits, form) * 9, logits)
    assert (slope < 0).all()
    caught, safe = slope[0].abs(), slope[-1].abs()
    assert caught < safe if form == "saturating" else caught > safe


def test_unknown_form_is_named():
    with pytest.raises(UsageError, match="'hinge'.*nonsaturating"):
        fooling_loss(torch.zeros(1), "hinge")


def test_protector_losses_reward_manipulation_and_alpha_scales_it():
    logits, more, less = torch.zeros(3), torch.tensor(5.0), torch.tensor(1.0)
    assert protector_losses(logits, logits, more)["generator"] < protector_losses(logits, logits, less)["generator"]
    a, b = (protector_losses(logits, logits, more, alpha=alpha)["generator"] for alpha in (0.0, 2.0))
    assert torch.isclose(a - b, torch.tensor(10.0))
    assert torch.isclose(protector_losses(logits, logits, more)["discriminator"], torch.tensor(2 * math.log(2)))


def test_same_value_other_gradient():
    x = lung().requires_grad_(True)
    with_path, without = tamper_loss(attack(), x), tamper_loss(attack(), x, through_attacker=False)
    assert torch.equal(with_path, without)
    g1, = torch.autograd.grad(with_path, x)
    g2, = torch.autograd.grad(without, x)
    assert not torch.allclose(g1, g2)


def test_without_the_path_only_overwritten_voxels_are_pushed():
    pair = tamper_gradients(attack(), lung())
    forged = attack()(lung())
    untouched = forged == lung()
    assert not pair.without_path[untouched].any(), "voxels that the attack leaves alone get no gradient"
    read = torch.zeros_like(untouched)
    read[tuple(slice(*b) for b in cuboid_box(AT, SPACING, forged.shape))] = True
    assert pair.with_path[untouched & read].norm() > 0, "through the attacker the rim gets one"
    assert not pair.with_path[~read & untouched].double().abs().gt(0).all()
    assert 0 < pair.angle_degrees < 180


def test_angle_of_a_zero_gradient_is_not_a_number():
    assert math.isnan(tamper_gradients(lambda hu: hu, lung()).angle_degrees)


@pytest.mark.parametrize("kind", ["network", "harmonic"])
@pytest.mark.parametrize("place", [AT, (0.0, 20.0, 20.0), (7.3, 4.0, 44.2)])
def test_gradient_through_the_pipeline_by_finite_differences(kind, place):
    equalizer = Equalizer().fit(lung(3)).double()
    fn = lambda hu: tamper_tensor(hu, place, SPACING, NETS[kind], Tampering(), equalizer)
    result = finite_difference_check(lambda x: tamper_loss(fn, x), lung(), n=4, eps=1e-4)
    assert result.relative_error < 1e-4


def test_finite_differences_catch_the_missing_path():
    x, fn = lung(), attack()
    box = torch.zeros(x.shape, dtype=torch.bool)
    box[tuple(slice(*b) for b in cuboid_box(AT, SPACING, x.shape))] = True
    rim = box & (fn(x) == x)
    wrong = finite_difference_check(lambda v: tamper_loss(fn, v, through_attacker=False) if v.requires_grad else tamper_loss(fn, v), x, region=rim, eps=1e-4)
    right = finite_difference_check(lambda v: tamper_loss(fn, v), x, region=rim, eps=1e-4)
    assert wrong.relative_error == pytest.approx(1.0) and right.relative_error < 1e-3


def test_finite_differences_refuse_what_they_cannot_judge():
    with pytest.raises(UsageError, match="float64"):
        finite_difference_check(lambda x: x.sum(), torch.zeros(3))
    with pytest.raises(UsageError, match="empty"):
        finite_difference_check(lambda x: x.sum(), torch.zeros(3).double(), region=torch.zeros(3, dtype=torch.bool))


def test_finite_differences_see_a_wrong_gradient():
    class Lie(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return (x ** 2).sum()

        @staticmethod
        def backward(ctx, g): return g * torch.ones(5, dtype=torch.float64)

    assert finite_difference_check(Lie.apply, torch.arange(5.0).double()).relative_error > 0.1


def test_damage_is_minus_psnr_up_to_the_peak():
    from mits_nb.metrics import psnr

    a, b = lung(0), lung(1)
    damage = forgery_damage(a, b, floor_hu=0).item()
    assert damage == pytest.approx(20 * math.log10(4096) - psnr(a.numpy(), b.numpy(), peak=4096))
    assert forgery_damage(a, a).item() == 0 and torch.isfinite(forgery_damage(a, a))


def test_scale_and_box_of_the_tamper_loss():
    x, fn = lung(), attack()
    assert torch.isclose(tamper_loss(fn, x) / 1e4, tamper_loss(fn, x, scale_hu=100.0))
    box = tuple(slice(*b) for b in cuboid_box(AT, SPACING, x.shape))
    assert tamper_loss(fn, x, box=box) > tamper_loss(fn, x)
