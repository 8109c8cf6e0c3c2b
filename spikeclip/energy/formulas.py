"""What a network costs under a cost model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from .cost import CostModel, Energy, Network
from .counts import NeuronCount, OtherCount, ProductCount

Layers = Iterator[tuple[str, Energy]]


def by_layer(model: CostModel, network: Network) -> list[tuple[str, Energy]]:
    """(name, its energy) of every product, layer of neurons (an ANN has none) and other op that the model prices."""
    return list(_FORMULAS[model.formula](model, network))


def energy(model: CostModel, network: Network) -> Energy:
    """What a sample costs."""
    return sum((part for _, part in by_layer(model, network)), Energy())


def _operations(model: CostModel, network: Network, product: ProductCount) -> float:
    """pJ of a product's arithmetic: accumulates where spikes feed it, else multiply-accumulates.

    Zeros are skipped in spikes and their sums, integers; analog values are multiplied whatever they are.
    """
    if not network.spiking:
        return model.mac(network) * product.dense_macs / product.runs
    if product.analog:
        return model.pj["mac"] * product.dense_macs
    return model.pj["ac"] * product.effective_acs + model.pj["mac"] * product.effective_macs


def _arithmetic(model: CostModel, network: Network) -> Layers:
    for product in network.profile.products:
        yield product.name, Energy(compute=_operations(model, network, product))


def _update(model: CostModel) -> float:
    """pJ of a membrane's update: the leak is a multiply, the input an add; comparison and reset come free."""
    return model.pj["multiply"] + model.pj["add"]


def _bits(model: CostModel, network: Network) -> tuple[int, int]:
    """Of weights and of analog activations."""
    return network.bits or (model.bits, model.bits)


def _input_bits(model: CostModel, network: Network, product: ProductCount) -> float:
    return 1 if network.spiking and product.spiking else _bits(model, network)[1]


def _second_bits(model: CostModel, network: Network, product: ProductCount) -> float:
    """Of the other factor of a product of activations."""
    return 1 if network.spiking and product.operands.endswith("spikes") else _bits(model, network)[1]


def _runs(network: Network, product: ProductCount) -> int:
    return product.runs if network.spiking else 1


def _once(model: CostModel, network: Network) -> Layers:
    def moved(what: str, values: float, bits: float, held: float) -> float:
        return values * bits / 64 * model.access(model.levels[what], held * bits / 8)

    weight_bits, activation_bits = _bits(model, network)
    for product in network.profile.products:
        runs, share = _runs(network, product), 1 / product.runs
        bits = _input_bits(model, network, product)
        activations = moved("activations", product.inputs * share * runs, bits, product.inputs * share)
        if product.second:
            second = product.second * share
            activations += moved("activations", second * runs, _second_bits(model, network, product), second)
        # What spikes and weights make goes into neurons, whose output and state are below; scores are written and read.
        if bits > 1 or product.operands.endswith("spikes"):
            activations += moved("activations", product.outputs * share * runs, activation_bits, product.outputs * share)
        weights = moved("weights", product.weights, weight_bits, product.weights)
        yield product.name, Energy(compute=_operations(model, network, product), weights=weights, activations=activations)
    for neuron in _neurons(network):
        yield (
            neuron.name,
            Energy(
                neurons=neuron.updates * _update(model),
                activations=moved("activations", neuron.updates, 1, neuron.neurons),
                state=2 * moved("state", neuron.updates, model.bits, neuron.neurons),
            ),
        )
    for other in network.profile.others:
        yield f"{other.name}:{other.op}", Energy(compute=_other(model, other) * (1 if network.spiking else 1 / other.runs))


def _neurons(network: Network) -> tuple[NeuronCount, ...]:
    return network.profile.neurons if network.spiking else ()


def _other(model: CostModel, other: OtherCount) -> float:
    if other.category == "norm":
        return 0.0 if other.folds else other.operations * (model.pj["multiply"] + model.pj["add"])
    return other.operations * model.pj["add"] if other.category in ("elementwise", "reduction") else 0.0


def _events(model: CostModel, network: Network) -> Layers:
    weight_bits, activation_bits = _bits(model, network)
    word = 4.0  # bytes of an access

    def access(count: float, held: float, bits: int) -> float:
        return count * bits / 32 * model.access("sram", held * word * bits / 32)

    def queue(spikes: float) -> float:
        return access(spikes, model.fifo["entries"], 32)

    add, mac = model.pj["add"], model.mac(network)
    for p in network.profile.products:
        compute = _operations(model, network, p)
        # A product of two activations reads the other one where a layer reads its weights.
        other, other_bits = (p.weights, weight_bits) if p.weights else (p.second / p.runs, activation_bits)
        convolution = "conv" in p.op
        if network.spiking and p.spiking:
            events = p.effective_acs + p.effective_macs
            addressing = add * events + (2 * mac * p.nonzeros if convolution else 0.0)
            weights, activations = access(events, other, other_bits), queue(p.nonzeros)
            state = 2 * access(events, p.outputs / p.runs, model.bits)
            yield p.name, Energy(compute, 0.0, weights, activations, state, addressing)
            continue
        share = _runs(network, p) / p.runs
        dense, inputs, outputs = p.dense_macs * share, p.inputs * share, p.outputs * share
        addressing = add * (
            inputs + outputs + (p.weights * p.runs * outputs / p.dense_macs if convolution and p.dense_macs else 0.0)
        )
        activations = access(dense if convolution else inputs, p.inputs / p.runs, activation_bits)
        if not network.spiking:
            activations += access(outputs, p.outputs / p.runs, activation_bits)
        yield p.name, Energy(compute, 0.0, access(dense, other, other_bits), activations, 0.0, addressing)
    for n in _neurons(network):
        neurons = n.updates * _update(model) + n.spikes.mean * add
        state = 2 * access(n.updates, n.neurons, model.bits)
        yield n.name, Energy(neurons=neurons, activations=queue(n.spikes.mean), state=state)


def _movement(model: CostModel, network: Network) -> Layers:
    def moved(bits: float, held: float) -> float:
        return bits / 64 * model.access("sram", held / 8)

    weight_bits, activation_bits = _bits(model, network)
    for p in network.profile.products:
        runs, inputs = _runs(network, p), p.inputs / p.runs
        weights = moved(p.weights * weight_bits * runs, p.weights * weight_bits)
        if network.spiking and p.spiking:
            addresses = [inputs * rate * math.ceil(math.log2(max(inputs, 2))) for rate in p.rates]
            activations = moved(sum(min(inputs, bits) for bits in addresses), inputs)
        else:
            activations = moved(inputs * runs * activation_bits, inputs * activation_bits)
        second = p.second / p.runs * _second_bits(model, network, p)
        activations += moved(second * runs, second)
        yield p.name, Energy(compute=_operations(model, network, p), weights=weights, activations=activations)
    for n in _neurons(network):
        bits = model.state["bits"]
        yield n.name, Energy(neurons=n.updates * _update(model), state=moved(2 * n.updates * bits, n.neurons * bits))


_FORMULAS: dict[str, Callable[[CostModel, Network], Layers]] = {
    "arithmetic": _arithmetic,
    "once": _once,
    "events": _events,
    "movement": _movement,
}
