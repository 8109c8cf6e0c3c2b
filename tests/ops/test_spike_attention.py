import pytest
import torch
from compare import assert_error_bounded

from spikeclip.ops import _backends, lif, pack_spikes, spike_attention

INTERPRETED = _backends.triton_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
FUSED = [name for name in BACKENDS if name != "torch"]
# leading, q tokens, k tokens, heads, width of a head
CASES = [
    ((3,), 9, 9, 2, 12),
    ((2, 2), 5, 9, 3, 5),
    ((1,), 7, 3, 1, 64),
    ((2,), 20, 20, 2, 48),
    ((1,), 4, 4, 1, 100),
    ((1,), 5, 70, 2, 66),
    ((2,), 1, 1, 4, 1),
]


def spikes(leading, n, s, heads, width, density=0.3, dtype=torch.float32):
    return [(torch.rand(*leading, tokens, heads * width) < density).to(dtype) for tokens in (n, s, s)]


def oracle(q, k, v, heads, scale):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    return (((q @ k.mT) @ v) * scale).transpose(-2, -3).flatten(-2)


def gradients(parts, dy, heads, scale, backend, together=False):
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in ([torch.cat(parts, -1)] if together else parts)]
    y = spike_attention(*leaves, scale=scale, num_heads=heads, backend=backend)
    y.backward(dy.to(DEVICE))
    grads = leaves[0].grad.chunk(3, -1) if together else [leaf.grad for leaf in leaves]
    return [t.detach().cpu() for t in (y, *grads)]


