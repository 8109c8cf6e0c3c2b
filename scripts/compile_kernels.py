"""Compile every Triton kernel for sm_80 and sm_90, without a GPU, and report registers, spills and shared memory.

Exit code 1 if one does not compile, spills or asks for more shared memory than the smallest of these devices has. Registers and
spills are read from the report of the assembler that triton ships.
Arguments pick kernels by the first word of their names, all without any.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from spikeclip.kernels import _step, bn_lif, lif, max_pool, pack, spike_attention, spike_conv2d, spike_lif
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spikeclip.ops.surrogate import SURROGATES

SHARED = {80: 99 * 1024, 90: 227 * 1024}  # bytes a block may have: of sm_86 and sm_89, which run sm_80's kernels, and of sm_90
DTYPES = ("fp32", "fp16", "bf16")
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i16": torch.int16, "i8": torch.int8}
TRITON = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
STEPS = (4, _step.SEGMENT, 2 * _step.SEGMENT + 1)  # few, as many as registers hold, more


class Variant(NamedTuple):
    """One compilation; the first two words of ``name`` are its line of the report, ``aligned`` arguments divide by 16."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object]
    aligned: tuple[str, ...] = ()


def variant(name, kernel, pointers, integers, floats, constants, launch, aligned=()) -> Variant:
    """Pointers are aligned, as allocations are; an integer among ``constants`` is an argument that equals 1."""
    signature = {key: f"*{dtype}" for key, dtype in pointers.items()}
    signature |= dict.fromkeys((key for key in integers if key not in constants), "i32") | dict.fromkeys(floats, "fp32")
    tile = {key: value for key, value in launch.items() if key.isupper()}
    options = {key: value for key, value in launch.items() if not key.isupper()}
    return Variant(name, kernel, signature, constants | tile, options, (*pointers, *(a for a in aligned if a in signature)))


def with_ones(v: Variant):
    """It, and for float32 the same for one neuron and one step: arguments that equal 1 become constants."""
    yield v
    if v.signature["x_ptr"] == "*fp32" and v.constants["SEGMENT"] == STEPS[0]:
        ones = dict.fromkeys(("steps", "n", "x_step") if "x_step" in v.signature else ("steps", "n"), 1) | _step.segments(1)
        signature = {key: kind for key, kind in v.signature.items() if key not in ones}
        yield v._replace(name=f"{v.name} ones", signature=signature, constants=v.constants | ones)


def lif_forward_variants():
    every = itertools.product(DTYPES, STEPS, [(0, 1, 0), (1, 1, 0), (0, 0, 1)])
    for dtype, steps, (learnt, decay, soft) in every:
        signature = dict.fromkeys(("x_ptr", "spikes_ptr"), f"*{dtype}")
        signature |= dict.fromkeys(("v0_ptr", "v_last_ptr", "tau_ptr"), "*fp32") | {"steps": "i32", "n": "i32"}
        signature |= dict.fromkeys(("tau", "v_threshold", "v_reset"), "fp32")
        constants = {"HAS_V0": bool(learnt), "TAU_TENSOR": bool(learnt), "DECAY_INPUT": bool(decay), "SOFT_RESET": bool(soft)}
        constants |= {"EXACT": not learnt, **_step.segments(steps)}
        name = f"lif_fwd {dtype} steps={steps} tau_tensor={learnt} decay={decay} soft={soft}"
        options = {"num_warps": lif.LAUNCH["num_warps"], "enable_fp_fusion": False}
        yield from with_ones(Variant(name, lif._lif_fwd, signature, {**constants, "BLOCK": lif.LAUNCH["BLOCK"]}, options))


