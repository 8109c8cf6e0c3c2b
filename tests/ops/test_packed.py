import pytest
import torch

from spikeclip.ops import PackedSpikes, _backends, pack_spikes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 257])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_words_are_the_bits_and_the_round_trip_is_exact(backend, length, density):
    s = (torch.rand(3, 5, length, device=DEVICE) < density).float()
    packed = pack_spikes(s, backend)
    words = [[sum(int(row[i + 32 * w]) << i for i in range(min(32, length - 32 * w))) for w in range(-(-length // 32))]
             for row in s.flatten(0, 1).tolist()]  # fmt: skip
    assert (packed.words.flatten(0, 1).long() & 0xFFFFFFFF).tolist() == words
    assert packed.shape == s.shape and packed.count() == int(s.sum()) and packed.nbytes == 4 * 15 * -(-length // 32)
    assert packed.density() == pytest.approx(s.mean().item())
    for dtype in DTYPES:
        back = packed.unpack(dtype, backend)
        assert back.dtype == dtype and torch.equal(back.float(), s)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_stride_gives_the_same_words(backend, dtype):
    s = torch.rand(6, 4, 100, device=DEVICE) < 0.4
    want = pack_spikes(s.float(), "torch").words
    assert torch.equal(pack_spikes(s.to(dtype), backend).words, want)
    strided = s.to(dtype).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(pack_spikes(strided, backend).words, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_counts(backend):
    words = pack_spikes(torch.ones(3, 70, device=DEVICE)).words
    assert _backends.functions(backend, DEVICE, torch.float32).count(words) == 210


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0), (7,)])
def test_empty_and_one_dimensional(backend, shape):
    s = torch.ones(shape, device=DEVICE)
    packed = pack_spikes(s, backend)
    assert packed.count() == s.numel() and torch.equal(packed.unpack(backend=backend), s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan"), float("inf"), 1e-7])
@pytest.mark.parametrize("at", [0, 31, 40, 99])
def test_a_value_that_is_no_spike_is_an_error_on_the_host(dtype, value, at):
    s = torch.zeros(4, 100, dtype=dtype)
    s[2, at] = value
    for backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match="s must hold spikes, 0 or 1"):
            pack_spikes(s, backend)


def test_negative_zero_is_no_spike():
    assert pack_spikes(torch.tensor([-0.0, 1.0]), "cpu").words.tolist() == [2]


def test_saved_and_loaded_with_safetensors(tmp_path):
    packed = pack_spikes(torch.rand(3, 77) < 0.2)
    packed.save(tmp_path / "spikes.safetensors")
    back = PackedSpikes.load(tmp_path / "spikes.safetensors")
    assert torch.equal(back.words, packed.words) and back.shape == packed.shape
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="does not hold packed spikes"):
        PackedSpikes.load(tmp_path / "broken.safetensors")


def test_bad_input_names_the_argument():
    with pytest.raises(TypeError, match="s must be a torch.Tensor"):
        pack_spikes([1.0])
    with pytest.raises(ValueError, match="s must be one of float32, .*bool, uint8; got torch.int64"):
        pack_spikes(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one dimension"):
        pack_spikes(torch.tensor(1.0))
    with pytest.raises(ValueError, match="backend must be one of"):
        pack_spikes(torch.zeros(3), "gpu")
    with pytest.raises(ValueError, match=r"words must be int32 of shape \[..., 2\] for 40 spikes"):
        PackedSpikes(torch.zeros(3, 1, dtype=torch.int32), 40)
    with pytest.raises(ValueError, match="dtype must be one of"):
        pack_spikes(torch.zeros(3)).unpack(torch.int32)


@pytest.mark.skipif(_backends.triton_interpreted(), reason="the interpreter cannot be traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    s = (torch.rand(3, 40, device=DEVICE) < 0.5).float()
    torch.library.opcheck(torch.ops.spikeclip.pack_spikes.default, (s, backend))
    words = pack_spikes(s, backend).words
    torch.library.opcheck(torch.ops.spikeclip.unpack_spikes.default, (words, 40, torch.float16, backend))


BAD_WORDS = {
    "words must be a torch.Tensor; got list": lambda: PackedSpikes([1], 5),
    "length must be an integer; got '5'": lambda: PackedSpikes(torch.zeros(3, 1, dtype=torch.int32), "5"),
    "length must be >= 0; got -5": lambda: PackedSpikes(torch.zeros(3, 0, dtype=torch.int32), -5),
    "words must have no bits past the 5 spikes": lambda: PackedSpikes(torch.full((3, 1), 32, dtype=torch.int32), 5),
    "words must have no bits past the 31 spikes": lambda: PackedSpikes(torch.full((3, 1), -(2**31), dtype=torch.int32), 31),
}


@pytest.mark.parametrize("message", BAD_WORDS)
def test_bad_words(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_WORDS[message]()


def test_words_and_length_stay_what_they_were_checked_to_be():
    packed = pack_spikes(torch.ones(2, 40))
    for name in ("words", "length"):
        with pytest.raises(AttributeError):
            setattr(packed, name, 10**8)
    assert packed.count() == 80
    packed.words.zero_()
    assert packed.count() == 0


def test_a_file_with_bits_past_the_end_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"words": torch.full((3, 1), -1, dtype=torch.int32), "length": torch.tensor(5)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not hold packed spikes: words must have no bits past"):
        PackedSpikes.load(tmp_path / "a.safetensors")
