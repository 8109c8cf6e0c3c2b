import copy

import oracle
import pytest
import torch
from compare import assert_error_bounded, assert_spikes
from torch.nn import functional as F

from spikeclip.ops import PackedSpikes, _backends, bn_lif, lif, pack_spikes, spike_attention, spike_conv2d, spike_matmul
from spikeclip.ops.surrogate import SURROGATES

INTERPRETED = _backends.triton_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
FUSED = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAND = 1e-5
DEFAULTS = {"v_threshold": 1.0, "v_reset": 0.0, "decay_input": True, "detach_reset": False, "surrogate": "sigmoid"}


def inputs(shape, dtype=torch.float32):
    """x about a mean well off 0, and weights of both signs."""
    channels = shape[-1]
    x = (torch.randn(shape) * 1.5 + 2.0 * torch.randn(channels)).to(dtype)
    return x, torch.randn(channels) * 1.5, torch.randn(channels) + 0.5, torch.randn(channels), torch.rand(channels) + 0.5


def pooled(y, pool):
    images = F.max_pool2d(y.flatten(0, 1).permute(0, 3, 1, 2), *pool)
    return images.permute(0, 2, 3, 1).unflatten(0, y.shape[:2])


def truth(x, weight, bias, mean, var, training, pool, seed, **neuron):
    """(spikes, distance to the threshold, gradients of x, weight and bias, running statistics), all float64."""
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    mean, var = mean.double(), var.double()
    y = F.batch_norm(x.flatten(0, -2), mean, var, weight, bias, training).view_as(x)
    y = y if pool is None else pooled(y, pool)
    options = {**DEFAULTS, **neuron}
    tau = torch.tensor(options.pop("tau", 2.0), dtype=torch.float64)
    rest = options["v_reset"] or 0.0
    alpha = SURROGATES[options["surrogate"]].alpha
    spikes, _, h = oracle.lif(y, torch.full_like(y[0], rest), tau, **options, alpha=alpha)
    grads = torch.autograd.grad(spikes, (x, weight, bias), seed(spikes.shape).double())
    return spikes.detach(), (h - options["v_threshold"]).detach(), [*grads, mean, var]


def run(x, weight, bias, mean, var, training, pool, seed, backend, packed=False, **neuron):
    x, weight, bias = (t.clone().to(DEVICE).requires_grad_() for t in (x, weight, bias))
    mean, var = mean.clone().to(DEVICE), var.clone().to(DEVICE)
    s = bn_lif(x, mean, var, weight, bias, training=training, pool=pool, packed=packed, backend=backend, **neuron)
    target = s.edge if packed else s
    grads = torch.autograd.grad(target, (x, weight, bias), seed(target.shape).to(target))
    s = s.unpack(x.dtype) if packed else s
    assert s.dtype == x.dtype and (grads[0].dtype, grads[1].dtype) == (x.dtype, weight.dtype)
    return s.detach().cpu(), [t.cpu() for t in (*grads, mean, var)]


def seed(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def check(backend, shape, dtype=torch.float32, *, training, pool=None, packed=False, **neuron):
    case = inputs(shape, dtype)
    exact = lambda size: seed(size).to(dtype)  # noqa: E731
    spikes, distance, want = truth(*case, training, pool, exact, **neuron)
    got_spikes, got = run(*case, training, pool, exact, backend, packed, **neuron)
    plain_spikes, plain = run(*case, training, pool, exact, "torch", **neuron)
    assert_spikes(got_spikes, spikes, distance, BAND)
    assert_spikes(plain_spikes, spikes, distance, BAND)
    assert torch.equal(got_spikes.double(), spikes)  # the seeds leave no spike inside the band that rounding turned
    floor = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for mine, ref, right, low in zip(got, plain, want, [floor, 5e-6, 5e-6, 2e-6, 2e-6], strict=True):
        assert_error_bounded(mine, ref, right, floor=low)
        assert_error_bounded(ref, right, right, floor=8 * floor)  # what backends share must be right in itself


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_and_reset_matches_the_oracle(backend, training, surrogate):
    for v_reset, decay_input, detach_reset in [(0.0, True, True), (-0.2, False, False), (None, True, False)]:
        options = {"v_reset": v_reset, "decay_input": decay_input, "detach_reset": detach_reset, "tau": 2.3}
        check(backend, (4, 3, 5, 37), training=training, surrogate=surrogate, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 5), (3, 40, 64), (4, 2, 3, 129), (9, 7, 96), (17, 5, 33), (2, 3, 1100)])
