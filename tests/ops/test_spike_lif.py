import pytest
import torch
from torch.nn import functional as F

from spikeclip.ops import (
    PackedSpikes,
    _backends,
    lif,
    pack_spikes,
    prepare_weights,
    spike_attention,
    spike_attention_lif,
    spike_conv2d_lif,
    spike_matmul_lif,
)

INTERPRETED = _backends.triton_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
KINDS = ["fp32", "int16", "int8"]
BAND = 2e-5


def spikes(*shape, rate=0.2):
    """Drawn on the CPU, as all here: a seed means the same on every device."""
    return (torch.rand(shape) < rate).float().to(DEVICE)


def in_common(steps, *shape):
    """Spikes of neurons that fire at every second step, at the last three or at all, and a few of others."""
    t, kind = torch.arange(steps).view(-1, *[1] * len(shape)), torch.rand(shape)
    often = ((kind < 0.1) & (t % 2 == 0)) | ((kind > 0.8) & (t >= steps - 3)) | ((kind > 0.4) & (kind < 0.5))
    return (often | (torch.rand(steps, *shape) < 0.02)).float().to(DEVICE)


def normal(*shape):
    return torch.randn(shape).to(DEVICE)


def truth(currents, **neuron):
    """(spikes, least distance of a neuron's membrane to the threshold over the steps), float64."""
    s, _ = lif(currents, backend="torch", **neuron)
    options = {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": True, **neuron}
    rest = options["v_reset"] or 0.0
    v, near = torch.full_like(currents[0], rest), torch.full_like(currents[0], torch.inf)
    for x, fired in zip(currents, s, strict=True):
        leak = v - rest
        h = v + (x - leak) / options["tau"] if options["decay_input"] else v - leak / options["tau"] + x
        near = near.minimum((h - options["v_threshold"]).abs())
        v = h - fired * options["v_threshold"] if options["v_reset"] is None else torch.where(fired > 0, rest, h)
    return s, near


def assert_same(got, currents, **neuron):
    """A spike turned by rounding turns its neuron's later ones too, so neurons that come near the threshold are left out."""
    want, near = truth(currents, **neuron)
    clear = near > BAND
    assert clear.float().mean() > 0.99
    assert torch.equal(got.unpack(torch.float64)[:, clear], want[:, clear])
    assert 0.01 < want.mean() < 0.99


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3, 7, 40), (1, 1, 33), (3, 300, 400), (5, 2, 129), (16, 9, 64)])
@pytest.mark.parametrize("columns", [1, 16, 40, 100, 160])
def test_product_and_neurons_equal_the_two(backend, kind, shape, columns):
    if INTERPRETED and shape == (3, 300, 400):
        shape = (3, 30, 400)
    s = spikes(*shape)
    w = prepare_weights(normal(shape[-1], columns) * 0.5, kind)
    bias = normal(columns)
    for neuron in ({}, {"tau": 3.0, "v_threshold": 0.7, "v_reset": None, "decay_input": False}):
        currents = s.double() @ w.dequantize().double() + bias.double()
        if currents.numel() < 100:
            bias = torch.full_like(bias, 1.6)
            currents = s.double() @ w.dequantize().double() + bias.double()
        got = spike_matmul_lif(pack_spikes(s), w, bias, backend=backend, **neuron)
        assert got.shape == currents.shape
        if currents.numel() >= 100:
            assert_same(got, currents, **neuron)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_stream_is_added_and_kept(backend, kind):
    s, stream = spikes(4, 3, 20, 70), normal(4, 3, 20, 50)
    w = prepare_weights(normal(70, 50) * 0.5, kind)
    want = s.double() @ w.dequantize().double() + stream.double()
    kept = torch.empty_like(stream)
    assert_same(spike_matmul_lif(pack_spikes(s), w, add=stream, currents=kept, backend=backend), want)
    torch.testing.assert_close(kept.double(), want, rtol=1e-5, atol=1e-5)
    assert_same(spike_matmul_lif(pack_spikes(s), w, add=stream, currents=stream, backend=backend), want)
    assert torch.equal(stream, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("image", "w_shape", "options"),
    [
        ((3, 2, 6, 7, 40), (33, 40, 3, 3), {"padding": 1}),
        ((2, 1, 5, 9, 33), (16, 33, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
        ((4, 2, 16, 16, 48), (96, 48, 3, 3), {"padding": 1, "pool": (3, 2, 1)}),
        ((2, 3, 9, 6, 20), (70, 20, 1, 1), {"pool": (2, 2, 0)}),
        ((6, 1, 40, 40, 8), (20, 8, 3, 3), {"padding": 1, "pool": (3, 2, 1)}),
        ((2, 1, 5, 5, 64), (32, 64, 3, 3), {"padding": 1, "pool": (3, 3, 1)}),
        ((3, 2, 3, 4, 40), (40, 40, 3, 3), {"padding": 1, "pool": (2, 1, 1)}),  # leaves more neurons than there are currents
    ],
)
def test_convolution_pool_and_neurons_equal_the_three(backend, kind, image, w_shape, options):
    if INTERPRETED and image[2] > 10:
        image = (2, 1, 9, 9, image[4])
    s = spikes(*image)
    w = prepare_weights(normal(*w_shape) * 0.3, kind)
    bias = normal(w_shape[0])
    options = dict(options)
    got = spike_conv2d_lif(pack_spikes(s), w, bias, backend=backend, **options)
    pool = options.pop("pool", None)
    y = F.conv2d(s.double().flatten(0, 1).permute(0, 3, 1, 2), w.dequantize().double(), bias.double(), **options)
    y = y if pool is None else F.max_pool2d(y, *pool)
    currents = y.permute(0, 2, 3, 1).unflatten(0, image[:2])
    assert got.shape == currents.shape
    assert_same(got, currents)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 7, 8])