def check(backend, parts, heads, scale=0.125, together=False):
    leaves = [t.double().requires_grad_() for t in parts]
    y = oracle(*leaves, heads, scale)
    dy = torch.randn(y.shape).to(parts[0].dtype)
    y.backward(dy.double())
    got, plain = (gradients(parts, dy, heads, scale, name, together) for name in (backend, "torch"))
    assert torch.equal(got[0], plain[0])
    floor = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[parts[0].dtype]
    for mine, ref, want in zip(got, plain, [y.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert mine.dtype == parts[0].dtype
        assert_error_bounded(mine, ref, want, floor=floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_gradients_match_the_oracle(backend, case):
    check(backend, spikes(*case), case[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [((2,), 10, 10, 2, 24), ((1,), 40, 35, 1, 24), ((1,), 70, 66, 1, 50)], ids=str)
def test_every_dtype(backend, dtype, case):
    check(backend, spikes(*case, dtype=dtype), case[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("leading", "tokens", "heads", "width"),
    [((3,), 9, 2, 12), ((2, 2), 20, 2, 48), ((1,), 4, 1, 100), ((2,), 1, 4, 1), ((1,), 70, 1, 64), ((1,), 68, 2, 66)],
    ids=str,
)
def test_queries_keys_and_values_side_by_side(backend, dtype, leading, tokens, heads, width):
    check(backend, spikes(leading, tokens, tokens, heads, width, dtype=dtype), heads, together=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [8, 0])
def test_packed_side_by_side_send_back_one_gradient(backend, tokens):
    currents = torch.randn(2, 3, tokens, 60, device=DEVICE)
    fired, dy = [], torch.randn(2, 3, tokens, 20, device=DEVICE)
    for packed in (True, False):
        x = currents.clone().requires_grad_()
        s, _ = lif(x, packed=packed, backend=backend)
        y = spike_attention(s, scale=0.25, num_heads=2, backend=backend)
        y.backward(dy)
        fired.append((y.detach(), x.grad))
    assert torch.equal(fired[0][0], fired[1][0]) and fired[0][0].any() == bool(tokens)
    torch.testing.assert_close(fired[0][1], fired[1][1])


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not available here")
def test_a_program_that_owns_all_rows_of_a_head(monkeypatch):
    monkeypatch.setattr("spikeclip.kernels.spike_attention.PROGRAMS", 1)
    check("triton", spikes((1,), 140, 66, 2, 20), 2)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens_and_counts_past_sixteen_bits(backend):
    check(backend, spikes((8,), 196, 196, 8, 48, 0.2), 8)
    check(backend, spikes((8,), 196, 196, 8, 48, 0.2), 8, together=True)
    check(backend, spikes((1,), 3, 1500, 1, 64, 1.0), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_input_is_exact(backend):
    q, k, v = (t.to(DEVICE) for t in spikes((2, 3), 6, 8, 2, 20))
    want = oracle(q.double(), k.double(), v.double(), 2, 0.25).float()
    packed = [pack_spikes(t) for t in (q, k, v)]
    assert torch.equal(spike_attention(*packed, scale=0.25, num_heads=2, backend=backend), want)
    assert torch.equal(spike_attention(q, packed[1], v, scale=0.25, num_heads=2, backend=backend), want)
    k.requires_grad_()
    spike_attention(packed[0], k, packed[2], scale=0.25, num_heads=2, backend=backend).sum().backward()
    assert k.grad.shape == k.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(backend, shape):
    leading, n, s = shape
    parts = [t.to(DEVICE).requires_grad_() for t in spikes((leading,), n, s, 2, 8)]
    y = spike_attention(*parts, scale=0.125, num_heads=2, backend=backend)
    y.sum().backward()
    assert y.shape == (leading, n, 16) and not y.any() and all(not t.grad.any() for t in parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float64], ids=str)
def test_masked_counts_are_exact_in_half_precision(dtype, mask_dtype):
    q = (torch.rand(1, 400, 80, device=DEVICE) < 0.9).to(dtype)
    plain = spike_attention(q, q, q, scale=2**-14, num_heads=1)
    masked = spike_attention(q, q, q, scale=2**-14, num_heads=1, mask=torch.ones(1, 1, device=DEVICE, dtype=mask_dtype))
    assert masked.dtype == dtype and torch.equal(plain, masked)


BAD_MASKS = {
    "mask must be a torch.Tensor or None; got list": [[True]],
    r"mask must be floating or bool and broadcast to .* \[2, 2, 8, 8\]; got torch.bool of shape \[7, 8\]": torch.ones(
        7, 8
    ).bool(),
    r"mask must be floating or bool .*got torch.float32 of shape \[5, 2, 2, 8, 8\]": torch.ones(5, 2, 2, 8, 8),
    "mask must be floating or bool .*got torch.int64": torch.ones(8, 8).long(),
}


@pytest.mark.parametrize("message", BAD_MASKS)
def test_bad_masks(message):
    q = (torch.rand(2, 8, 32, device=DEVICE) < 0.2).float()
    with pytest.raises((TypeError, ValueError), match=message):
        spike_attention(q, q, q, scale=1.0, num_heads=2, mask=BAD_MASKS[message])


@pytest.mark.skipif(DEVICE != "cpu", reason="looked for on the host alone")
def test_masked_spikes_are_checked_too():
    q = torch.full((2, 8, 32), 3.0)
    with pytest.raises(ValueError, match="s must hold spikes"):
        spike_attention(q, q, q, scale=1.0, num_heads=2, mask=torch.ones(8, 8))


@pytest.mark.parametrize("scale", ["a", None, 1e39, float("nan")])
def test_a_scale_that_is_no_number(scale):
    q = torch.zeros(2, 8, 32, device=DEVICE)
    with pytest.raises((TypeError, ValueError), match="scale must be a"):
        spike_attention(q, q, q, scale=scale, num_heads=2)


def test_a_mask_multiplies_the_scores():
    q, k, v = (t.requires_grad_() for t in spikes((2,), 6, 7, 2, 10))
    mask = torch.ones(6, 7, dtype=torch.bool).tril()
    y = spike_attention(q, k, v, scale=0.5, num_heads=2, mask=mask)
    heads = [t.unflatten(-1, (2, 10)).transpose(1, 2) for t in (q, k, v)]
    want = ((heads[0] @ heads[1].mT).masked_fill(~mask, 0) @ heads[2] * 0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert q.grad is not None
    q, k, v = (t.detach() for t in spikes((2,), 6, 6, 2, 10))
    together = spike_attention(torch.cat([q, k, v], -1), scale=0.5, num_heads=2, mask=mask[:, :6])
    assert torch.equal(together, spike_attention(q, k, v, scale=0.5, num_heads=2, mask=mask[:, :6]))
    with pytest.raises(ValueError, match="mask needs dense"):
        spike_attention(pack_spikes(torch.cat([q, k, v], -1)), scale=0.5, num_heads=2, mask=mask[:, :6])
    with pytest.raises(ValueError, match="mask needs backend"):
        spike_attention(q, k, v, scale=0.5, num_heads=2, mask=mask, backend="cpu")
    with pytest.raises(ValueError, match="mask needs dense"):
        spike_attention(pack_spikes(q.detach()), k, v, scale=0.5, num_heads=2, mask=mask)


@pytest.mark.parametrize("backend", FUSED)
def test_results_do_not_depend_on_the_number_of_threads(backend):
    parts, threads, runs = spikes((3,), 9, 9, 2, 12), torch.get_num_threads(), []
    dy = torch.randn(3, 9, 24)
    for count in (1, 2):
        torch.set_num_threads(count)
        runs.append(gradients(parts, dy, 2, 0.125, backend))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
def test_every_instruction_set_of_this_machine_passes(isa):
    check("cpu", spikes((2,), 20, 20, 2, 48), 2)
    check("cpu", spikes((2,), 5, 6, 3, 5), 3)
    check("cpu", spikes((2,), 20, 20, 2, 20), 2, together=True)


@pytest.mark.parametrize("backend", FUSED)
def test_backward_keeps_one_bit_a_spike(backend):
    parts = [t.to(DEVICE).requires_grad_() for t in spikes((2,), 8, 8, 2, 32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spike_attention(*parts, scale=0.125, num_heads=2, backend=backend)
    assert sum(t.nbytes for t in saved) == 3 * parts[0].numel() // 8


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    q, k, v = (t.to(DEVICE) for t in spikes((2,), 5, 6, 2, 10))
    op = torch.ops.spikeclip.spike_attention.default
    torch.library.opcheck(op, (q, k, v, 20, 2, 0.125, True, None, backend))
    words = [pack_spikes(t).words for t in (q, k, v)]
    torch.library.opcheck(op, (words[0], k, words[2], 20, 2, 0.125, True, torch.bfloat16, backend))
    torch.library.opcheck(op, (q.requires_grad_(), k, v, 20, 2, 0.125, False, None, backend))
    dy = torch.randn(2, 5, 20, device=DEVICE)
    torch.library.opcheck(torch.ops.spikeclip.spike_attention_bwd.default, (dy, *words, 20, 2, 0.125, backend))
    qkv = torch.cat([q.detach(), k[:, :5], v[:, :5]], -1)
    for together in (qkv, pack_spikes(qkv).words, qkv.clone().requires_grad_()):
        torch.library.opcheck(op, (together, None, None, 20, 2, 0.125, True, None, backend))
    one = (dy, pack_spikes(qkv).words, None, None, 20, 2, 0.125, backend)
    torch.library.opcheck(torch.ops.spikeclip.spike_attention_bwd.default, one)

    def model(x):
        s = torch.sigmoid(x)
        hard = s + ((s > 0.5).float() - s).detach()
        return spike_attention(hard, hard, hard, scale=0.1, num_heads=2, backend=backend).square().sum()

    grads = []
    for function in (model, torch.compile(model, fullgraph=True)):
        x = torch.linspace(-1, 1, 2 * 5 * 20, device=DEVICE).view(2, 5, 20).requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_its_dtype(backend):
    parts = [t.to(DEVICE).requires_grad_() for t in spikes((2,), 5, 6, 2, 10)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = spike_attention(*parts, scale=0.125, num_heads=2, backend=backend)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and parts[0].grad.dtype == torch.float32


BAD = {
    r"q, k and v must have shapes \[\.\.\., N or S, C\]": lambda q: spike_attention(q, q[..., :4], q, scale=1.0, num_heads=1),
    "k and v must have the shape": lambda q: spike_attention(q, q, q[:, :3], scale=1.0, num_heads=1),
    "num_heads must be an integer that divides C = 8": lambda q: spike_attention(q, q, q, scale=1.0, num_heads=3),
    "scale must be a finite number": lambda q: spike_attention(q, q, q, scale=float("nan"), num_heads=1),
    "v must be one of float32, .*bool, uint8": lambda q: spike_attention(q, q, q.int(), scale=1.0, num_heads=1),
    "k must be on s's device": lambda q: spike_attention(q, q.to("meta"), q.to("meta"), scale=1.0, num_heads=1),
    "must hold spikes": lambda q: spike_attention(q, q + 2, q, scale=1.0, num_heads=1, backend="cpu"),
    r"q must have shape \[\.\.\., N, 3 C\] without k and v; got": lambda q: spike_attention(q, scale=1.0, num_heads=1),
    "k and v must both be spikes or both None; got Tensor and None": lambda q: spike_attention(q, q, scale=1.0, num_heads=1),
    "num_heads must be an integer that divides C = 2": lambda q: spike_attention(q[..., :6], scale=1.0, num_heads=3),
    "backend must be one of": lambda q: spike_attention(q, q, q, scale=1.0, num_heads=1, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](torch.zeros(2, 5, 8))
