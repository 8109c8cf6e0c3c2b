import copy

import pytest
import torch
from kept import counted
from multiplied import Multiplied

from spikeclip import SpikeCLIP, ops
from spikeclip.energy import profile
from spikeclip.models import SpikeCLIPConfig, load_config
from spikeclip.models.readout import StepReadout
from spikeclip.nn import BNLIF, LIF, FiringRates, SpikeConv2d, SpikeLinear
from spikeclip.ops import _density
from spikeclip.training.compositions import render


def through_plain_layers(model):
    """The same model through torch's own dense convolutions, matrix products and norms, and dense spikes."""

    def conv(layer, s):
        return torch.nn.Conv2d.forward(layer, s.unpack().permute(0, 3, 1, 2) if isinstance(s, ops.PackedSpikes) else s)

    def linear(layer, s):
        return torch.nn.Linear.forward(layer, s.unpack() if isinstance(s, ops.PackedSpikes) else s)

    def norm(layer, x):
        x = x.movedim(layer.channel_dim, -1)
        statistics = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        y = torch.nn.functional.batch_norm(x.flatten(0, -2), *statistics, layer.training, layer.momentum).view_as(x)
        if layer.pool:
            images = torch.nn.functional.max_pool2d(y.flatten(0, 1).permute(0, 3, 1, 2), *layer.pool)
            y = images.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        neuron = {"tau": layer.tau, "v_threshold": layer.v_threshold, "detach_reset": layer.detach_reset}
        return ops.lif(y, packed=True, backend="torch", **neuron)[0]

    replacements = {SpikeConv2d: conv, SpikeLinear: linear, BNLIF: norm}
    for module in model.modules():
        if type(module) in replacements:
            module.forward = replacements[type(module)].__get__(module)


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_paper_model_has_the_papers_parameters():
    model = SpikeCLIP.from_config("spikeclip-4-384")
    assert trainable(model.visual) == 9_513_396
    embeddings = sum(p.numel() for n, p in model.text.named_parameters() if "embedding" in n and p.requires_grad)
    assert trainable(model.text) - embeddings == 22_022_660


def test_the_large_tower_is_spikingformers():
    """Spikingformer-8-512 (arXiv 2304.11954): 29.68 M parameters with its head of 1,000 classes."""
    tower = SpikeCLIP.from_config("spikeclip-8-512").visual
    head = (512 + 1) * 1000
    assert trainable(tower) - trainable(tower.project) + head == pytest.approx(29.68e6, rel=1e-3)