def test_spikes_that_steps_have_in_common(backend, kind, steps):
    tokens, images = ((1, 9, 100), (1, 4, 3, 33)) if INTERPRETED else ((2, 33, 460), (2, 7, 6, 70))
    columns, channels = (40, 33) if INTERPRETED else (150, 70)
    tokens, images = in_common(steps, *tokens), in_common(steps, *images)
    w, kernel = (
        prepare_weights(normal(*shape) * 0.1, kind) for shape in ((tokens.shape[-1], columns), (channels, channels, 3, 3))
    )
    bias, small = normal(columns), normal(channels)
    kept = torch.empty(*tokens.shape[:-1], columns, device=DEVICE)
    fired = spike_matmul_lif(pack_spikes(tokens), w, bias, currents=kept, backend=backend)
    want = tokens.double() @ w.dequantize().double() + bias.double()
    torch.testing.assert_close(kept.double(), want, rtol=1e-5, atol=1e-5)
    assert_same(fired, want)
    y = F.conv2d(images.double().flatten(0, 1).permute(0, 3, 1, 2), kernel.dequantize().double(), small.double(), padding=1)
    for pool in (None, (3, 2, 1)):
        currents = (y if pool is None else F.max_pool2d(y, *pool)).permute(0, 2, 3, 1).unflatten(0, images.shape[:2])
        assert_same(spike_conv2d_lif(pack_spikes(images), kernel, small, padding=1, pool=pool, backend=backend), currents)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads):
    few, many = (pack_spikes(in_common(4, rows, 480)) for rows in (37, 600))
    w = prepare_weights(normal(480, 80) * 0.1)
    one_band, two_bands = (pack_spikes(in_common(4, 1, size, size, 48)) for size in (12, 40))
    kernel = prepare_weights(normal(80, 48, 3, 3) * 0.3)

    def run():
        products = [spike_matmul_lif(s, w).words for s in (few, many)]
        return products + [spike_conv2d_lif(s, kernel, padding=1, pool=(3, 2, 1)).words for s in (one_band, two_bands)]

    want = run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    runs = [run() for _ in range(5)]  # which thread takes which strip differs
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for got in runs for a, b in zip(got, want, strict=True))


def test_nan_fires_nothing_and_stays_in_its_column():
    w = torch.ones(40, 20)
    w[3, 5] = torch.nan
    s = torch.ones(2, 30, 40)
    fired = spike_matmul_lif(pack_spikes(s), prepare_weights(w), backend="auto").unpack()
    assert not fired[..., 5].any() and fired[..., [*range(5), *range(6, 20)]].all()