def lif_backward_variants():
    every = [(name, row.index, 4, 0, 1, 0, 0) for name, row in SURROGATES.items()]
    every += [("sigmoid", 0, steps, 1, 1, 0, 0) for steps in STEPS]
    every += [("atan", 1, steps, learnt, *other) for steps in STEPS for learnt, *other in ((1, 0, 1, 1), (0, 1, 0, 1))]
    for dtype, (name, kind, steps, learnt, decay, soft, detach) in itertools.product(DTYPES, every):
        wide = dtype == "fp32"
        signature = dict.fromkeys(("ds_ptr", "x_ptr", "dx_ptr"), f"*{dtype}") | {"slots_ptr": "*i32" if wide else "*i16"}
        signature |= dict.fromkeys(("dv_last_ptr", "v0_ptr", "dv0_ptr", "tau_ptr"), "*fp32") | {"dtau_ptr": "*fp64"}
        signature |= {"steps": "i32", "n": "i32", "x_step": "i32"}
        signature |= dict.fromkeys(("tau", "v_threshold", "v_reset", "alpha"), "fp32")
        constants = {
            "HAS_DS": True, "HAS_DV": bool(learnt), "HAS_V0": bool(learnt), "TAU_TENSOR": bool(learnt),
            "DECAY_INPUT": bool(decay), "SOFT_RESET": bool(soft), "DETACH_RESET": bool(detach), "KIND": kind, "WIDE": wide,
            "EXACT": not learnt, **_step.segments(steps), "BLOCK": lif.launch_backward(steps)["BLOCK"],
        }  # fmt: skip
        name = f"lif_bwd {dtype} {name} tau_tensor={learnt} decay={decay} soft={soft} steps={steps}"
        options = {"num_warps": lif.LAUNCH["num_warps"], "enable_fp_fusion": False}
        yield from with_ones(Variant(name, lif._lif_bwd, signature, constants, options))


def bn_variants():
    """Round and ragged channels, and rows, channels and steps of 1; every surrogate, and every way to reset and to sum."""
    sizes = ("steps", "rows", "channels", "per_row", "x_step", "rows_each", "parts", "count")
    exact = {"enable_fp_fusion": False}
    shapes = {"round": ((), ("rows", "channels")), "ragged": ((), ()), "ones": (sizes[:5], ())}

    def each(name, kernel, pointers, floats, constants, launch):
        for shape, (ones, aligned) in shapes.items():
            integers = [key for key in sizes if key in kernel.arg_names]
            ones = {key: 1 for key in ones if key in integers and key not in kernel.do_not_specialize}
            yield variant(
                f"{name} {shape}", kernel, pointers, integers, floats, {**constants, **ones}, {**launch, **exact},
                (*(key for key in aligned if key not in kernel.do_not_specialize), "rows_each"),
            )  # fmt: skip

    yield from each("bn_total", bn_lif._bn_total, dict.fromkeys(("sums_ptr", "total_ptr"), "fp32"), (), {}, bn_lif.LAUNCH_SUMS)
    pointers = [f"{key}_ptr" for key in ("sums", "scale", "inverse", "mean", "factors", "dweight")]
    for apart in (False, True):
        yield from each(
            f"bn_factors apart={apart}", bn_lif._bn_factors, dict.fromkeys(pointers, "fp32"), (), {"APART": apart},
            bn_lif.LAUNCH_FACTORS,
        )  # fmt: skip
    pointers = [f"{key}_ptr" for key in ("sums", "x", "weight", "bias", "mean", "var", "inverse", "scale", "shift")]
    for dtype, norm, given in itertools.product(DTYPES, (*DTYPES, "fp64"), (False, True)):
        kinds = {**dict.fromkeys(pointers, "fp32"), "x_ptr": dtype, "weight_ptr": norm, "bias_ptr": norm}
        constants = {"HAS_WEIGHT": given, "HAS_BIAS": given}
        yield from each(f"bn_affine {dtype} {norm} {given}", bn_lif._bn_affine, kinds, ("eps",), constants, bn_lif.LAUNCH_SUMS)
    numbers = ("tau", "v_threshold", "v_reset")
    for dtype in DTYPES:
        pointers = {"dz_ptr": dtype, "x_ptr": dtype, "factors_ptr": "fp32"}
        yield from each(f"bn_dx {dtype}", bn_lif._bn_dx, pointers, (), {}, bn_lif.LAUNCH_DX)
        yield from each(
            f"bn_stats {dtype}", bn_lif._bn_stats, {"x_ptr": dtype, "sums_ptr": "fp32"}, (), {}, bn_lif.LAUNCH_STATS
        )
        ways = itertools.product((dtype, "i32"), STEPS, [(0, 1, 0), (1, 1, 0), (1, 0, 1)])
        for spikes, steps, (full, decay, soft) in ways:
            pointers = dict.fromkeys(("v0_ptr", "scale_ptr", "shift_ptr", "v_last_ptr", "tau_ptr"), "fp32")
            pointers |= {"x_ptr": dtype, "spikes_ptr": spikes}
            constants = dict.fromkeys(("HAS_V0", "HAS_SCALE", "TAU_TENSOR"), bool(full))
            constants |= {"DECAY_INPUT": bool(decay), "SOFT_RESET": bool(soft), "EXACT": not full, **_step.segments(steps)}
            name = f"bn_lif_fwd {dtype} spikes={spikes} steps={steps} full={full} decay={decay} soft={soft}"
            yield from each(name, bn_lif._bn_lif_fwd, pointers, numbers, constants, bn_lif.LAUNCH_FORWARD)
        every = [(name, row.index, 4, 1, 1, 1, 0, 0) for name, row in SURROGATES.items()]
        ways = ((1, 0, 1, 0, 0), (0, 1, 1, 0, 0), (0, 1, 0, 1, 1), (1, 1, 0, 0, 1))
        every += [("sigmoid", 0, steps, *way) for steps in (1, 4, _step.SEGMENT) for way in ways]
        for name, kind, steps, write, sums, decay, soft, detach in every:
            pointers = dict.fromkeys(("scale_ptr", "shift_ptr", "mean_ptr", "factors_ptr", "sums_ptr"), "fp32")
            pointers |= dict.fromkeys(("ds_ptr", "x_ptr", "dx_ptr"), dtype)
            constants = {
                "HAS_FACTORS": bool(write),
                "SUMS": bool(sums),
                "WRITE": bool(write) or dtype != "fp16",
                "DECAY_INPUT": bool(decay),
                "SOFT_RESET": bool(soft),
            }
            constants |= {"DETACH_RESET": bool(detach), "KIND": kind, "EXACT": bool(decay), "STEPS": steps}
            name = f"bn_lif_bwd {dtype} {name} steps={steps} write={write} sums={sums} decay={decay} soft={soft}"
            yield from each(name, bn_lif._bn_lif_bwd, pointers, (*numbers, "alpha"), constants, bn_lif.LAUNCH_BACKWARD)


