import copy

import pytest
import torch
from compare import assert_error_bounded
from torch import nn

from spikeclip import nn as snn
from spikeclip.ops import pack_spikes
from spikeclip.ops.spike_product import again

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {1: (nn.Conv1d, snn.SpikeConv1d), 2: (nn.Conv2d, snn.SpikeConv2d)}
GEOMETRY = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 4, "stride": 3, "padding": 2},
    {"kernel_size": 5, "padding": "same"},
    {"kernel_size": 4, "padding": "valid", "bias": False},
]
ONLY_2D = [
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (2, 0)},
    {"kernel_size": (3, 1), "padding": "same"},
]
CASES = [(dims, options) for dims in (1, 2) for options in GEOMETRY] + [(2, options) for options in ONLY_2D]


def spikes(dims, batch=(3,), channels=35, dtype=torch.float32):
    return (torch.rand(*batch, channels, *(7, 9)[:dims]) < 0.2).to(DEVICE, dtype)


def pair(dims, dtype=torch.float32, **options):
    """torch's layer and ours with its weights."""
    plain, ours = (kind(35, 6, **options, device=DEVICE, dtype=dtype) for kind in KINDS[dims])
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def run(layer, x, seed):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(seed.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def check(dims, x, dtype=torch.float32, **options):
    plain, ours = pair(dims, dtype, **options)
    with torch.no_grad():
        seed = torch.randn_like(plain(x))
    want = run(copy.deepcopy(plain).double(), x.double(), seed)
    for got, reference, oracle in zip(run(ours, x, seed), run(plain, x, seed), want, strict=True):
        assert got.dtype == dtype and got.shape == oracle.shape
        assert_error_bounded(got, reference, oracle, floor=FLOOR[dtype])
    with torch.no_grad():
        assert ours(x).dtype == dtype and ours(x).stride() == plain(x).stride()
        assert_error_bounded(ours(x), plain(x), want[0], floor=FLOOR[dtype])


@pytest.mark.parametrize(("dims", "options"), CASES, ids=str)
def test_numbers_and_gradients_are_torchs(dims, options):
    check(dims, spikes(dims), **options)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dims, dtype):
    check(dims, spikes(dims, dtype=dtype), dtype, kernel_size=3, padding=1)


@pytest.mark.parametrize("dims", KINDS)
def test_one_image_without_a_batch(dims):
    check(dims, spikes(dims, batch=()), kernel_size=3, padding=1)


def test_answers_lie_in_memory_as_torchs_do():
    plain, ours = pair(2, kernel_size=3, padding=1)
    for x in (spikes(2), spikes(2).to(memory_format=torch.channels_last), spikes(2).expand(3, -1, -1, -1)[:, :, ::1]):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert ours(x).stride() == plain(x).stride()
    plain, ours = (layer.to(memory_format=torch.channels_last) for layer in (plain, ours))
    assert ours(spikes(2)).stride() == plain(spikes(2)).stride()


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("batch", [(3,), ()], ids=str)
def test_packed_spikes(dims, batch):
    plain, ours = pair(dims, kernel_size=3, stride=2, padding=1)
    x = spikes(dims, batch)
    packed = pack_spikes(x.movedim(-1 - dims, -1))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(packed), plain(x), rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(plain(x))
    ours(packed).backward(seed)
    plain(x).backward(seed)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", KINDS)
def test_state_dicts_copies_and_kept_weights(dims):
    plain, ours = pair(dims, kernel_size=3)
    assert isinstance(ours, type(plain)) and list(ours.state_dict()) == list(plain.state_dict())
    x = spikes(dims)
    with torch.no_grad():
        ours(x)
        other = copy.deepcopy(ours)
        assert "_prepared" not in vars(other)
        for p in ours.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(ours.parameters(), 0.5).step()
        torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-5)
        plain.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.half()(x.half()), plain.half()(x.half()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_answers_in_its_dtype(dims, grad):
    plain, ours = pair(dims, kernel_size=3)
    x = spikes(dims)
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.bfloat16):
        got, reference = ours(x), plain(x)
    assert got.dtype == reference.dtype == torch.bfloat16
    assert_error_bounded(got, reference, plain.double()(x.double()), floor=8e-3)


@pytest.mark.parametrize("dims", KINDS)
def test_compiles_into_one_graph(dims):
    _, ours = pair(dims, kernel_size=3, padding="same")
    compiled = torch.compile(ours, fullgraph=True)
    x = spikes(dims)
    seed = torch.randn_like(ours(x))
    for mine, theirs in zip(run(compiled, x, seed), run(copy.deepcopy(ours), x, seed), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilation": 2}, r"dilation must be 1 .*got \(2"),
        ({"groups": 2}, "groups must be 1 .*got 2"),
        ({"padding_mode": "circular"}, "padding_mode must be 'zeros' .*got 'circular'"),
        ({"padding": "same", "kernel_size": 4}, r"padding='same' needs odd kernel_size .*got \(4"),
    ],
)
def test_arguments_without_a_kernel_are_refused(dims, options, message):
    with pytest.raises(ValueError, match=message):
        KINDS[dims][1](4, 4, **{"kernel_size": 3, **options})


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (snn.SpikeConv2d(4, 4, 3), torch.zeros(4, 5), ValueError, r"input must have shape \[C, H, W\] or .*got \[4, 5\]"),
        (snn.SpikeConv1d(4, 4, 3), torch.zeros(1, 1, 4, 5), ValueError, r"input must have shape \[C, L\] or .*got \[1, 1"),
        (snn.SpikeConv2d(4, 4, 3), torch.zeros(2, 5, 5, 5), ValueError, "s must have C = 4 channels.*got 5"),
        (snn.SpikeConv1d(4, 4, 3), torch.zeros(2, 5, 5), ValueError, "s must have C = 4 channels.*got 5"),
        (snn.SpikeConv2d(4, 4, 7), torch.zeros(2, 4, 5, 5), ValueError, "window.*must fit"),
        (snn.SpikeConv2d(4, 4, 3), None, TypeError, "s must be a torch.Tensor or PackedSpikes; got NoneType"),
        (snn.SpikeConv1d(4, 4, 3), [0.0], TypeError, "s must be a torch.Tensor or PackedSpikes; got list"),
    ],
)
def test_bad_input_names_the_argument(layer, x, error, message):
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.parametrize("options", [options for dims, options in CASES if dims == 2])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_an_answer_was_made_of_makes_it_again(options, backend):
    layer = snn.SpikeConv2d(40, 24, **options, backend=backend)
    y, product = layer(pack_spikes((torch.rand(2, 9, 8, 40) < 0.3).float()), with_product=True)
    assert product.shape == y.permute(0, 2, 3, 1).shape and product.options[-1] == backend
    assert torch.equal(again(product.tensors, product.options).permute(0, 3, 1, 2), y)
    with pytest.raises(TypeError, match="s must be PackedSpikes; got Tensor"):
        layer(torch.zeros(2, 40, 9, 8), with_product=True)