S, W = pack_spikes(torch.zeros(2, 3, 40)), prepare_weights(torch.zeros(40, 8))
IMAGES, KERNEL = pack_spikes(torch.zeros(2, 1, 4, 4, 40)), prepare_weights(torch.zeros(8, 40, 3, 3))
KEPT = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spike_matmul_lif(torch.zeros(2, 3, 40), W), TypeError, "s must be PackedSpikes; got Tensor"),
        (lambda: spike_matmul_lif(S, torch.zeros(40, 8)), TypeError, "w must be SpikeWeights"),
        (lambda: spike_matmul_lif(S, KERNEL), ValueError, "w must have 2 dimensions"),
        (lambda: spike_matmul_lif(pack_spikes(torch.zeros(2, 3, 41)), W), ValueError, "s must have K = 40 spikes.*got 41"),
        (lambda: spike_matmul_lif(pack_spikes(torch.zeros(0, 3, 40)), W), ValueError, "with T >= 1"),
        (lambda: spike_matmul_lif(S, [[1.0]]), TypeError, "w must be SpikeWeights"),
        (lambda: spike_matmul_lif(S, prepare_weights(torch.zeros(40, 0))), ValueError, "none of them 0"),
        (lambda: spike_matmul_lif(S, W, torch.zeros(7)), ValueError, r"bias must be .*shape \[8\]"),
        (lambda: spike_matmul_lif(S, W, add=KEPT[:1]), ValueError, r"add must be float32, contiguous and of shape \[2, 3, 8\]"),
        (lambda: spike_matmul_lif(S, W, currents=KEPT.double()), ValueError, "currents must be float32.*got torch.float64"),
        (lambda: spike_matmul_lif(S, W, tau=0.5), ValueError, "tau must be > 1"),
        (lambda: spike_matmul_lif(S, W, backend="fast"), ValueError, "backend must be one of"),
        (lambda: spike_conv2d_lif(S, KERNEL), ValueError, r"s must have shape \[T, B, H, W, 40\]"),
        (lambda: spike_conv2d_lif(IMAGES, KERNEL, stride=0), ValueError, "stride must be"),
        (
            lambda: spike_conv2d_lif(pack_spikes(torch.zeros(2, 1, 2, 2, 40)), KERNEL),
            ValueError,
            "must fit into the padded",
        ),
        (lambda: spike_conv2d_lif(IMAGES, KERNEL, pool=(9, 1, 0)), ValueError, "pool must have"),
        (lambda: spike_conv2d_lif(IMAGES, KERNEL, padding=1, pool=(2, 2, 0), add=KEPT), ValueError, "pool must be None beside"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_spikes_with_a_gradient_are_refused():
    s, _ = lif(torch.randn(3, 4, 40, requires_grad=True), packed=True)
    with pytest.raises(RuntimeError, match="s carries a gradient"):
        spike_matmul_lif(s, W)
    with torch.no_grad():
        assert isinstance(spike_matmul_lif(s, W), PackedSpikes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (3, 48), (1, 64), (5, 32), (3, 16), (2, 20), (1, 70)])
@pytest.mark.parametrize(("tokens", "keys"), [(7, 7), (20, 33)])
def test_attention_and_neurons_equal_the_two(backend, heads, width, tokens, keys):
    """Counts are integers: the spikes are exactly those of the two ops."""
    q, k, v = (pack_spikes(spikes(4, 2, n, heads * width, rate=0.4)) for n in (tokens, keys, keys))
    counts = spike_attention(q, k, v, scale=0.02, num_heads=heads, backend="torch")
    usual = counts.median().item()
    for neuron in ({"v_threshold": usual}, {"tau": 3.0, "v_threshold": usual, "v_reset": None, "decay_input": False}):
        want, _ = lif(counts, packed=True, backend="torch", **neuron)
        got = spike_attention_lif(q, k, v, scale=0.02, num_heads=heads, backend=backend, **neuron)
        assert torch.equal(got.words, want.words) and 0.01 < want.density() < 0.99
        if tokens == keys:
            qkv = pack_spikes(torch.cat([s.unpack() for s in (q, k, v)], -1))
            together = spike_attention_lif(qkv, scale=0.02, num_heads=heads, backend=backend, **neuron)
            assert torch.equal(together.words, want.words) and together.length == q.length


def test_bad_attention():
    q, s = pack_spikes(torch.zeros(2, 1, 5, 40)), pack_spikes(torch.zeros(2, 5, 40))
    with pytest.raises(TypeError, match="k must be PackedSpikes; got Tensor"):
        spike_attention_lif(q, torch.zeros(2, 1, 5, 40), q, scale=1.0, num_heads=2)
    with pytest.raises(ValueError, match=r"q must have shape \[T, B, tokens, C\]; got \[2, 5, 40\]"):
        spike_attention_lif(s, s, s, scale=1.0, num_heads=2)
    with pytest.raises(ValueError, match="num_heads must be an integer that divides C = 40; got 3"):
        spike_attention_lif(q, q, q, scale=1.0, num_heads=3)


def test_an_empty_batch():
    assert spike_matmul_lif(pack_spikes(torch.zeros(2, 0, 40)), W).shape == (2, 0, 8)
    assert spike_conv2d_lif(pack_spikes(torch.zeros(2, 0, 4, 4, 40)), KERNEL).shape == (2, 0, 2, 2, 8)
    none = pack_spikes(torch.zeros(2, 0, 5, 40))
    assert spike_attention_lif(none, none, none, scale=1.0, num_heads=2).shape == (2, 0, 5, 40)


def test_autocast_leaves_currents_in_float32():
    s, w = pack_spikes(spikes(4, 30, 64, rate=0.8)), prepare_weights(normal(64, 32))
    want = spike_matmul_lif(s, w)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(spike_matmul_lif(s, w).words, want.words)
