"""The whole image tower, training and answering, against the same network of its peers; outputs are checked before timing."""

from __future__ import annotations

import contextlib
import copy
import time

import pytest
import torch
from memory import saved_bytes
from peers import Missing
from rates import RATES, STEPS, by_rate, mean_rate, trained
from torch.nn import functional as F
from towers import ANSWERING, TRAINING, check_same_network, dequantized

from spikeclip.energy import profile
from spikeclip.ops._density import SLOW_ON_CPU
from spikeclip.training.compositions import render

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 32
SECONDS = 45  # of one case, about, where three rounds do not take longer


def timed(benchmark, call, rounds: int, warmup: int) -> None:
    """Up to so many rounds: on slow machines the slower peers take many seconds each."""
    call()
    started = time.perf_counter()
    call()
    took = time.perf_counter() - started
    benchmark.pedantic(call, rounds=min(rounds, max(3, int(SECONDS / took))), warmup_rounds=warmup if took < 1 else 0)


@pytest.fixture(scope="module")
def learnt():
    return trained(STEPS)


@pytest.fixture(scope="module")
def images():
    return render(BATCH, seed=5).images.to(DEVICE)


@pytest.fixture(scope="module")
def firing(learnt, images):
    """Towers by firing rate: None as trained, else every layer at that rate."""
    return by_rate(learnt, images)


@pytest.fixture(scope="module")
def synops(firing, images):
    """Accumulates that spikes cause, per image, by firing rate."""
    return {rate: profile(tower, images).synops for rate, tower in firing.items()}


def make(makers, who, tower):
    try:
        return makers[who](tower)
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("who", TRAINING)
def test_training_step(benchmark, learnt, images, who, dtype):
    if dtype == "bfloat16" and not who.startswith(("spikeclip", "torch.compile")):
        pytest.skip("one precision is enough for the slower peers")
    if dtype == "bfloat16" and not who.startswith("spikeclip") and DEVICE == "cpu" and torch.bfloat16 in SLOW_ON_CPU:
        pytest.skip("minutes a step: this CPU does not multiply bfloat16")
    tower = copy.deepcopy(learnt).train().to(DEVICE)
    rate = mean_rate(copy.deepcopy(learnt).to(DEVICE), images)
    benchmark.group = f"training step of spikeclip-4-384, batch {BATCH}, Adam; trained for {STEPS} steps, firing at {rate:.1%}"
    model = make(TRAINING, who, tower).train().to(DEVICE)
    target = F.normalize(torch.randn(BATCH, 512, generator=torch.Generator().manual_seed(0)), dim=1).to(DEVICE)
    half = lambda: torch.autocast(DEVICE, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()  # noqa: E731
    check_same_network(model, tower, images)
    with half():
        benchmark.extra_info["saved_megabytes"] = saved_bytes(model, images) / 1e6
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        with half():
            loss = 1 - F.cosine_similarity(model(images), target).mean()
        loss.backward()
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    if DEVICE == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
    timed(benchmark, step, rounds=7, warmup=0)
    if DEVICE == "cuda":
        benchmark.extra_info["peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("density", [None, *RATES], ids=["as trained", "10 %", "20 %"])
@pytest.mark.parametrize("who", ANSWERING)
def test_answering(benchmark, firing, synops, images, who, density, batch):
    if density is not None and not who.startswith("spikeclip"):
        pytest.skip("dense: as fast at any firing rate")
    tower = copy.deepcopy(firing[density]).eval().to(DEVICE)
    trained_rate = mean_rate(copy.deepcopy(firing[None]).to(DEVICE), images)
    benchmark.group = (
        f"image tower of spikeclip-4-384, no gradient, batch {batch}: as trained, firing at {trained_rate:.1%}, and with every "
        "layer firing at 10 and 20 %"
    )
    benchmark.extra_info["baseline"] = who == "ANN twin, compiled"
    benchmark.extra_info["images"] = batch
    benchmark.extra_info["synops"] = None if "ANN" in who else synops[density]
    x = images[:batch]
    model = make(ANSWERING, who, tower)
    if who.startswith("spikeclip"):
        got, own = model(x), tower(x)
        same = F.cosine_similarity(got, dequantized(model, tower)(x) if "int" in who else own).min()
        assert same > 0.97, same  # of every picture; rounding turns spikes
        benchmark.extra_info["cosine"] = F.cosine_similarity(got, own).min().item()
    elif "ANN" not in who:
        check_same_network(model, tower, images)
    with torch.no_grad():

        def call():
            model(x)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        timed(benchmark, call, rounds=40 if batch == 1 else 15, warmup=3)
