import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spikeclip import SpikeCLIP
from spikeclip.models import SpikeCLIPConfig, inference, load_config
from spikeclip.nn import BNLIF, LIF
from spikeclip.ops import PackedSpikes, Sequence
from spikeclip.training.compositions import LABELS, TEMPLATES, render
from spikeclip.training.data import Rendered
from spikeclip.zeroshot import ZeroShotClassifier, class_vectors, evaluate

KINDS = ["fp32", "int16", "int8"]
SHAPES = {
    "demo": {},
    "a pool at the end": {"pools": (True, False, True, True)},
    "no blocks": {"depth": 0},
    "three blocks, narrow heads": {"depth": 3, "num_heads": 8},
    "widths of no whole words": {"channels": (24, 40, 72, 72), "num_heads": 3},
}


def busy(model: SpikeCLIP) -> SpikeCLIP:
    """In evaluation, with norms of both signs, so that every layer fires."""
    images = render(16, seed=0).images
    model.train()
    for module in model.visual.modules():
        if isinstance(module, (BNLIF, torch.nn.modules.batchnorm._BatchNorm)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::5] *= -1
            torch.nn.init.normal_(module.bias, 0.3, 0.3)
    with torch.no_grad():
        for _ in range(30):
            model.visual(images)
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return SpikeCLIP.from_pretrained("spikeclip-demo")