def test_paper_tower_counts_operations_and_neurons():
    model = SpikeCLIP.from_config("spikeclip-4-384").eval()
    counted = profile(model.visual, torch.rand(1, 3, 32, 32))
    assert sum(neuron.neurons for neuron in counted.neurons) == 1_204_224
    # The paper's (q k^T) v over 64 tokens costs 934.2 M MAC; q (k^T v) with heads of 48 is cheaper and is what runs.
    heads, tokens, width = model.config.vision.num_heads, 64, 384
    saved = 4 * 2 * tokens * width * (tokens - width // heads)
    macs, readout = sum(product.padded_macs / product.runs for product in counted.products), 4 * width
    assert macs - readout == 931_086_336 and round((macs + saved) / 1e5) == 9342


def test_encoders_have_open_clips_interface():
    model = SpikeCLIP.from_config("spikeclip-demo").eval()
    images, tokens = torch.rand(3, 3, 32, 32), model.tokenizer(["a photo of a red star.", "a blue ring."])
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(tokens)
        assert image.shape == (3, model.config.embed_dim) and text.shape == (2, model.config.embed_dim)
        for plain, unit in (
            (image, model.encode_image(images, normalize=True)),
            (text, model.encode_text(tokens, normalize=True)),
        ):
            torch.testing.assert_close(unit, plain / plain.norm(dim=-1, keepdim=True))
        got = model(images, tokens)
        torch.testing.assert_close(got[0].norm(dim=-1), torch.ones(3))
        assert torch.equal(got[2], model.logit_scale.exp())
        assert model(image=images)[1] is None
        model.output_dict = True
        assert set(model(images, tokens)) == {"image_features", "text_features", "logit_scale"}


def test_open_clips_own_zero_shot_code_runs_on_it():
    from open_clip import build_zero_shot_classifier

    from spikeclip.zeroshot import class_vectors

    model = SpikeCLIP.from_config("spikeclip-demo").eval()
    names, templates = ["red star", "blue ring", "green bar"], ("a photo of a {}.", "a {}.")
    theirs = build_zero_shot_classifier(model, model.tokenizer, names, templates, num_classes_per_batch=None)
    torch.testing.assert_close(class_vectors(model, names, templates), theirs.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_tower_is_the_same_on_every_backend(training):
    model = SpikeCLIP.from_config("spikeclip-demo").visual.train(training)
    images = torch.rand(4, 3, 32, 32)
    results = []
    for backend in ("cpu", "torch"):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    (a, ga), (b, gb) = results
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    largest = max(g.abs().max().item() for g in gb)  # biases before a BatchNorm have no gradient but rounding
    for one, two in zip(ga, gb, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("training", [True, False])
def test_towers_numbers_are_those_of_plain_torch_layers(training):
    model = SpikeCLIP.from_config("spikeclip-demo").train(training)
    images, tokens = render(6, seed=0).images, torch.randint(0, 30, (6, model.text.context_length))
    results = []
    for replaced in (False, True):
        if replaced:
            through_plain_layers(model)
        model.zero_grad()
        out = torch.cat([model.encode_image(images), model.encode_text(tokens)])
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (a, ga), (b, gb) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    largest = max(g.abs().max().item() for g in gb)
    assert len(ga) == len(gb) == 39
    for one, two in zip(ga, gb, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * largest)


def test_every_layer_fires_and_every_parameter_learns():
    model = SpikeCLIP.from_config("spikeclip-demo").visual.train()
    with FiringRates(model) as watch:
        model(render(64, seed=0).images).square().sum().backward()
    assert watch.silent() == [] and len(watch.rates()) == sum(isinstance(m, (LIF, BNLIF)) for m in model.modules())
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_grad_checkpointing_keeps_less_and_changes_nothing_else():
    model = SpikeCLIP.from_config("spikeclip-4-384")
    tower, images, state = model.visual.train(), render(4, seed=0).images, copy.deepcopy(model.visual.state_dict())
    results, kept = [], []
    for enable in (True, False):
        tower.load_state_dict(state)
        tower.zero_grad()
        model.set_grad_checkpointing(enable)
        with counted(tower.parameters()) as sizes:
            features = tower(images)
        features.square().sum().backward()
        kept.append(sum(sizes.values()))
        results.append([features.detach(), *(p.grad.clone() for p in tower.parameters()), *map(torch.clone, tower.buffers())])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert 2.5 * kept[0] < kept[1]
    with pytest.raises(ValueError, match="grad checkpointing is for a model that learns"):
        model.for_inference().set_grad_checkpointing()


def test_first_layers_run_once_as_if_they_ran_at_every_step():
    """Training statistics and outputs equal those of a tower that convolves T copies."""
    tokenizer = SpikeCLIP.from_config("spikeclip-demo").visual.tokenizer.train()
    images = torch.rand(4, 3, 32, 32)
    once = tokenizer.first_pool(tokenizer.norms[0](tokenizer.convs[0](images)))
    tokenizer.norms[0].reset_running_stats()
    copies = tokenizer.first_pool(tokenizer.norms[0](tokenizer.convs[0](tokenizer.encode(images).flatten(0, 1))))
    torch.testing.assert_close(copies.unflatten(0, (-1, 4)), once.expand(tokenizer.encode.T, *once.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["spikeclip-demo", "spikeclip-4-384"])  # with a first pool and without
def test_gradients_of_the_first_layers_lie_in_memory_as_their_values_do(config):
    """In another order PyTorch's convolution, norm and pool copy them, which takes longer than the layers themselves."""
    tower, lies = SpikeCLIP.from_config(config).visual.train(), []

    def watch(value):
        value.register_hook(lambda grad: lies.append((grad.stride(), value.stride())))

    for module in (tower.tokenizer.convs[0], tower.tokenizer.norms[0], tower.tokenizer.first_pool):
        module.register_forward_hook(lambda module, inputs, value: watch(value))
    tower.tokenizer.encode.register_forward_pre_hook(lambda module, inputs: watch(inputs[0]))
    tower(torch.rand(2, 3, 32, 32)).sum().backward()
    assert len(lies) == 4 and all(grad == value for grad, value in lies), lies


def test_readout_starts_at_the_papers_weights_and_is_no_softmax():
    readout = StepReadout(4)
    torch.testing.assert_close(readout.weight.detach().exp(), torch.tensor([0.1, 0.2, 0.4, 0.8]))
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(readout(x), (readout.weight.view(4, 1, 1) * x).sum(0))


def test_text_tower_equals_its_equations():
    model = SpikeCLIP.from_config("spikeclip-demo").text.eval()
    tokens = torch.randint(0, model.token_embedding.num_embeddings, (5, model.context_length))
    with torch.no_grad():
        x = (model.token_embedding.weight[tokens] + model.positional_embedding).reshape(5, -1)
        current = model.norm1(x).expand(4, -1, -1)
        spikes, _ = ops.lif(current, tau=2.0, backend="torch")
        hidden = model.fc1(spikes)
        hidden = model.norm2(hidden.reshape(20, -1)).reshape(hidden.shape)
        spikes, _ = ops.lif(hidden, tau=2.0, backend="torch")
        want = (model.readout.weight.view(4, 1, 1) * model.fc2(spikes)).sum(0)
        torch.testing.assert_close(model(tokens), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 32, 32), r"images must have shape \[B, 3, 32, 32\]; got \[3, 32, 32\]"),
        (torch.rand(1, 3, 16, 16), r"images must have shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images must be floating.*torch.uint8"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        SpikeCLIP.from_config("spikeclip-demo").encode_image(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), r"tokens must have shape \[B, 20\]; got \[2, 5\]"),
        (torch.zeros(2, 20), "tokens must be integers; got torch.float32"),
        (torch.full((1, 20), 49_000), r"tokens must lie in 0\.\..*got 49000"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        SpikeCLIP.from_config("spikeclip-demo").encode_text(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 0}, "T must be >= 1; got 0"),
        ({"depth": 3}, "config has unknown settings depth; known are embed_dim"),
        ({"text": {"context_length": 20}}, "text is incomplete"),
        ({"vision": 7}, "vision must be a table of settings; got 7"),
    ],
)
def test_bad_config(change, message):
    import dataclasses

    values = dataclasses.asdict(load_config("spikeclip-demo"))
    with pytest.raises(ValueError, match=message):
        SpikeCLIPConfig.from_dict({**values, **change})


def test_unknown_config_lists_the_known():
    known = "spikeclip-4-384, spikeclip-8-512, spikeclip-demo"
    with pytest.raises(ValueError, match=rf"config must be one of {known}, or a JSON file; got 'vit'"):
        load_config("vit")


@pytest.mark.parametrize("slow", [True, False], ids=["slow", "native"])
def test_autocast_multiplies_no_sixteen_bits_that_this_cpu_does_not(monkeypatch, slow):
    monkeypatch.setattr(_density, "SLOW_ON_CPU", frozenset({torch.bfloat16} if slow else ()))
    tower, images, grads = SpikeCLIP.from_pretrained("spikeclip-demo").visual.train(), render(4, seed=1).images, []
    for enabled in (True, False):
        tower.zero_grad()
        with Multiplied() as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                features = tower(images)
            features.float().square().sum().backward()
        assert features.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert seen.dtypes == {torch.float32} if slow or not enabled else torch.bfloat16 in seen.dtypes
        grads.append((features.detach().float(), tower.project.weight.grad, tower.tokenizer.convs[0].weight.grad))
    assert all(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9 for a, b in zip(*grads, strict=True))