def pool_variants():
    """Every dtype, windows that overlap and that do not, round and ragged channels, wide offsets, and everything of size 1."""
    sizes = ("total", "groups", "channels", "height", "width", "out_height", "out_width")
    windows = {"3/2": (3, 2, 1), "2/2": (2, 2, 0), "3/1": (3, 1, 1), "15/1": (15, 1, 7)}
    shapes = {"round": ((), ("channels",), tl.int32), "ragged": ((), (), tl.int32), "wide": ((), ("channels",), tl.int64)}
    shapes["ones"] = (sizes, (), tl.int32)
    for dtype, (window, place), shape in itertools.product(DTYPES, windows.items(), shapes):
        ones, aligned, index = shapes[shape]
        constants = {**dict.fromkeys(ones, 1), "INDEX": index, "VECTOR": 4 if dtype == "fp32" else 8}
        constants |= dict(zip(("SIZE", "STRIDE", "PADDING"), place, strict=True))
        launch = {**max_pool.LAUNCH, "enable_fp_fusion": False}
        pointers = {"x_ptr": dtype, "scale_ptr": "fp32", "values_ptr": dtype, "index_ptr": "u8"}
        name = f"{dtype} {window} {shape}"
        yield variant(f"max_pool {name}", max_pool._max_pool_fwd, pointers, sizes, (), constants, launch, aligned)
        pointers = {"dvalues_ptr": dtype, "index_ptr": "u8", "x_ptr": dtype, "factors_ptr": "fp32", "dx_ptr": dtype}
        for factors in (False, True):
            yield variant(
                f"max_pool_bwd {name} factors={factors}", max_pool._max_pool_bwd, pointers, sizes, (),
                {**constants, "HAS_FACTORS": factors}, launch, aligned,
            )  # fmt: skip


