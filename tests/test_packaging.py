import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_CUDA = {**os.environ, "SPIKECLIP_CUDA": "0"}
PROBE = (
    "import importlib.util, torch, spikeclip, spikeclip.kernels;"
    "s, v = spikeclip.ops.lif(torch.full((3, 8), 2.0), backend='cpu');"
    "assert s.sum() == 24, s;"
    "assert importlib.util.find_spec('kernels') is None;"
    "print(spikeclip.__file__)"
)


def shell(command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the sources, so that no build leaves anything in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "spikeclip"
    unwanted = shutil.ignore_patterns(".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """(sdist, wheel built from that sdist)."""
    out = tmp_path_factory.mktemp("dist")
    done = shell([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], env=WITHOUT_CUDA)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_sdist_holds_everything_that_a_build_and_its_tests_need(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for needed in (
        "setup.py",
        "csrc/lif_step.h",
        "csrc/cuda/lif.cu",
        "kernels/lif.py",
        "tests/conftest.py",
        "LICENSE",
        "README.md",
    ):
        assert needed in names
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_holds_the_package_and_no_top_level_kernels(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"spikeclip"}
    for needed in (
        "spikeclip/py.typed",
        "spikeclip/kernels/lif.py",
        "spikeclip/energy/costs/45nm-fp32.toml",
        "spikeclip/models/configs/spikeclip-demo.json",
        "spikeclip/models/pretrained/spikeclip-demo/model.safetensors",
        "spikeclip/models/pretrained/spikeclip-demo-teacher/open_clip_model.safetensors",
    ):
        assert needed in names
    extension = f"spikeclip/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert extension in names and not [n for n in names if n.endswith((".cpp", ".cu", ".h"))]


def test_packaged_weights_are_small(built):
    with zipfile.ZipFile(built[1]) as archive:
        weights = [info for info in archive.infolist() if info.filename.endswith(".safetensors")]
    assert len(weights) == 2 and all(info.file_size <= 8 * 2**20 for info in weights)


def test_wheel_runs_where_it_is_installed(built, tmp_path):
    done = shell([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", built[1]])
    assert done.returncode == 0, done.stderr
    done = shell([sys.executable, "-c", PROBE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site" / "spikeclip" / "__init__.py")


def test_editable_install_runs_from_the_sources(source, tmp_path):
    """In a virtual environment that sees everything installed here but spikeclip."""
    others = tmp_path / "others"
    others.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "spikeclip" not in entry.name:
            (others / entry.name).symlink_to(entry)
    assert shell([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"]).returncode == 0
    python = tmp_path / "venv" / "bin" / "python"
    env = {**WITHOUT_CUDA, "PYTHONPATH": str(others)}
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = shell([python, "-m", "pip", "install", *options, "-e", source], env=env)
    assert done.returncode == 0, done.stderr
    done = shell([python, "-c", PROBE], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(source / "spikeclip" / "__init__.py")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler found. Install one with OpenMP (Debian/Ubuntu: apt install g++"),
        ({"SPIKECLIP_CUDA": "yes"}, "SPIKECLIP_CUDA must be 0, 1 or auto; got 'yes'"),
    ],
)
def test_a_build_that_cannot_be_says_what_is_missing(source, setting, message):
    done = shell([sys.executable, "setup.py", "-q", "build_ext"], cwd=source, env={**WITHOUT_CUDA, **setting})
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_import_is_light():
    heavy = ["accelerate", "huggingface_hub", "matplotlib", "open_clip", "PIL", "rich", "torchvision", "triton", "tyro"]
    code = (
        "import torch, sys; before = {*sys.modules}; import spikeclip; print(sorted(({*sys.modules} - before) & {*sys.argv}))"
    )
    done = shell([sys.executable, "-c", code, *heavy])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# A package may import itself and what stands before it.
LAYERS = ("ops", "kernels", "nn", "models", "zeroshot", "training", "energy")


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down_only(layer):
    folder = ROOT / layer if layer == "kernels" else ROOT / "spikeclip" / layer
    allowed = {*LAYERS[: LAYERS.index(layer) + 1], "_cpu", "_cuda", "memory"}
    for path in folder.rglob("*.py"):
        inside = ("spikeclip", layer, *path.relative_to(folder).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            targets = [(*module, alias.name) for alias in node.names]
            for target in targets:
                target = tuple(part for part in target if part)
                if target[0] == "spikeclip" and len(target) > 1:
                    assert target[1] in allowed, f"{path}: imports {'.'.join(target)}"
