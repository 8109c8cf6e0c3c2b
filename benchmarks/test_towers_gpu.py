"""Whole image towers on a GPU: a training step in milliseconds and memory against the same networks of its peers, and answers,
both as they are called and with the tower replayed as a CUDA graph (``torch.cuda.make_graphed_callables``).

Memory is the most that was allocated at once, with parameters, gradients and Adam's state. Towers have the running statistics
of their images, so that in evaluation, where they are checked and their firing rate is taken, they fire as in training.
"""

import contextlib
import fcntl
import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch
from peers import Missing
from rates import fresh, mean_rate, settled
from torch.nn import functional as F
from towers import TRAINING, check_same_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
GRAPH = ", CUDA graph"
CHECKPOINTED = "spikeclip, grad checkpointing"
MODELS = {
    **TRAINING,
    "spikeclip, torch.compile": torch.compile,
    f"{CHECKPOINTED}, torch.compile": lambda tower: torch.compile(TRAINING[CHECKPOINTED](tower)),
}
# Left out: the slowest peer, a second batch of what takes a minute to compile, and most of what may not be captured at all.
STEPS = [
    (config, batch, dtype, who + how)
    for config in ("spikeclip-4-384", "spikeclip-8-512")
    for batch in (64, 256)
    for dtype in ("bfloat16", "float32")
    for who in MODELS
    for how in ("", GRAPH)
    if not who.endswith("snnTorch") and (batch == 64 or "torch.compile" not in who)
    if (config, batch) == ("spikeclip-4-384", 64) or not (how and who.endswith("SpikingJelly"))
]
ANSWERS = [f"spikeclip, {kind}{how}" for kind in ("fp32", "int16", "int8") for how in ("", GRAPH)]
TURN = os.open(Path(tempfile.gettempdir(), "spikeclip-gpu-benchmarks.lock"), os.O_CREAT | os.O_RDWR)


@pytest.fixture(autouse=True)
def _in_turn():
    """Nothing that the case before has left is in the way, or counted; and no other process times meanwhile."""
    fcntl.flock(TURN, fcntl.LOCK_SH)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    yield
    fcntl.flock(TURN, fcntl.LOCK_UN)


def firing(config, batch):
    """A tower in evaluation, images, and the rate at which it fires on these."""
    tower = fresh(config).cuda()
    images = torch.rand(batch, 3, tower.image_size, tower.image_size, device="cuda")
    few = images[:32]
    return tower, images, mean_rate(settled(tower, few), few)


def timed(benchmark, call, **options):
    """Time synchronised calls, when all processes are ready; returns the most megabytes that were allocated at once."""

    def synchronised():
        call()
        torch.cuda.synchronize()

    try:
        synchronised()
        fcntl.flock(TURN, fcntl.LOCK_EX)
        torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(synchronised, **options)
    except torch.OutOfMemoryError:
        pytest.skip("more memory than the device has left")
    return torch.cuda.max_memory_allocated() / 1e6


@pytest.mark.parametrize(("config", "batch", "dtype", "who"), STEPS)
def test_training_step(benchmark, config, batch, dtype, who):
    tower, images, rate = firing(config, batch)
    size = f"{tower.image_size}x{tower.image_size}"
    benchmark.group = f"training step of {config}, {size}, batch {batch}, Adam, {dtype}, firing at {rate:.1%}"
    peer, graphed = who.removesuffix(GRAPH), who.endswith(GRAPH)
    try:
        model = MODELS[peer](tower.train())
    except Missing as reason:
        pytest.skip(str(reason))
    check_same_network(model, tower, images)
    del tower  # a peer is a copy
    target = F.normalize(torch.randn(batch, 512, device="cuda"), dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    half = contextlib.nullcontext()
    if dtype == "bfloat16":
        half = torch.autocast("cuda", torch.bfloat16, cache_enabled=not graphed)  # a graph's casts are its own
    if graphed:
        with half:
            model = torch.cuda.make_graphed_callables(model, (torch.rand_like(images),))

    def step():
        optimizer.zero_grad()
        with half:
            loss = 1 - F.cosine_similarity(model(images), target).mean()
        loss.backward()
        optimizer.step()

    peak = timed(benchmark, step, rounds=7, warmup_rounds=2)
    if not graphed:  # a graph's memory is taken when it is made, and is not seen here
        benchmark.extra_info["peak_megabytes"] = peak


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("who", ANSWERS)
def test_answering(benchmark, batch, who):
    tower, images, rate = firing("spikeclip-4-384", 32)
    benchmark.group = f"image tower of spikeclip-4-384, no gradient, batch {batch}, untrained, firing at {rate:.1%}"
    kind, _, how = who.removeprefix("spikeclip, ").partition(", ")
    ready, x = tower.for_inference(kind), images[:batch]
    want = ready(x)
    with torch.no_grad():
        assert F.cosine_similarity(want, tower(x)).mean() > 0.8  # rounding turns spikes
    del tower
    if how:
        torch.cuda.make_graphed_callables(ready, (torch.zeros_like(x),))
        torch.testing.assert_close(ready(x), want)
    peak = timed(benchmark, lambda: ready(x), rounds=40, warmup_rounds=5)
    if not how:
        benchmark.extra_info["peak_megabytes"] = peak
