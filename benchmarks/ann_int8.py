"""The ANN twin in int8, as torchao quantises for x86: calibrated on the images it is timed with, one shape alone."""

from __future__ import annotations

import importlib.util

import torch
from peers import Missing
from torch import Tensor, nn


def check_installed(device: str) -> None:
    if device != "cpu":
        raise Missing("torchao's x86 quantisation is a CPU's")
    if importlib.util.find_spec("torchao") is None:
        raise Missing("torchao is not installed (the bench extra has it)")


def quantized(ann: nn.Module, images: Tensor) -> nn.Module:
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(ann, (images,)).module(), quantizer)
        prepared(images)
        lowered = lower_pt2e_quantized_to_x86(convert_pt2e(prepared), (images,))
        torch.compiler.reset()
        return torch.compile(lowered)