@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_the_towers(shape):
    config = load_config("spikeclip-demo")
    model = busy(SpikeCLIP(dataclasses.replace(config, vision=dataclasses.replace(config.vision, **SHAPES[shape]))))
    images = render(5, seed=1).images
    with torch.no_grad():
        want = model.encode_image(images)
    for kind, bound in zip(KINDS, (1e-3, 0.1, 0.3), strict=True):
        ready = model.for_inference(kind)
        got = ready.encode_image(images)
        assert got.shape == want.shape and not got.requires_grad
        error = (got - want).norm() / want.norm()
        assert error < bound, f"{kind}: {error}"
        torch.testing.assert_close(got[2:3], ready.encode_image(images[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_spikes_are_those_of_the_tower_in_evaluation(trained, recorded, monkeypatch):
    """Layer by layer; rounding may turn a spike, and what follows from it."""
    monkeypatch.setattr(inference, "_RECORDED_NEURONS", 10**6 if recorded else 0)
    images, want, got = render(8, seed=2).images, [], []
    tower = trained.visual
    handles = [
        m.register_forward_hook(lambda m, i, out: want.append(out)) for m in tower.modules() if isinstance(m, (LIF, BNLIF))
    ]
    with torch.no_grad():
        tower(images)
    for handle in handles:
        handle.remove()
    products = [(inference, name) for name in ("spike_matmul_lif", "spike_conv2d_lif", "spike_attention_lif")]
    for place, name in [(Sequence if recorded else inference, "lif"), *products]:
        original = getattr(place, name)

        def record(*args, name=name, original=original, **options):
            assert name == "lif" or isinstance(options["sequence"], Sequence) == recorded
            out = original(*args, **options)
            got.append(out if isinstance(out, PackedSpikes) else out[0])
            return out

        monkeypatch.setattr(place, name, record)
    tower.for_inference()(images)
    flat = [s.words.flatten() for s in got[:-1]]  # the last are nobody's
    assert [len(s) for s in flat] == [s.words.numel() for s in want]
    assert all(s.density() > 0 for s in want)
    turned = sum(int(((a ^ b.words.flatten()) != 0).sum()) for a, b in zip(flat, want, strict=True))
    assert turned <= 1e-4 * sum(len(s) for s in flat), f"{turned} words of spikes differ"


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_is_kept(trained, kind):
    data = Rendered(600, seed=77)
    vectors = class_vectors(trained, LABELS, TEMPLATES)
    before, after = (evaluate(model, data, vectors).top1 for model in (trained, trained.for_inference(kind)))
    assert before > 0.9 and after > before - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_saved_models_answer_alike(trained, kind, tmp_path):
    images = render(4, seed=3).images
    ready = trained.for_inference(kind)
    want = ready.encode_image(images)
    assert torch.equal(copy.deepcopy(ready).encode_image(images), want)
    ready.save_pretrained(tmp_path)
    loaded = SpikeCLIP.from_pretrained(tmp_path)
    assert loaded.config.weights == kind and not loaded.training
    assert torch.equal(loaded.encode_image(images), want)
    state = {name: tensor.clone() for name, tensor in ready.visual.state_dict().items()}
    other = SpikeCLIP.from_config("spikeclip-demo").visual.for_inference(kind)
    assert not torch.equal(other(images), want)
    other.load_state_dict(state)
    assert torch.equal(other(images), want)


def test_it_stands_alone_and_stays_in_evaluation(trained):
    images = render(4, seed=4).images
    model = copy.deepcopy(trained)
    ready = model.for_inference()
    want = ready.encode_image(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.config.weights is None and not any(p.requires_grad for p in ready.parameters())
    assert torch.equal(ready.train().visual(images), want)
    with pytest.raises(ValueError, match="weights can be chosen once, from a model that learns; these are fp32 already"):
        ready.for_inference("int8")


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_half_precision_and_autocast_change_nothing(trained, kind):
    images = render(3, seed=6).images
    ready = trained.for_inference(kind)
    want = ready.encode_image(images)
    assert torch.equal(pickle.loads(pickle.dumps(ready.visual))(images), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ready.visual(images), want)
    assert torch.equal(ready.visual.half()(images), want) and torch.equal(ready.visual.double()(images.double()), want)
    low = copy.deepcopy(trained).to(torch.bfloat16).for_inference(kind).visual(images)
    assert torch.nn.functional.cosine_similarity(low, want).min() > 0.9


def test_weights_of_another_kind_are_not_loaded(trained):
    towers = {kind: trained.visual.for_inference(kind) for kind in KINDS}
    for kind, other in (("int8", "int16"), ("int16", "int8"), ("fp32", "int8")):
        with pytest.raises(RuntimeError, match="values must be torch"):
            towers[kind].load_state_dict(towers[other].state_dict())


def test_neurons_that_differ_between_layers(trained):
    model = busy(copy.deepcopy(trained))
    model.visual.blocks[0].attention.qkv.norm.v_threshold = 0.3
    images = render(3, seed=7).images
    with torch.no_grad():
        torch.testing.assert_close(model.for_inference().encode_image(images), model.encode_image(images), rtol=1e-2, atol=1e-2)


def test_no_image_gives_no_features(trained):
    assert trained.for_inference().encode_image(torch.rand(0, 3, 32, 32)).shape == (0, trained.config.embed_dim)
    with torch.no_grad():
        assert trained.encode_image(torch.rand(0, 3, 32, 32)).shape == (0, trained.config.embed_dim)


def test_threads_agree(trained):
    ready = trained.for_inference("int8")
    batches = [render(n, seed=n).images for n in (1, 3, 5, 2, 4, 3, 1, 6)]
    want = [ready.encode_image(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(ready.encode_image, batches), want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_calls_give_the_same_features(trained, kind, monkeypatch):
    ready, batches = trained.visual.for_inference(kind), [render(n, seed=n).images for n in (1, 3, 1)]
    with torch.inference_mode():
        got = [ready(batches[0])]
    got += [ready(batch) for batch in batches[1:]]
    assert sorted(len(call.currents) for call in ready._recorded) == [1, 3]
    monkeypatch.setattr(inference, "_RECORDED_NEURONS", 0)
    for batch, features in zip(batches, got, strict=True):
        torch.testing.assert_close(features, ready(batch))


def test_recorded_calls_are_kept_for_the_last_sizes(trained, monkeypatch):
    ready, images = trained.visual.for_inference(), render(4, seed=3).images
    want = ready(images)
    (call,) = ready._recorded
    assert call.nbytes > 4 * call.currents.numel()
    monkeypatch.setattr(inference, "_KEPT_BYTES", int(1.2 * call.nbytes))
    seen = []
    for number in (1, 2, 1, 3, 1, 4):
        torch.testing.assert_close(ready(images[:number]), want[:number])
        seen.append([len(call.currents) for call in ready._recorded])
    assert seen == [[1], [1, 2], [2, 1], [1, 3], [3, 1], [4]]
    monkeypatch.setattr(inference, "_KEPT_BYTES", 1)
    ready(images[:2])
    assert [len(call.currents) for call in ready._recorded] == [2]
    for copied in (copy.copy(ready), copy.deepcopy(ready)):
        assert not list(copied._recorded) and torch.equal(copied(images[:2]), ready(images[:2]))
    assert len(list(ready._recorded)) == 1


def test_recorded_calls_follow_what_becomes_of_the_tower(trained):
    images, other = render(2, seed=8).images, busy(copy.deepcopy(trained)).visual.for_inference()
    ready = trained.visual.for_inference()
    first, want = ready(images), other(images)
    assert not torch.allclose(first, want)
    ready.load_state_dict(other.state_dict())
    assert torch.equal(ready(images), want)
    bias = ready.blocks[0].fc1.bias
    bias.add_(1.0)
    in_place = ready(images)
    bias.sub_(1.0)
    ready.blocks[0].fc1.bias = bias + 1.0
    assert not torch.allclose(in_place, want) and torch.equal(ready(images), in_place)
    ready.readout.half().float()
    assert torch.isfinite(ready(images)).all() and ready(images).dtype == torch.float32


def test_a_tower_that_fires_all_the_time(trained, monkeypatch):
    tower = copy.deepcopy(trained.visual)
    for module in tower.modules():
        if isinstance(module, BNLIF):
            torch.nn.init.constant_(module.bias, 10.0)
    ready, images = tower.for_inference(), render(2, seed=9).images
    got = ready(images)
    torch.testing.assert_close(got, tower.eval()(images), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(inference, "_RECORDED_NEURONS", 0)
    assert torch.equal(got, ready(images))


def test_a_classifier_asks_the_text_tower_once(trained, monkeypatch):
    ready = trained.for_inference()
    classifier = ZeroShotClassifier(ready, ["red star", "blue ring"])
    monkeypatch.setattr(ready, "encode_text", None)
    images = render(3, seed=5).images
    chances = classifier(images)
    torch.testing.assert_close(chances.sum(1), torch.ones(3))
    assert classifier.classes == ("red star", "blue ring") and "vectors" in classifier.state_dict()


def test_bad_arguments(trained):
    with pytest.raises(ValueError, match="weights must be fp32, int16, int8 or null; got fp16"):
        trained.for_inference("fp16")
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, 32, 32\]; got \[3, 32, 32\]"):
        trained.for_inference().encode_image(torch.rand(3, 32, 32))
    values = dataclasses.asdict(load_config("spikeclip-demo"))
    with pytest.raises(ValueError, match="weights must be fp32, int16, int8 or null; got int4"):
        SpikeCLIPConfig.from_dict({**values, "weights": "int4"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_gives_the_same_gradients(trained, dtype):
    images = [render(4, seed=seed).images.cuda() for seed in (5, 6)]
    runs = []
    for graphed in (False, True):
        tower = copy.deepcopy(trained.visual).cuda().train()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            if graphed:
                state = copy.deepcopy(tower.state_dict())
                torch.cuda.make_graphed_callables(tower, (images[0].clone(),))
                tower.load_state_dict(state)  # the warm-up has moved the running statistics
            seen = []
            for batch in images:
                features = tower(batch)
                gradients = torch.autograd.grad(features.square().sum(), list(tower.parameters()))
                seen += [t.detach().clone() for t in (features, *gradients)]
        runs.append([*seen, *tower.buffers()])
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("kind", ["fp32", "int16", "int8"])
def test_a_cuda_graph_gives_the_same_features(trained, kind):
    ready, images = trained.visual.for_inference(kind).cuda(), [render(3, seed=seed).images.cuda() for seed in (5, 6)]
    want = [ready(batch) for batch in images]
    torch.cuda.make_graphed_callables(ready, (images[0].clone(),))
    for batch, features in zip(images, want, strict=True):
        torch.testing.assert_close(ready(batch), features)
