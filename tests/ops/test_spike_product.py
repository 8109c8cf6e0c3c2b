"""``bn_lif`` of a product that it makes again: it keeps less, and nothing else changes."""

import contextlib
import functools

import pytest
import torch
from kept import counted

from spikeclip.ops import SpikeProduct, _backends, bn_lif, lif, prepare_weights, spike_conv2d, spike_matmul, spike_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
POOL = (3, 2, 1)
WINDOW = {"stride": 1, "padding": 1}


def leaves(kind, dtype=torch.float32):
    """Currents before a first LIF [T, B, H, W, C], weights, bias, and BatchNorm's weight and bias."""
    shape = (40, 24) if kind == "matmul" else (24, 40, 3, 3)
    tensors = (torch.randn(3, 2, 6, 6, 40) + 0.5, torch.randn(shape), torch.randn(24), torch.rand(24) + 0.5, torch.randn(24))
    return [tensor.to(DEVICE, dtype if i in (1, 2) else None).requires_grad_() for i, tensor in enumerate(tensors)]


def layer(x, w, bias, gamma, beta, *running, again, pool=None, backend="auto", training=True, held=None, cast=None):
    """Packed spikes, product, BatchNorm and LIF; ``held`` in place of ``w``, the product cast."""
    s = lif(x, packed=True, backend=backend)[0]
    w = w if held is None else held
    options = {"backend": backend}
    if len(w.shape) == 2:
        y = spike_matmul(s, w, bias, **options)
    else:
        s, options = s.flatten(0, 1), {**options, **WINDOW}
        y = spike_conv2d(s, w, bias, **options).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
    product = SpikeProduct(s, w, bias, **options) if again else None
    y = y.to(cast or y.dtype)
    return bn_lif(y, *running, gamma, beta, training=training, pool=pool, product=product, backend=backend)


def outcome(call, given, autocast=False):
    """(what comes out, gradients and running statistics; the bytes kept)."""
    running = new_statistics()
    half = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()
    with counted([*given, *running]) as kept, half:
        s = call(*given, *running)
    wanted = [tensor for tensor in given if tensor.requires_grad]
    seed = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(s)
    return [s.detach(), *torch.autograd.grad(s, wanted, seed), *running], sum(kept.values())


def new_statistics():
    return torch.zeros(24, device=DEVICE), torch.ones(24, device=DEVICE)


def check_the_same(given, autocast=False, **options):
    """With the product made again and without, bit for bit; returns by how many bytes less is kept."""
    (want, more), (got, less) = (
        outcome(functools.partial(layer, again=again, **options), given, autocast) for again in (False, True)
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    return more - less


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "pool"), [("matmul", None), ("matmul", POOL), ("conv2d", None), ("conv2d", POOL)])
def test_the_same_numbers_for_less_memory(backend, training, kind, pool):
    saved = check_the_same(leaves(kind), pool=pool, backend=backend, training=training)
    values = 3 * 2 * 6 * 6 * 24
    pooled = 0 if pool is None else values // 4 * (4 + 1)  # and where each came from
    assert saved == 4 * values + pooled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("autocast", "cast"), [(True, None), (False, None), (False, torch.float16)])
