"""Whole image towers on a GPU: a training step in milliseconds and memory against the same networks of its peers, and answers,
one call after the other and replayed as a CUDA graph.
"""

import contextlib

import pytest
import torch
from peers import Missing
from rates import fresh, mean_rate
from torch.nn import functional as F
from towers import TRAINING, check_same_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
STEPS = [
    (config, batch, dtype, who)
    for config in ("spikeclip-4-384", "spikeclip-8-512")
    for batch in (64, 256)
    for dtype in ("bfloat16", "float32")
    for who in TRAINING
]


def timed(benchmark, call, **options):
    """Time synchronised calls, and note the most memory that they had allocated at once."""

    def synchronised():
        call()
        torch.cuda.synchronize()

    try:
        synchronised()
        torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(synchronised, **options)
    except torch.OutOfMemoryError:
        pytest.skip("more memory than the device has")
    benchmark.extra_info["peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6


@pytest.mark.parametrize(("config", "batch", "dtype", "who"), STEPS)
def test_training_step(benchmark, config, batch, dtype, who):
    if who.endswith("snnTorch") or (who.startswith("torch.compile") and batch != 64):
        pytest.skip("the slowest peer, and what takes a minute to compile, are left to smaller benchmarks")
    torch.cuda.empty_cache()
    tower = fresh(config).cuda()
    images = torch.rand(batch, 3, tower.image_size, tower.image_size, device="cuda")
    rate = mean_rate(tower, images[:8])
    benchmark.group = (
        f"training step of {config}, {tower.image_size}x{tower.image_size}, batch {batch}, Adam, firing at {rate:.1%}"
    )
    try:
        model = TRAINING[who](tower.train()).cuda().train()
    except Missing as reason:
        pytest.skip(str(reason))
    check_same_network(model, tower, images)
    target = F.normalize(torch.randn(batch, 512, device="cuda"), dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    half = torch.autocast("cuda", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def step():
        optimizer.zero_grad()
        with half:
            loss = 1 - F.cosine_similarity(model(images), target).mean()
        loss.backward()
        optimizer.step()

    timed(benchmark, step, rounds=7, warmup_rounds=2)


ANSWERS = [f"spikeclip, {kind}{how}" for kind in ("fp32", "int16", "int8") for how in ("", ", CUDA graph")]


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("who", ANSWERS)
def test_answering(benchmark, batch, who):
    benchmark.group = f"image tower of spikeclip-4-384, no gradient, batch {batch}, untrained"
    kind, _, how = who.removeprefix("spikeclip, ").partition(", ")
    ready = fresh().cuda().for_inference(kind)
    images = torch.rand(batch, 3, 32, 32, device="cuda")
    want = ready(images)
    if how:
        torch.cuda.make_graphed_callables(ready, (images.clone(),))
    torch.testing.assert_close(ready(images), want)
    timed(benchmark, lambda: ready(images), rounds=40, warmup_rounds=5)
