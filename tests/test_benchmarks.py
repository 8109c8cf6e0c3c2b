import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from spikeclip.nn import FiringRates

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(who, median, dtype=None):
    params = {"who": who} if dtype is None else {"who": who, "dtype": dtype}
    return {"group": "g", "params": params, "stats": {"median": median, "iqr": 0.0, "rounds": 9}}


def table(folder, rows):
    """The lines of the report of one run with these rows."""
    report = load("report")
    run = {"datetime": "d", "commit_info": {"id": "c", "dirty": False}, "machine_info": {}, "benchmarks": rows}
    (folder / "run.json").write_text(json.dumps(run))
    return report.table([report.compact(folder / "run.json", "default")]).splitlines()


def test_ratios_are_against_our_fastest_in_the_same_run(tmp_path):
    benchmarks = [result("spikeclip (cpu)", 0.002), result("spikeclip (triton)", 0.004), result("peer", 0.009)]
    lines = table(tmp_path, benchmarks)
    assert lines[4:] == ["| spikeclip (cpu) | 2 | 1.00 |", "| spikeclip (triton) | 4 | 2.00 |", "| peer | 9 | 4.50 |"]


def test_where_dense_products_are_timed_ratios_are_against_the_fastest_of_them(tmp_path):
    benchmarks = [result("spikeclip", 0.002), result("spikeclip", 0.004), result("slow", 0.009), result("fast", 0.008)]
    for row, density in zip(benchmarks, (0.1, 0.5, 0.1, 0.1), strict=True):
        row["params"]["density"] = density
    benchmarks[0]["extra_info"] = {"roof": 0.25, "memory": 2_000_000}
    benchmarks[1]["extra_info"] = {"memory": 0}
    benchmarks[2]["extra_info"] = benchmarks[3]["extra_info"] = {"baseline": True, "memory": 0}
    lines = table(tmp_path, benchmarks)
    assert lines[4:] == [
        "| spikeclip, 10% firing | 2 | 4.00 | 25% | 2.0 |",
        "| spikeclip, 50% firing | 4 | 2.00 | - | 0.0 |",
        "| slow | 9 | 0.89 | - | 0.0 |",
        "| fast | 8 | 1.00 | - | 0.0 |",
    ]


def test_without_our_float32_row_there_is_no_ratio(tmp_path):
    rows = [result("spikeclip", 0.002, "bfloat16"), result("peer", 0.004, "float32")]
    lines = table(tmp_path, rows)
    assert lines[4:] == ["| spikeclip, bfloat16 | 2 | - |", "| peer, float32 | 4 | - |"]


def test_every_peer_that_is_installed_computes_our_neuron():
    peers = load("peers")
    x = torch.randn(5, 300) + 0.3
    for neuron in (peers.Neuron("sigmoid"), peers.Neuron("atan"), peers.Neuron("atan", False)):
        want = peers.plain_loop(neuron)(x)
        assert torch.equal(peers.ours("cpu")(neuron)(x), want)
        for name, make in peers.PEERS.items():
            if name.startswith("torch.compile"):
                continue
            try:
                run = make(neuron)
            except peers.Missing:
                continue
            assert torch.equal(run(x), want), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_the_gpu_script_without_a_gpu_is_exit_code_2():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_a_step_of_the_gpu_script_that_is_out_of_time_ends_with_what_it_started(tmp_path):
    gpu, begun = load("gpu"), time.monotonic()
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with open(tmp_path / "log", "w") as log:
        steps = gpu.Steps(log, 2 / 60)
        assert not steps.run("slow", [("-c", sleeper)]) and steps.failed
        assert not steps.run("next", [("-c", "")])
    assert time.monotonic() - begun < 30  # the sleeper holds the pipe for as long as it lives
    text = (tmp_path / "log").read_text()
    assert "cut off: no time left" in text and "next: left out" in text


def test_a_step_of_the_gpu_script_that_is_out_of_time_may_keep_what_it_has(tmp_path):
    gpu = load("gpu")
    keeper = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('kept')"
    with open(tmp_path / "log", "w") as log:
        assert not gpu.Steps(log, 8 / 60).run("slow", [("-c", keeper)])  # enough for Python to start on a busy machine
    assert "kept\n== cut off: no time left" in (tmp_path / "log").read_text()


def test_what_an_interrupted_benchmark_has_timed_is_kept_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    run = load("run")
    case = "import pytest\n@pytest.mark.parametrize('who', ['first', 'second'])\ndef test_case(benchmark, who):\n"
    case += "    if who == 'second':\n        raise KeyboardInterrupt\n    benchmark.pedantic(int, rounds=1)\n"
    (tmp_path / "test_case.py").write_text(case)
    monkeypatch.setattr(run, "HERE", tmp_path)
    assert [row["who"] for row in run.measure("", {}, ["test_case.py"], cut_off=True)["rows"]] == ["first"]
    with pytest.raises(SystemExit, match="no figure is kept"):
        run.measure("", {}, ["test_case.py"])


def test_every_case_for_the_gpu_is_in_one_command():
    cases = [case for group in load("gpu").CASES for case in group]
    commands = [*cases, *((file, "") for file in {file for file, _ in cases})]
    collect = "import json, pytest, sys; commands = json.loads(sys.argv[1]); "
    collect += "sys.exit(max(pytest.main(['--collect-only', '-q', file, '-k', words]) for file, words in commands))"
    options = {"cwd": BENCHMARKS, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", collect, json.dumps(commands)], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    times = Counter(line for line in done.stdout.splitlines() if "::" in line)
    assert set(times.values()) == {2}, [case for case, count in times.items() if count != 2]


def test_a_settled_tower_fires_in_evaluation_as_in_training():
    rates = load("rates")
    tower, images = rates.fresh("spikeclip-demo"), torch.rand(8, 3, 32, 32)
    unsettled = rates.mean_rate(tower, images)
    with FiringRates(tower) as watch:
        rates.settled(tower, images)
    training = torch.stack([layer.mean() for layer in watch.rates().values()]).mean().item()
    assert rates.mean_rate(tower, images) == pytest.approx(training, rel=0.02)
    assert unsettled != pytest.approx(training, rel=0.1)


def test_answers_have_images_and_synops_a_second_and_a_cosine(tmp_path):
    rows = [result("spikeclip", 0.5), result("ANN twin", 0.25)]
    rows[0]["extra_info"] = {"images": 32, "synops": 2e6, "cosine": 0.98765}
    rows[1]["extra_info"] = {"images": 32, "synops": None}
    lines = table(tmp_path, rows)
    heads = "| images a second | M SynOps an image | G SynOps a second | least cosine with the tower |"
    assert lines[2].endswith(heads)
    assert lines[4].endswith("| 64 | 2.0 | 0.1 | 0.988 |") and lines[5].endswith("| 128 | - | - | - |")