def test_the_product_has_the_dtype_that_it_had(backend, kind, dtype, autocast, cast):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs on the plain torch backend")
    check_the_same(leaves(kind, dtype), autocast, backend=backend, cast=cast)


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
def test_a_backward_pass_inside_autocast(kind):
    """What autocast is then says nothing of the product, a dense one here."""
    x, *rest = leaves(kind)
    given, grads = [(x.detach() + 5.0).requires_grad_(), *rest], []
    for again in (False, True):
        s = layer(*given, *new_statistics(), again=again)
        with torch.autocast(DEVICE, torch.bfloat16):
            grads.append(torch.autograd.grad(s, given, torch.ones_like(s)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
@pytest.mark.parametrize("dtype", ["fp32", "int16", "int8"])
def test_weights_that_do_not_learn(kind, dtype):
    x, w, bias, *norm = leaves(kind)
    held = prepare_weights(w.detach(), dtype)
    check_the_same([x, w.detach(), bias.detach(), *norm], held=held)


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
def test_dense_enough_to_be_multiplied_densely(kind):
    x, *rest = leaves(kind)
    given = [(x.detach() + 5.0).requires_grad_(), *rest]
    assert lif(given[0])[0].mean() > 0.8
    check_the_same(given)


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_compiler_keeps_no_more(kind, autocast):
    """It does not merge the two products."""
    given, kept = leaves(kind), {}
    for again in (False, True):
        torch.compiler.reset()
        call = functools.partial(layer, again=again, pool=POOL)
        want, _ = outcome(call, given, autocast)
        got, kept[again] = outcome(torch.compile(call, fullgraph=True), given, autocast)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert kept[False] - kept[True] >= (2 if autocast else 4) * 3 * 2 * 6 * 6 * 24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
def test_ops_are_what_they_say_to_the_compiler(backend, kind):
    x, w, bias, *_ = (tensor.detach() for tensor in leaves(kind))
    words = lif(x, packed=True)[0].words.flatten(0, 1)
    window = () if kind == "matmul" else ([1, 1], [1, 1])
    op = getattr(torch.ops.spikeclip, f"spike_{kind}_again").default
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op, (words, 40, w, None, None, bias, *window, False, dtype, backend))


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
def test_weights_changed_before_the_backward_pass_are_an_error(kind):
    given = leaves(kind)
    s = layer(*given, *new_statistics(), again=True)
    with torch.no_grad():
        given[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(s, given[3], torch.ones_like(s))


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
@pytest.mark.parametrize("outer", [torch.square, torch.clone])
def test_a_second_derivative_is_refused(kind, outer):
    """Also where what comes to the layer has none, and only the weights have."""
    given = leaves(kind)
    loss = outer(layer(*given, None, None, again=True)).sum()
    (grad,) = torch.autograd.grad(loss, given[1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
    s = lif(given[0], packed=True)[0].flatten(0, 1)
    product = SpikeProduct(s, given[1], **(WINDOW if kind == "conv2d" else {}))
    with pytest.raises(RuntimeError, match=f"spike_{kind} has no second derivative"):
        spike_product.again(product.tensors, product.options).sum().backward()


def test_what_it_says_it_is():
    assert repr(SpikeProduct(S, torch.zeros(32, 8))) == "SpikeProduct(shape=[2, 4, 8])"
    spikes = S.flatten(0, 1)
    assert SpikeProduct(spikes, torch.zeros(32, 8)).shape == spike_matmul(spikes, torch.zeros(32, 8)).shape
    images = SpikeProduct(IMAGES, torch.zeros(8, 32, 3, 1), stride=(2, 3), padding=(1, 0))
    assert images.shape == (2, 2, 2, 8)
    bn_lif(torch.randn(2, 4, 8), None, None, product=SpikeProduct(spikes, torch.zeros(32, 8)))  # unflattened


S = lif(torch.ones(2, 4, 32), packed=True)[0]
IMAGES = lif(torch.ones(2, 4, 4, 32), packed=True)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SpikeProduct(torch.ones(2, 32), torch.zeros(32, 8)), TypeError, "s must be PackedSpikes; got Tensor"),
        (lambda: SpikeProduct(S, [1.0]), TypeError, "w must be a torch.Tensor or SpikeWeights; got list"),
        (lambda: SpikeProduct(S, torch.zeros(3, 32, 8)), ValueError, r"w must be float32.*of shape \[K, N\]"),
        (
            lambda: SpikeProduct(S, torch.zeros(31, 8)),
            ValueError,
            r"w of shape \[31, 8\] does not fit spikes of .*\[2, 4, 32\]",
        ),
        (lambda: SpikeProduct(S, torch.zeros(8, 32, 3, 3)), ValueError, "does not fit spikes"),
        (lambda: SpikeProduct(S, torch.zeros(32, 8), torch.zeros(7)), ValueError, r"bias must be .* of shape \[8\]"),
        (lambda: SpikeProduct(S, torch.zeros(32, 8), backend="gpu"), ValueError, "backend must be one of auto"),
        (lambda: SpikeProduct(IMAGES, torch.zeros(8, 32, 1, 1), padding=-1), ValueError, "padding must be an integer >= 0"),
        (lambda: SpikeProduct(S, torch.zeros(32, 8), stride=2), ValueError, "stride and padding are a convolution's; got 2"),
        (lambda: SpikeProduct(IMAGES, torch.zeros(8, 32, 5, 5)), ValueError, r"w's window \[5, 5\] must fit into the image"),
        (
            lambda: bn_lif(torch.zeros(4, 2, 8), None, None, product=SpikeProduct(S, torch.zeros(32, 8))),
            ValueError,
            r"product must be what x of shape \[4, 2, 8\] was made of",
        ),
        (
            lambda: bn_lif(torch.zeros(2, 8, 4), None, None, product=SpikeProduct(S, torch.zeros(32, 8))),
            ValueError,
            r"product must be what x of shape \[2, 8, 4\] was made of",
        ),
        (lambda: bn_lif(torch.zeros(2, 4, 8), None, None, product=S), TypeError, "product must be a SpikeProduct or None"),
        (
            lambda: bn_lif(torch.zeros(2, 5, 8), None, None, product=SpikeProduct(S, torch.zeros(32, 8))),
            ValueError,
            r"product must be what x of shape \[2, 5, 8\] was made of; got one of shape \[2, 4, 8\]",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
