import json
import pytest
import torch
import torch.nn.functional as F

from mits_nb.attack.nets import Discriminator, Generator, SameConv3d, conv_block, n_trainable, receptive_field, same_padding
from mits_nb.core import UsageError, WeightsError


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(width=2).eval()


def test_full_size_parameter_counts():
    with torch.device("meta"):
        assert n_trainable(Generator(width=100)) == 162_590_401
        assert n_trainable(Discriminator(width=100)) == 26_948_301
        assert n_trainable(Generator()) + n_trainable(Discriminator()) == 189_538_702


def test_tiny_width_fits_the_size_limit():
    with torch.device("meta"):
        assert 2 * n_trainable(Generator(width=16)) < 12e6                 # bytes in float16


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 32])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_gives_kerass_output_size(n, stride):
    before, after = same_padding(n, 4, stride)
    assert 0 <= after - before <= 1
    assert (n + before + after - 4) // stride + 1 == -(-n // stride)


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 6, 5), (2, 4, 8)])
def test_same_convolution_equals_the_definition(shape):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *shape)
    for stride in (1, 2):
        conv = SameConv3d(3, 4, 4, stride)
        pads = [p for n in reversed(shape) for p in same_padding(n, 4, stride)]
        assert torch.allclose(conv(x), F.conv3d(F.pad(x, pads), conv.weight, conv.bias, stride), atol=1e-5)
        assert conv(x).shape[2:] == tuple(-(-n // stride) for n in shape)


def test_layer_order_is_activation_then_norm():
    kinds = [type(m).__name__ for m in conv_block(1, 2)]
    assert kinds == ["SameConv3d", "LeakyReLU", "BatchNorm3d"]
    assert [type(m).__name__ for m in conv_block(1, 2, dropout=0.5)] == ["SameConv3d", "LeakyReLU", "Dropout", "BatchNorm3d"]
    assert [type(m).__name__ for m in conv_block(1, 2, order="norm_first")] == ["SameConv3d", "BatchNorm3d", "LeakyReLU"]
    assert all(m.momentum == 0.2 and m.eps == 1e-3 for m in Generator(width=1).modules() if isinstance(m, torch.nn.BatchNorm3d))
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in [*Generator(width=1).down[0], *Discriminator(width=1).body[0]])
    with pytest.raises(UsageError): conv_block(1, 2, order="norm_last")


def test_shapes_and_range(generator):
    y = generator(torch.randn(2, 1, 32, 32, 32))
    assert y.shape == (2, 1, 32, 32, 32) and y.abs().max() <= 1
    assert Discriminator(width=2)(y, y).shape == (2, 1, 2, 2, 2)


def test_evaluation_is_deterministic_and_training_is_not(generator):
    x = torch.randn(2, 1, 32, 32, 32)
    assert torch.equal(generator(x), generator(x))
    noisy = Generator(width=2).train()
    assert not torch.equal(noisy(x), noisy(x))                              # dropout


def test_every_output_depends_on_far_inputs(generator):
    x = torch.randn(1, 1, 32, 32, 32, requires_grad=True)
    generator(x)[0, 0, 0, 0, 0].backward()
    assert x.grad[0, 0, 31, 31, 31] != 0


def test_discriminator_uses_the_condition():
    torch.manual_seed(0)
    net, x = Discriminator(width=2).eval(), torch.randn(1, 1, 32, 32, 32)
    assert not torch.equal(net(x, x), net(x, torch.zeros_like(x)))


@pytest.mark.parametrize("shape", [(1, 1, 30, 32, 32), (1, 2, 32, 32, 32), (32, 32, 32), (1, 1, 16, 16, 16)])
def test_generator_refuses_wrong_shapes(generator, shape):
    with pytest.raises(UsageError, match="generator got shape"): generator(torch.zeros(shape))


def test_discriminator_refuses_unequal_shapes():
    with pytest.raises(UsageError): Discriminator(width=1)(torch.zeros(1, 1, 32, 32, 32), torch.zeros(2, 1, 32, 32, 32))


def test_receptive_field():
    assert receptive_field([(4, 2)] * 4 + [(4, 1)]) == (94, 16)
    assert receptive_field([(3, 1), (3, 1)]) == (5, 1)


@pytest.mark.parametrize("half", [False, True])
def test_save_and_load(tmp_path, generator, half, capsys):
    folder = generator.save_pretrained(tmp_path / "net", half=half)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    back = Generator.from_pretrained(folder)
    assert back.width == 2 and not back.training and next(back.parameters()).dtype == torch.float32
    x = torch.randn(1, 1, 32, 32, 32)
    assert torch.allclose(back(x), generator(x), atol=5e-3 if half else 0)
    assert capsys.readouterr().out == ""


def test_bad_weights_are_refused_in_one_sentence(tmp_path, generator):
    folder = generator.save_pretrained(tmp_path / "net")
    config, weights = folder / "config.json", folder / "model.safetensors"
    good, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(good[: len(good) // 2])                              # cut short
    with pytest.raises(WeightsError) as e: Generator.from_pretrained(folder)
    assert "\n" not in str(e.value)
    weights.write_bytes(good)
    config.write_text(json.dumps({**settings, "width": 3}))                  # other shapes
    with pytest.raises(WeightsError): Generator.from_pretrained(folder)
    config.write_text(json.dumps(settings))
    with pytest.raises(WeightsError): Discriminator.from_pretrained(folder)  # another network
    weights.unlink()
    with pytest.raises(WeightsError, match="model.safetensors"): Generator.from_pretrained(folder)
    with pytest.raises(WeightsError, match="no folder"): Generator.from_pretrained(tmp_path / "nowhere")


def test_missing_tensor_is_refused(tmp_path, generator):
    from safetensors.torch import load_file, save_file
    folder = generator.save_pretrained(tmp_path / "net")
    state = load_file(folder / "model.safetensors")
    state.pop("last.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError): Generator.from_pretrained(folder)


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    g, d = Generator(width=2), Discriminator(width=2)
    x = torch.randn(2, 1, 32, 32, 32)
    d(g(x), x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for net in (g, d) for p in net.parameters())