def pack_variants():
    sizes = ("length", "per_row", "words")
    for dtype, one in itertools.product((*DTYPES, "u8"), (False, True)):
        ones, aligned = (dict.fromkeys(sizes, 1), ()) if one else ({}, ("length", "words"))
        pointers = {"s_ptr": dtype, "words_ptr": "i32"}
        name = f"pack {dtype} {'one' if one else 'many'}"
        checked = {**ones, "CHECK": one}
        yield variant(name, pack._pack, {**pointers, "flag_ptr": "i32"}, sizes, (), checked, pack.LAUNCH, aligned)
        yield variant(f"un{name}", pack._unpack, pointers, sizes, (), ones, pack.LAUNCH, aligned)


SHAPE = ("height", "width", "out_height", "out_width", "kernel_width", "stride_h", "stride_w", "pad_h", "pad_w", "taps")
# Arguments that are 1 in a matrix product; the paddings are 0.
MATRIX = dict.fromkeys((key for key in SHAPE if not key.startswith("pad")), 1)
SIZES = ("m", "n", "channels", "per_row", *SHAPE)


STRIDES = ("stride_part", "stride_tap", "stride_k", "stride_n")


def layout_variants():
    """Weights of every dtype, contiguous and transposed, and the sums of a gradient's parts."""
    parts = {"fp32": ("bf16", 3), "i16": ("bf16", 2), "i8": ("bf16", 1), "fp16": ("fp16", 1), "bf16": ("bf16", 1)}
    for (dtype, (out, count)), one in itertools.product(parts.items(), ("stride_k", "stride_tap")):
        integers, pointers = ("channels", "taps", "per_line", "size", *STRIDES[1:]), {"w_ptr": dtype, "out_ptr": out}
        launch, constants = {**spike_conv2d.LAUNCH_LAY, "enable_fp_fusion": False}, {one: 1, "PARTS": count}
        yield variant(f"lay {dtype} {one}", spike_conv2d._lay, pointers, integers, (), constants, launch, ("size",))
    for ones in ({}, {"taps": 1}, {"taps": 1, "splits": 1}):
        integers, pointers = ("splits", "taps", "channels", "n"), {"partial_ptr": "fp32", "dw_ptr": "fp32"}
        name = f"collect fp32 {' '.join(ones)}"
        yield variant(name, spike_conv2d._collect, pointers, integers, (), ones, spike_conv2d.LAUNCH_COLLECT, ("channels", "n"))


def product_variants(capability):
    """Every number of parts, few rows and many, as a matrix product and as a convolution, with round sizes and ragged ones."""
    integers, kinds = (*SIZES, *STRIDES), (("fp16", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3))
    for (dtype, parts), m, conv, ragged in itertools.product(kinds, (16, 1024, 100_000), (False, True), (False, True)):
        n = 20 if ragged else 384
        ones = ({} if conv else MATRIX) | {"stride_n" if ragged and parts == 1 else "stride_k": 1}
        constants = {**ones, "HAS_SCALE": parts > 1, "HAS_BIAS": True, "PARTS": parts}
        pointers = {"words_ptr": "i32", "w_ptr": dtype, "scale_ptr": "fp32", "bias_ptr": "fp32", "table_ptr": "i32"}
        pointers["y_ptr"] = "fp32" if parts > 1 else dtype
        aligned = (*(() if ragged else ("m", "n", "channels")), *(STRIDES if parts > 1 or not ragged else ()))
        name = f"product {dtype} parts={parts} m={m} conv={conv} ragged={ragged}"
        launch = spike_conv2d.launch_forward(parts, m, n, capability >= 90)
        yield variant(name, spike_conv2d._spike_product, pointers, integers, (), constants, launch, aligned)
    constants = {key: 1 for key in integers if not key.startswith("pad")}
    constants |= {"HAS_SCALE": False, "HAS_BIAS": False, "PARTS": 3}
    pointers = {"words_ptr": "i32", "w_ptr": "bf16", "table_ptr": "i32"}
    pointers |= dict.fromkeys(("scale_ptr", "bias_ptr", "y_ptr"), "fp32")
    launch = spike_conv2d.launch_forward(3, 1, 1, capability >= 90)
    yield variant("product bf16 ones", spike_conv2d._spike_product, pointers, integers, (), constants, launch)


