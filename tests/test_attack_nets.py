import json
import pytest
import torch
import torch.nn.functional as F

from mits_nb.attack.nets import Discriminator, Generator, SameConv3d, UpConv3d, conv_block, n_trainable, receptive_field, same_padding, upsample_conv
from mits_nb.core import WEIGHTS, OutputError, UsageError, WeightsError


@pytest.fixture(autouse=True)
def one_thread():
    "Networks of this size only wait for each other on two threads."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("cin, cout, shape", [(3, 1, (4, 5, 6)), (2, 3, (1, 1, 1)), (3, 9, (1, 1, 1)), (5, 8, (2, 2, 2)), (2, 8, (8, 8, 9)), (3, 16, (2, 1, 3)), (2, 7, (8, 9, 8))])
def test_upsample_conv_is_exact(cin, cout, shape):
    "Each of its four ways equals its definition, for values and for gradients of input, weight and bias."
    torch.manual_seed(0)
    conv, x = SameConv3d(cin, cout).double(), torch.randn(2, cin, *shape, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(conv.bias)
    push = torch.randn(2, cout, *(2 * n for n in shape), dtype=torch.float64)
    wanted, found = ((y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), push)) for y in (conv(F.interpolate(x, scale_factor=2)), upsample_conv(x, conv)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(wanted, found))


def naive_forward(net, cond):
    "The generator as the release has it: repeat voxels, convolve."
    x, skips = cond, []
    for block in net.down:
        x = block(x); skips.append(x)
    for block, skip in zip(net.up, reversed(skips[:-1])):
        x = torch.cat([block[1:](SameConv3d.forward(block[0], F.interpolate(x, scale_factor=2))), skip], dim=1)
    return torch.tanh(SameConv3d.forward(net.last, F.interpolate(x, scale_factor=2)))


@pytest.mark.parametrize("width, batch", [(3, 2), (8, 16)])
def test_quick_generator_is_the_released_function(width, batch):
    torch.manual_seed(0)
    net, x = Generator(width, dropout=0.), torch.rand(batch, 1, 32, 32, 32) - 0.5
    assert torch.allclose(net.eval()(x), naive_forward(net, x), atol=1e-5)
    if batch > 2: return
    net.double().train()
    (net(x.double()).square().mean()).backward()
    quick = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    naive_forward(net, x.double()).square().mean().backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-6, atol=1e-12) for a, p in zip(quick, net.parameters()))


def test_shipped_weights_load_and_compute_the_released_function():
    for name in ("injector", "remover"):
        net = Generator.from_pretrained(WEIGHTS / "ctgan-tiny" / name)
        x = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
        with torch.no_grad(): assert torch.allclose(net(x), naive_forward(net, x), atol=1e-5)


def test_layer_order_is_activation_then_norm():
    kinds = [type(m).__name__ for m in conv_block(1, 2)]
    assert kinds == ["SameConv3d", "LeakyReLU", "BatchNorm3d"]
    assert [type(m).__name__ for m in conv_block(1, 2, dropout=0.5)] == ["SameConv3d", "LeakyReLU", "Dropout", "BatchNorm3d"]
    assert [type(m).__name__ for m in conv_block(1, 2, order="norm_first")] == ["SameConv3d", "BatchNorm3d", "LeakyReLU"]
    assert all(m.momentum == 0.2 and m.eps == 1e-3 for m in Generator(width=1).modules() if isinstance(m, torch.nn.BatchNorm3d))
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in [*Generator(width=1).down[0], *Discriminator(width=1).body[0]])
    assert [type(m).__name__ for m in conv_block(1, 2, up=True)][0] == "UpConv3d" and all(isinstance(b[0], UpConv3d) for b in Generator(width=1).up)
    with pytest.raises(UsageError): conv_block(1, 2, order="norm_last")
    with pytest.raises(UsageError): conv_block(1, 2, 2, up=True)


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
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
    weights.write_bytes(b"")
    with pytest.raises(WeightsError): Generator.from_pretrained(folder)
    weights.write_bytes(good)
    config.write_text("{")
    with pytest.raises(WeightsError): Generator.from_pretrained(folder)
    config.write_text(json.dumps({**settings, "width": 3}))                  # other shapes
    with pytest.raises(WeightsError): Generator.from_pretrained(folder)
    config.write_text(json.dumps(settings))
    with pytest.raises(WeightsError): Discriminator.from_pretrained(folder)  # another network
    weights.unlink()
    with pytest.raises(WeightsError, match="model.safetensors"): Generator.from_pretrained(folder)
    with pytest.raises(WeightsError, match="no folder"): Generator.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("key, value", [("width", 3), ("order", "norm_first"), ("dropout", 0.25)])
def test_config_and_tensors_of_two_saves_are_told_apart(tmp_path, generator, key, value):
    "Order and dropout leave all shapes as they are: only the copy of the config inside the tensors' file shows the mix."
    folder = generator.save_pretrained(tmp_path / "net")
    other = Generator(**{"width": 2, key: value}).save_pretrained(tmp_path / "other")
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=rf"written for {key}=.* config.json says {value!r}"): Generator.from_pretrained(folder)
    assert {m.p for m in Generator.from_pretrained(other, dropout=0.1).modules() if isinstance(m, torch.nn.Dropout)} == {0.1}  # what the caller asks for is not a mix


def test_save_that_dies_between_its_files_is_noticed(tmp_path, generator, monkeypatch):
    from mits_nb.attack import nets
    folder = generator.save_pretrained(tmp_path / "net")
    def full(path, value): raise OutputError("disk full")
    monkeypatch.setattr(nets, "write_json", full)
    with pytest.raises(OutputError): Generator(width=2, order="norm_first").save_pretrained(folder)
    with pytest.raises(WeightsError, match="interrupted"): Generator.from_pretrained(folder)
    with pytest.raises(OutputError): generator.save_pretrained(tmp_path / "new")
    with pytest.raises(WeightsError, match="lacks config.json"): Generator.from_pretrained(tmp_path / "new")
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".tmp")]


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
