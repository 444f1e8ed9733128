"""Edges and properties of mits_nb.protect.losses."""
import math

import pytest
import torch

from mits_nb.attack.tamper import Equalizer, Tampering, centre_mask, cuboid_box, harmonic_inpaint, tamper_tensor
from mits_nb.core import UsageError, torch_rng
from mits_nb.protect.losses import (CLEANINGS, blur, blur_by, clean_jpeg_ls, domain_loss, draw_shift, finite_difference_check, fooling_loss, forgery_damage,
                                    protector_losses, random_cleaning, straight_through, tamper_gradients, tamper_loss)

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
    near = torch.zeros_like(read)
    near[tuple(slice(max(a - 2, 0), b + 2) for a, b in cuboid_box(AT, SPACING, forged.shape))] = True  # the interpolation reads no more than two voxels beyond
    assert not near.all() and not pair.with_path[~near].any() and not pair.without_path[~near].any(), "farther away nothing matters"
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


# ---- an attacker who cleans first

STRAIGHT = ("non-local means", "8-bit", "jpeg")


def patch(dtype=torch.float32):
    return lung(2, (3, 40, 44)).to(dtype)


@pytest.mark.parametrize("name", list(CLEANINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cleanings_keep_shape_and_type_depend_on_the_generator_alone_and_let_the_gradient_through(name, dtype):
    hu, spacing = patch(dtype).requires_grad_(True), (2.5, 0.8, 0.8)
    before = hu.detach().clone()
    run = lambda seed: CLEANINGS[name](hu, spacing, torch_rng(seed, "test"))
    torch.manual_seed(0)
    first = run(1)
    torch.manual_seed(1)
    assert first.shape == hu.shape and first.dtype == dtype and torch.equal(first, run(1)) and torch.equal(hu, before)
    assert torch.isfinite(first).all() and (first - hu).abs().max() > 0
    assert name == "median" or not torch.equal(first, run(2)), "another seed, another draw"
    slope, = torch.autograd.grad(first.sum(), hu)
    assert torch.isfinite(slope).all() and slope.sum() > 0.5 * hu.numel(), "what goes in comes out, so the slopes sum to about one a voxel"


@pytest.mark.parametrize("name", [n for n in CLEANINGS if n not in STRAIGHT])
def test_gradients_of_the_exact_cleanings_by_finite_differences(name):
    f = lambda v: (CLEANINGS[name](v, (2.5, 0.8, 0.8), torch_rng(3, "test")) + 800).square().mean()
    assert finite_difference_check(f, patch(torch.float64), n=3, eps=1e-3).relative_error < 1e-3


def test_a_broken_gradient_would_be_seen():
    f = lambda v: (straight_through(lambda w: blur(w, 1.5), v) + 800).square().mean()
    assert finite_difference_check(f, patch(torch.float64), n=3, eps=0.01).relative_error > 0.1


@pytest.mark.parametrize("sigma", [0.0, 0.7, 1.5, (0.5, 0.0, 2.0)])
def test_blur_is_the_gaussian_of_scipy(sigma):
    from scipy.ndimage import gaussian_filter

    wide = (0, sigma, sigma) if isinstance(sigma, float) else sigma
    assert torch.allclose(blur(patch(torch.float64), sigma), torch.from_numpy(gaussian_filter(patch(torch.float64).numpy(), wide, mode="nearest", truncate=4)), atol=1e-8)
    assert torch.equal(blur_by(sigma)(patch(), (1, 1, 1), None), blur(patch(), sigma))


def test_blur_along_z_is_as_wide_in_mm_and_vanishes_on_thick_slices():
    hu = torch.zeros(9, 9, 9)
    hu[4, 4, 4] = 1
    cube = CLEANINGS["blur"](hu, (1.0, 1.0, 1.0), torch_rng(0, "b"))
    assert torch.allclose(cube, cube.permute(2, 0, 1), atol=1e-7)
    thick = CLEANINGS["blur"](hu, (50.0, 1.0, 1.0), torch_rng(0, "b"))
    assert not thick[[3, 5]].any() and torch.allclose(thick[4].sum(), torch.tensor(1.0), atol=1e-3)


def test_median_is_that_of_scipy_and_a_tiny_slice_survives_every_cleaning():
    from scipy.ndimage import median_filter

    assert torch.equal(CLEANINGS["median"](patch()), torch.from_numpy(median_filter(patch().numpy(), (1, 3, 3), mode="nearest")))
    for name, clean in CLEANINGS.items():
        for constant in (torch.full((1, 8, 8), -850.0), torch.full((2, 8, 8), 3071.0)):
            out = clean(constant, (2.5, 0.8, 0.8), torch_rng(0, name))
            assert out.shape == constant.shape and torch.isfinite(out).all()


def test_errors_of_codecs_and_grey_levels_are_as_small_as_promised():
    hu = patch()
    grey = CLEANINGS["8-bit"](hu, generator=torch_rng(0))
    inside = (hu > -995) & (hu < 395)
    assert (grey - hu)[inside].abs().max() <= 1400 / 255 / 2 + 1e-3 and grey.max() < 404 and len(grey.unique()) <= 256
    for seed in range(4):
        jpeg = CLEANINGS["jpeg"](hu, generator=torch_rng(seed))
        assert torch.equal(jpeg, jpeg.round()) and (jpeg - hu).square().mean().sqrt() < 13
    padding = torch.full((1, 16, 16), -2048.0)
    assert CLEANINGS["jpeg"](padding, generator=torch_rng(0)).min() >= -1024, "padding becomes air, as in any 12-bit file"


def test_jpeg_ls_keeps_its_bound_or_says_what_to_install(monkeypatch):
    import sys

    with monkeypatch.context() as m:
        m.setitem(sys.modules, "jpeg_ls", None)
        with pytest.raises(UsageError, match="pip install pyjpegls"):
            clean_jpeg_ls(patch())
    pytest.importorskip("jpeg_ls")
    assert (clean_jpeg_ls(patch(), generator=torch_rng(0)) - patch().round()).abs().max() <= 10
    assert "jpeg-ls" not in CLEANINGS


def test_shift_reads_between_the_voxels_of_a_ramp():
    ramp = sum(torch.arange(n, dtype=torch.float64).view([-1 if a == axis else 1 for a in range(3)]) * 10 ** axis for axis, n in enumerate((6, 8, 10)))
    step = draw_shift(torch_rng(5, "s"))
    out = CLEANINGS["shift"](ramp, (1, 1, 1), torch_rng(5, "s"))
    inner = (slice(1, -1),) * 3
    assert max(map(abs, step)) <= 0.5 and torch.allclose((out - ramp)[inner], torch.tensor(sum(d * 10 ** axis for axis, d in enumerate(step)), dtype=torch.float64))


def test_noise_has_the_level_it_says():
    hu = torch.zeros(4, 64, 64)
    levels = [CLEANINGS["noise"](hu, generator=torch_rng(seed)).std().item() for seed in range(20)]
    assert min(levels) > 4.5 and max(levels) < 26 and max(levels) > 2 * min(levels)


def test_random_cleaning_draws_all_and_sometimes_none():
    hu = patch()
    seen = [random_cleaning(hu, (2.5, 0.8, 0.8), torch_rng(seed, "draw"), ("blur", "8-bit"), 0.5) for seed in range(40)]
    untouched = sum(out is hu for out in seen)
    assert 8 <= untouched <= 32 and sum(len(out.unique()) <= 256 for out in seen if out is not hu) not in (0, 40 - untouched)
    assert random_cleaning(hu, (1, 1, 1), torch_rng(0), untouched=1.0) is hu


def test_cleanings_refuse_what_they_cannot_clean():
    for bad in (torch.zeros(4, 4, 4, dtype=torch.int16), torch.zeros(4, 4), patch().numpy()):
        with pytest.raises(UsageError, match="floating-point tensor"):
            CLEANINGS["blur"](bad)
    with pytest.raises(UsageError, match="negative"):
        blur(patch(), -1.0)
    with pytest.raises(UsageError, match="'bleach'.*'blur'"):
        random_cleaning(patch(), (1, 1, 1), torch_rng(0), ("bleach",))
    with pytest.raises(UsageError, match="none given"):
        random_cleaning(patch(), (1, 1, 1), torch_rng(0), ())


def test_cleanings_work_in_full_precision_under_autocast():
    hu = patch()
    for name in ("blur", "resample", "median", "shift"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = CLEANINGS[name](hu, (2.5, 0.8, 0.8), torch_rng(0))
        assert torch.equal(inside, CLEANINGS[name](hu, (2.5, 0.8, 0.8), torch_rng(0)))