def gradient_variants(capability):
    integers = (*SIZES, "rows_each")
    for dtype, conv, (channels, n) in itertools.product(DTYPES, (False, True), ((20, 20), (48, 384), (384, 384))):
        aligned = () if n == 20 else ("m", "n", "channels", "rows_each")
        pointers = {"words_ptr": "i32", "dy_ptr": dtype, "dw_ptr": "fp32", "table_ptr": "i32"}
        launch = spike_conv2d.launch_gradient(TORCH[dtype], channels, n, capability >= 90)
        name, ones = f"gradient {dtype} conv={conv} channels={channels}", {} if conv else MATRIX
        yield variant(name, spike_conv2d._spike_product_dw, pointers, integers, (), ones, launch, aligned)
    ones = {key: 1 for key in integers if not key.startswith("pad") and key != "rows_each"}
    pointers = {"words_ptr": "i32", "dy_ptr": "fp32", "dw_ptr": "fp32", "table_ptr": "i32"}
    launch = spike_conv2d.launch_gradient(torch.float32, 1, 1, capability >= 90)
    yield variant("gradient fp32 ones", spike_conv2d._spike_product_dw, pointers, integers, (), ones, launch)


def attention_variants():
    """Heads of one word and of more, and everything of size 1."""
    sizes = ("n", "s", "channels", "per_row", "apart", "heads", "width")
    rows = ("rows", "channels", "per_row", "a_first", "heads", "width")
    for width in (1, 32, 48):
        ones, other = (dict.fromkeys(sizes, 1), dict.fromkeys(rows, 1)) if width == 1 else ({}, {})
        aligned = ("channels", "y_row", "apart", "a_first", "b_first", "width")
        pointers = {"q_ptr": "i32", "k_ptr": "i32", "v_ptr": "i32"}
        for dtype in DTYPES:
            out, launch = {**pointers, "y_ptr": dtype}, spike_attention.launch_forward(width)
            name, kernel = f"attention {dtype} width={width}", spike_attention._attention
            yield variant(name, kernel, out, (*sizes, "rows_each"), ("scale",), ones, launch, (*aligned, "rows_each"))
            yield variant(f"{name} direct", spike_attention._attention_direct, out, sizes, ("scale",), ones, launch, aligned)
        for dtype in DTYPES[1:]:
            every = pointers | dict.fromkeys(("dy_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), dtype)
            name, launch = f"attention_bwd {dtype} width={width}", spike_attention.launch_backward(width)
            yield variant(name, spike_attention._attention_bwd, every, (*sizes, "y_row"), ("scale",), ones, launch, aligned)
        for b in ("i32", *DTYPES):
            pointers = {"a_ptr": "i32", "b_ptr": b, "gram_ptr": "fp32"}
            launch, constants = spike_attention.launch_gram(width), {**other, "B_BITS": b == "i32"}
            integers = (*rows, "b_first")
            yield variant(f"gram {b} width={width}", spike_attention._gram, pointers, integers, (), constants, launch, aligned)
        products = [("i32", "fp16", "ieee"), ("i32", "fp32", "ieee"), ("fp32", "fp32", "ieee"), ("i32", "fp32", "tf32x3")]
        products += [("fp16", "fp32", "tf32x3"), ("bf16", "fp32", "tf32x3")]
        for (a, operand, precision), transposed in itertools.product(products, (False, True)):
            out = "fp32" if (operand, precision) == ("fp32", "ieee") else a if a != "i32" else "fp16"
            constants = {**other, "stride_i" if transposed else "stride_j": 1}
            if width == 1:
                constants |= {"stride_i": 1, "stride_j": 1}
            constants |= {"A_BITS": a == "i32", "OPERAND": TRITON[operand], "PRECISION": precision}
            launch = spike_attention.launch_apply(width, TORCH[operand], precision)
            yield variant(
                f"apply {a} operand={operand} {precision} transposed={transposed} width={width}", spike_attention._apply,
                {"a_ptr": a, "gram_ptr": "fp32", "y_ptr": out}, (*rows, "y_row", "stride_i", "stride_j"), ("scale",), constants,
                launch, aligned,
            )  # fmt: skip


def epilogue_variants():
    """Products with the neurons behind them: matrices and convolutions, with a stream that is added and kept, or nothing."""
    integers, numbers = ("steps", *SIZES, "out_per_row", *STRIDES), ("tau", "v_threshold", "v_reset")
    for parts, steps, conv, full in itertools.product((1, 2, 3), (1, 4, 16), (False, True), (False, True)):
        pointers = dict.fromkeys(("scale_ptr", "bias_ptr", "add_ptr", "currents_ptr"), "fp32")
        pointers |= {"words_ptr": "i32", "w_ptr": "bf16", "table_ptr": "i32", "out_ptr": "i32"}
        constants = ({} if conv else MATRIX) | {"stride_k": 1, "HAS_SCALE": parts < 3, "HAS_BIAS": full, "HAS_ADD": full}
        constants |= {"KEEP": full, "DECAY_INPUT": full, "SOFT_RESET": not full, "EXACT": full, "PARTS": parts}
        tile = {**spike_lif.launch(steps), "enable_fp_fusion": False}
        aligned = (*STRIDES, *(("m", "n", "channels") if full else ()))
        name = f"epilogue parts={parts} steps={steps} conv={conv} full={full}"
        yield variant(name, spike_lif._spike_product_lif, pointers, integers, numbers, constants, tile, aligned)


def every_variant(capability: int):
    yield from lif_forward_variants()
    yield from lif_backward_variants()
    yield from bn_variants()
    yield from pool_variants()
    yield from pack_variants()
    yield from layout_variants()
    yield from product_variants(capability)
    yield from gradient_variants(capability)
    yield from epilogue_variants()
    yield from attention_variants()


def resources(ptx: str, fused: bool) -> tuple[int, int]:
    """(registers, bytes spilled) as an assembler that triton ships reports them; it ships two, of different PTX versions."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
            options = [] if fused else ["--fmad=false"]
            command = [assembler, "-v", *options, f"--gpu-name={target}", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups()
                return int(re.search(r"Used (\d+) registers", done.stderr)[1]), sum(map(int, spills))
    raise RuntimeError(f"no assembler takes this PTX: {done.stderr}")


def compile_variant(v: Variant, capability: int) -> tuple[int, int, int]:
    """(Registers of a thread, bytes it spills, bytes of shared memory of a block)."""
    names = v.kernel.arg_names
    order = {key: v.signature.get(key, "constexpr") for key in names}
    constants = {(names.index(key),): value for key, value in v.constants.items()}
    attributes = {(names.index(key),): [["tt.divisibility", 16]] for key in v.aligned}
    source = ASTSource(v.kernel, order, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=v.options)
    return *resources(compiled.asm["ptx"], v.options.get("enable_fp_fusion", True)), compiled.metadata.shared


def main(picked: list[str]) -> int:
    bad = 0
    print(f"triton {triton.__version__}")
    for capability in (80, 90):
        worst = {}
        for v in every_variant(capability):
            if picked and v.name.split()[0] not in picked:
                continue
            try:
                registers, spilled, shared = compile_variant(v, capability)
            except Exception as error:  # any compiler failure is the finding
                print(f"sm_{capability} {v.name}: does not compile: {error}")
                bad += 1
                continue
            if spilled:
                print(f"sm_{capability} {v.name}: spills {spilled} bytes at {registers} registers")
                bad += 1
            if shared > SHARED[capability]:
                print(f"sm_{capability} {v.name}: takes {shared} bytes of shared memory")
                bad += 1
            worst.setdefault(" ".join(v.name.split()[:2]), []).append((registers, shared))
        for group, found in worst.items():
            counts, most = [registers for registers, _ in found], max(shared for _, shared in found) / 1024
            registers = f"{min(counts)} to {max(counts)} registers"
            print(f"sm_{capability} {group}: {len(found)} variants, {registers}, at most {most:.0f} KiB shared")
    print("all compiled without spills" if not bad else f"{bad} kernels failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