def test_every_dtype_and_size_matches_the_oracle(backend, dtype, shape):
    for training in (True, False):
        for packed in (True, False):
            check(backend, shape, dtype, training=training, packed=packed, detach_reset=packed)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 900, 96), (4, 70, 1040), (4, 3000, 29)])
def test_what_outgrows_the_caches_matches_the_oracle(backend, training, shape):
    check(backend, shape, training=training)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("size", "pool"), [((6, 6), (3, 2, 1)), ((7, 5), (2, 2, 0)), ((4, 9), (3, 3, 1)), ((3, 3), (3, 1, 1))])
def test_a_pool_between_matches_the_oracle(backend, training, size, pool):
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32 or pool[1] == pool[0]:  # where windows overlap, bfloat16 sums its gradients
            check(backend, (3, 2, *size, 40), dtype, training=training, pool=pool, packed=dtype == torch.float32)


@pytest.mark.parametrize("backend", FUSED)
def test_both_thread_counts_agree_bit_for_bit(backend):
    case = inputs((4, 3, 1500, 48) if not INTERPRETED else (4, 3, 15, 48))
    first = run(*case, True, None, seed, backend, True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = run(*case, True, None, seed, backend, True)
    torch.set_num_threads(threads)
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_beside_a_large_mean(backend):
    x = (torch.randn(4, 500, 20, dtype=torch.float64) * 0.01 + 100).float().to(DEVICE)
    mean, var = torch.zeros(20, device=DEVICE), torch.zeros(20, device=DEVICE)
    bn_lif(x, mean, var, training=True, momentum=1.0, backend=backend)
    rows = x.double().flatten(0, 1)
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), rows.var(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 40, 64), (2, 3, 331), (900, 3)], ids=str)
def test_what_normalising_by_a_batch_needs(backend, dtype, shape):
    x, weight, bias, *_ = inputs(shape, dtype)
    rows, eps = x.double().flatten(0, -2), 1e-3
    mean, inverse = rows.mean(0), 1 / (rows.var(0, correction=0) + eps).sqrt()
    for w, b in [(weight, bias), (weight, None), (None, bias.double()), (weight.bfloat16().repeat_interleave(2)[::2], None)]:
        norm = [None if t is None else t.to(DEVICE) for t in (w, b)]
        got = torch.ops.spikeclip.bn_affine(x.to(DEVICE), *norm, eps, backend)
        scale = inverse if w is None else w.double() * inverse
        shift = -mean * scale if b is None else b.double() - mean * scale
        assert [(t.shape, t.dtype) for t in got] == [(shape[-1:], torch.float32)] * 5
        for mine, want in zip(got, (mean, rows.var(0), inverse, scale, shift), strict=True):
            torch.testing.assert_close(mine.double().cpu(), want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_running_statistics_of_other_dtypes(backend, dtypes):
    x = (torch.randn(4, 50, 24) * 1.5 + 2).to(DEVICE)
    running = [torch.full((48,), 0.5, dtype=dtype, device=DEVICE)[::2] for dtype in dtypes]
    bn_lif(x, *running, training=True, momentum=0.25, backend=backend)
    rows = x.double().flatten(0, 1)
    for mine, new in zip(running, (rows.mean(0), rows.var(0)), strict=True):
        torch.testing.assert_close(
            mine.double(), 0.375 + 0.25 * new, rtol=8e-3 if mine.dtype == torch.bfloat16 else 1e-6, atol=0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_affine_or_running_statistics(backend):
    x = torch.randn(4, 50, 24, device=DEVICE)
    want = lif(F.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x), backend="torch")[0]
    for training in (True, False):
        assert torch.equal(bn_lif(x, None, None, training=training, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_memory_orders_give_the_same_numbers(backend):
    x, *rest = (t.to(DEVICE) for t in inputs((4, 2, 5, 6, 40)))
    results = []
    for order in (
        x,
        x.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0),
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        leaf = order.detach().requires_grad_()
        s = bn_lif(leaf, rest[2].clone(), rest[3].clone(), *rest[:2], training=True, backend=backend)
        (grad,) = torch.autograd.grad(s, leaf, seed(s.shape).to(DEVICE))
        results.append((s, grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_of_any_strides(backend):
    x, *rest = (t.to(DEVICE) for t in inputs((4, 30, 24)))
    grads = []
    for stride in (1, 2):
        weight, bias, mean, var = (t.repeat_interleave(stride)[::stride] for t in rest)
        leaves = [t.requires_grad_() for t in (weight, bias)]
        s = bn_lif(x, mean, var, *leaves, backend=backend)
        grads.append((s, *torch.autograd.grad(s, leaves, seed(s.shape).to(DEVICE))))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feeds", ["matmul", "conv2d", "attention", "unpack"])
def test_packed_spikes_carry_their_gradient_through_every_op(backend, feeds):
    x = torch.randn(3, 2, 4, 5, 48, device=DEVICE)
    w = {"matmul": torch.randn(48, 7), "conv2d": torch.randn(7, 48, 3, 3)}.get(feeds, torch.zeros(0)).to(DEVICE)
    grads = []
    for packed in (True, False):
        leaf, weights = x.clone().requires_grad_(), w.clone().requires_grad_()
        s = lif(leaf, packed=packed, backend=backend)[0]
        assert not packed or (isinstance(s, PackedSpikes) and s.requires_grad and s.edge.untyped_storage().nbytes() == 4)
        if feeds == "matmul":
            y = spike_matmul(s, weights, backend=backend)
        elif feeds == "conv2d":
            images = s.flatten(0, 1)
            y = spike_conv2d(images if packed else images.permute(0, 3, 1, 2), weights, padding=1, backend=backend)
        elif feeds == "attention":
            tokens = s.flatten(2, 3)
            y = spike_attention(tokens, tokens, tokens, scale=0.1, num_heads=4, backend=backend)
        else:
            y = s.unpack(backend=backend) if packed else s
        y.backward(seed(y.shape).to(DEVICE))
        grads.append((y.detach(), leaf.grad, weights.grad))
    for mine, want in zip(*grads, strict=True):
        assert (mine is None) == (want is None)
        if mine is not None:
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_spikes_of_plain_lif_are_its_spikes(backend):
    for shape in [(4, 7, 33), (1, 3, 64), (5, 1500)]:
        x, v0 = torch.randn(shape, device=DEVICE) * 1.5, torch.rand(shape[1:], device=DEVICE)
        packed, v = lif(x, v0, packed=True, backend=backend)
        dense, v_want = lif(x, v0, backend=backend)
        assert torch.equal(packed.unpack(), dense) and torch.equal(v, v_want)
    with pytest.raises(ValueError, match=r"x must have shape \[T, ..., K\] for packed spikes; got \[4\]"):
        lif(torch.zeros(4), packed=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 4, 19])
def test_an_input_that_is_the_same_at_every_step_is_those_steps(backend, steps):
    x, seed = torch.randn(6, 40, device=DEVICE) * 1.5, torch.randn(steps, 6, 40, device=DEVICE)
    runs = []
    for repeat in (lambda x: x.expand(steps, 6, 40), lambda x: x.repeat(steps, 1, 1)):
        leaf = x.clone().requires_grad_()
        spikes, v = lif(repeat(leaf), packed=True, backend=backend)
        ((spikes.unpack(backend=backend) * seed).sum() + v.sum()).backward()
        runs.append((spikes.words, v.detach(), leaf.grad))
    assert all(torch.equal(mine, want) for mine, want in zip(*runs, strict=True)) and runs[0][2].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_that_are_not_there_never_fire(backend):
    x, *rest = (t.to(DEVICE) for t in inputs((3, 7, 37)))
    options = {"v_threshold": -0.6, "v_reset": -0.5, "training": True, "backend": backend}
    packed, dense = (bn_lif(x, rest[2].clone(), rest[3].clone(), *rest[:2], packed=p, **options) for p in (True, False))
    assert torch.equal(packed.words, pack_spikes(dense, backend="torch").words) and 0.3 < dense.mean() < 0.95


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not available here")
@pytest.mark.parametrize("programs", [1, 2])
def test_triton_programs_that_walk_many_rows(monkeypatch, programs):
    monkeypatch.setattr("spikeclip.kernels.bn_lif.PROGRAMS", programs)
    for shape in [(2, 150, 40), (3, 130, 5)]:
        check("triton", shape, training=True)


def test_frozen_weights_still_pass_the_gradient_on():
    x, w = torch.randn(4, 6, 32, requires_grad=True), torch.randn(32, 5)
    y = spike_matmul(lif(x, packed=True)[0], w)
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0
    with torch.no_grad():
        assert not lif(x, packed=True)[0].requires_grad


def test_autocast_keeps_currents_in_float32_and_spikes_in_bfloat16():
    x, weight, bias, mean, var = (t.to(DEVICE) for t in inputs((4, 30, 40)))
    with torch.autocast(DEVICE, torch.bfloat16):
        s = bn_lif(x, mean.clone(), var.clone(), weight, bias, training=True)
    assert s.dtype == torch.bfloat16
    assert torch.equal(s.float(), bn_lif(x, mean.clone(), var.clone(), weight, bias, training=True))


@pytest.mark.parametrize("packed", [True, False])
def test_compiles_into_one_graph(packed):
    weight = torch.randn(32, 8, device=DEVICE)

    def model(x, gamma, beta, mean, var):
        s = bn_lif(x, mean, var, gamma, beta, training=True, pool=(3, 2, 1), packed=packed)
        return spike_matmul(s, weight)

    x, gamma, beta, mean, var = (t.to(DEVICE) for t in inputs((3, 2, 6, 6, 32)))
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
        running = (mean.clone(), var.clone())
        y = function(*leaves, *running)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves), *running))
    for mine, want in zip(*results, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_are_what_they_say_to_the_compiler(backend):
    x, weight, bias, mean, var = (t.to(DEVICE) for t in inputs((3, 2, 6, 6, 32)))
    ops, neuron = torch.ops.spikeclip, (2.0, 1.0, 0.0, True)
    for spike_dtype in (torch.float32, torch.int32):
        torch.library.opcheck(ops.bn_lif_fwd.default, (x, weight, bias, *neuron, spike_dtype, backend))
    torch.library.opcheck(ops.bn_stats.default, (x, backend))
    for norm in ((weight, bias), (None, None)):
        torch.library.opcheck(ops.bn_affine.default, (x, *norm, 1e-5, backend))
    for apart in (False, True):
        torch.library.opcheck(ops.bn_factors.default, (torch.stack([mean, var]), weight, var, mean, 7, apart, backend))
    for factors, sums in ((None, True), (torch.randn(3, 32, device=DEVICE), False)):
        args = (x, x, weight, bias, mean, factors, sums, *neuron, False, "sigmoid", 4.0, backend)
        torch.library.opcheck(ops.bn_lif_bwd.default, args)
    torch.library.opcheck(ops.max_pool.default, (x, weight, [3, 2, 1], backend))
    values, index = ops.max_pool(x, weight, [3, 2, 1], backend)
    torch.library.opcheck(ops.max_pool_bwd.default, (values, index, x, torch.randn(2, 32, device=DEVICE), [3, 2, 1], backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", [None, (3, 2, 1)])
def test_a_second_derivative_is_refused(backend, pool):
    x, weight = torch.randn(3, 1, 4, 4, 8).to(DEVICE), torch.ones(8, device=DEVICE)
    for leaf in (x, weight):
        leaf.requires_grad_()
        loss = bn_lif(x, None, None, weight, pool=pool, backend=backend).square().sum()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="bn_lif has no second derivative"):
            grad.sum().backward()
        leaf.requires_grad_(False)
    sums = torch.ones(2, 8, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="bn_lif has no second derivative"):
        torch.ops.spikeclip.bn_factors(sums, *[weight] * 3, 5, pool is not None, backend)[1].sum().backward()


class _GivesNone(torch.autograd.Function):
    forward = staticmethod(lambda ctx, s: s.clone())
    backward = staticmethod(lambda ctx, grad: None)


@pytest.mark.parametrize("packed", [True, False])
def test_a_gradient_that_never_comes(packed):
    x = torch.randn(3, 5, 8, requires_grad=True)
    s = bn_lif(x, None, None, packed=packed)
    (_GivesNone.apply(s.edge if packed else s).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_empty_batch_in_evaluation():
    mean, var = torch.zeros(8), torch.ones(8)
    assert bn_lif(torch.zeros(3, 0, 8), mean, var).shape == (3, 0, 8)
    assert bn_lif(torch.zeros(3, 0, 6, 6, 8), mean, var, pool=(3, 2, 1), packed=True).shape == (3, 0, 3, 3, 8)


GOOD = (torch.zeros(3, 4, 8), torch.zeros(8), torch.ones(8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bn_lif([1.0], None, None), TypeError, "x must be a torch.Tensor; got list"),
        (lambda: bn_lif(torch.zeros(3, 4, 8, dtype=torch.int32), None, None), ValueError, "x must be float32.*int32"),
        (
            lambda: bn_lif(torch.zeros(8), None, None),
            ValueError,
            r"x must have shape \[T, ..., C\] with T and C >= 1; got \[8\]",
        ),
        (lambda: bn_lif(torch.zeros(0, 3, 8), None, None), ValueError, r"x must have shape .*got \[0, 3, 8\]"),
        (lambda: bn_lif(torch.zeros(3, 0, 8), None, None), ValueError, r"more than one value a channel .*got \[3, 0, 8\]"),
        (lambda: bn_lif(GOOD[0], torch.zeros(7), torch.ones(8)), ValueError, r"running_mean must be floating, of shape \[8\]"),
        (lambda: bn_lif(*GOOD, torch.ones(8, dtype=torch.long)), ValueError, "weight must be floating"),
        (lambda: bn_lif(*GOOD, 1.0), TypeError, "weight must be a torch.Tensor or None; got float"),
        (lambda: bn_lif(GOOD[0], GOOD[1], None), ValueError, "running_mean and running_var must be given both or neither"),
        (lambda: bn_lif(*GOOD, momentum=1.5), ValueError, r"momentum must be in 0\.\.1; got 1.5"),
        (lambda: bn_lif(*GOOD, eps="small"), TypeError, "eps must be a number; got 'small'"),
        (lambda: bn_lif(*GOOD, tau=1.0), ValueError, r"tau must be > 1 \(in time-steps\); got 1.0"),
        (lambda: bn_lif(*GOOD, tau=torch.tensor(2.0)), TypeError, "tau must be a number"),
        (lambda: bn_lif(*GOOD, v_threshold=None), TypeError, "v_threshold must be a number"),
        (lambda: bn_lif(*GOOD, pool=2), TypeError, "pool must be three integers"),
        (lambda: bn_lif(*GOOD, pool=(3, 2, 1)), ValueError, r"pool must have .*for \[3, 4, 8\]"),
        (
            lambda: bn_lif(torch.zeros(1, 1, 8), *GOOD[1:], training=True),
            ValueError,
            "x must have more than one value a channel",
        ),
        (lambda: bn_lif(*GOOD, backend="gpu"), ValueError, "backend must be one of auto"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    before = copy.deepcopy(GOOD)
    with pytest.raises(error, match=message):
        call()
    assert all(torch.equal(a, b) for a, b in zip(before, GOOD, strict=True))
