import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from spikeclip.energy.measure import Counter, Measurement, find_counter, measure

module = importlib.import_module("spikeclip.energy.measure")
RANGE = 262143328850  # of a register in steps of 2**-14 J


class Machine:
    """A clock and a counter: 16 W idle, and whatever a call takes beyond. All times are exact in binary."""

    def __init__(self, monkeypatch):
        self.now, self.extra, self.calls, self.slept = 0.0, 0.0, 0, []
        self.counter = Counter("a counter", 0.5, lambda: 16 * self.now + self.extra)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def calling(self, seconds, joules):
        """A function whose calls take these seconds and joules beyond idle: a number, or a list of one each."""

        def run():
            of_call = [x[self.calls] if isinstance(x, list) else x for x in (seconds, joules)]
            self.now, self.extra, self.calls = self.now + of_call[0], self.extra + of_call[1], self.calls + 1

        return run


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_idle_power_is_subtracted(machine):
    found = measure(machine.calling(0.25, 3.0), 4, seconds=2, repetitions=4, counter=machine.counter)
    assert found == Measurement(
        samples=4,
        calls=8,  # two to each half second
        repetitions=4,
        device="cpu",
        threads=torch.get_num_threads(),
        latency=0.25,
        latency_lowest=0.25,
        latency_highest=0.25,
        samples_per_second=16.0,
        joules_per_sample=0.75,
        joules_lowest=0.75,
        joules_highest=0.75,
        idle_watts=16.0,
        counter="a counter",
    )
    assert machine.calls == 10  # two more to warm up


def test_each_repetition_is_one_call_at_least_and_the_first_does_not_count(machine):
    run = machine.calling([64.0, 1.0, 4.0, 2.0], [1000.0, 2.0, 16.0, 6.0])
    found = measure(run, 2, seconds=0.5, repetitions=3, counter=machine.counter)
    assert (found.calls, machine.calls) == (3, 4)
    assert (found.latency, found.latency_lowest, found.latency_highest) == (2.0, 1.0, 4.0)
    assert found.samples_per_second == 1.0
    assert (found.joules_per_sample, found.joules_lowest, found.joules_highest) == (4.0, 1.0, 8.0)


def test_idle_power_leaves_out_what_ran_before(machine):
    spinning = Counter("a counter", 0.5, lambda: 16 * machine.now + machine.extra + 99 * min(machine.now, 0.5))
    found = measure(machine.calling(0.25, 3.0), 4, counter=spinning)
    assert found.idle_watts == 16.0 and found.joules_per_sample == 0.75


@pytest.mark.parametrize("least", [-2.0, 0.25])
def test_no_joules_where_a_repetition_took_less_than_the_counter_resolves(machine, least):
    run = machine.calling(1.0, [9.0, 9.0, least, 9.0])
    found = measure(run, 1, seconds=3, repetitions=3, counter=machine.counter)
    assert (found.joules_per_sample, found.joules_lowest, found.joules_highest) == (None, None, None)
    assert found.idle_watts == 16.0 and found.counter == "a counter"
    assert found.reason == f"a repetition took {least:g} J beyond idle, and a counter resolves 0.5 J"
    assert found.line().endswith(f"; joules not measured: {found.reason}.")


def test_joules_where_a_repetition_took_just_what_the_counter_resolves(machine):
    found = measure(machine.calling(1.0, 0.5), 1, seconds=3, repetitions=3, counter=machine.counter)
    assert found.joules_per_sample == 0.5 and found.reason is None


def test_latency_alone_where_there_is_no_counter(machine, monkeypatch):
    monkeypatch.setattr(module, "find_counter", lambda device: (None, f"no counter for {device}"))
    found = measure(machine.calling(0.25, 3.0), 4)
    assert found.latency == 0.25 and found.joules_per_sample is found.idle_watts is found.counter is None
    assert found.reason == "no counter for cpu" and machine.slept == []
    assert found.line() == "250 ms (250 to 250) a call of 4 on cpu, 16.0 samples/s; joules not measured: no counter for cpu."


def test_the_devices_own_counter_is_found(machine, monkeypatch):
    monkeypatch.setattr(module, "find_counter", lambda device: (machine.counter, ""))
    found = measure(machine.calling(0.25, 3.0), 4)
    assert (found.joules_per_sample, found.counter, found.reason) == (0.75, "a counter", None)


def test_a_gpu_is_waited_for(machine, monkeypatch):
    waited = []
    launch, work = machine.calling(0.0625, 1.0), machine.calling(0.1875, 2.0)

    def finish(device):
        waited.append(device)
        work()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", finish)
    found = measure(launch, 4, seconds=2, repetitions=4, counter=machine.counter, device="cuda:1")
    assert (found.device, found.calls, found.latency, found.joules_per_sample) == ("cuda:1", 8, 0.25, 0.75)
    assert waited == [torch.device("cuda:1")] * 11  # before the idle power too


def test_line_and_json(machine):
    run = machine.calling([0.0625, 0.0625, 0.125], [3.0, 3.0, 5.0])
    found = measure(run, 4, seconds=0.0625, repetitions=2, counter=machine.counter)
    assert found.line() == (
        "93.8 ms (62.5 to 125) a call of 4 on cpu, 42.7 samples/s; 1,000 mJ (750 to 1,250) a sample beyond 16.0 W idle, "
        "by a counter."
    )
    assert Measurement(**json.loads(json.dumps(asdict(found), allow_nan=False))) == found


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"run": 3}, TypeError, "run must be a function of no arguments; got int"),
        ({"counter": "RAPL"}, TypeError, "counter must be a Counter or None; got str"),
        ({"samples": 0}, ValueError, "samples must be an int >= 1; got 0"),
        ({"samples": True}, ValueError, "samples must be an int >= 1; got True"),
        ({"samples": 1.5}, ValueError, "samples must be an int >= 1; got 1.5"),
        ({"repetitions": 0}, ValueError, "repetitions must be an int >= 1; got 0"),
        ({"seconds": 0}, ValueError, "seconds must be a finite number > 0; got 0"),
        ({"seconds": float("nan")}, ValueError, "seconds must be a finite number > 0; got nan"),
        ({"seconds": float("inf")}, ValueError, "seconds must be a finite number > 0; got inf"),
        ({"seconds": "2"}, ValueError, "seconds must be a finite number > 0; got '2'"),
        ({"device": "meta"}, ValueError, "device must be cpu or one of the 1 CUDA GPUs here; got 'meta'"),
        ({"device": "gpu"}, ValueError, "device must be cpu or one of the 1 CUDA GPUs here; got 'gpu'"),
        ({"device": None}, ValueError, "device must be cpu or one of the 1 CUDA GPUs here; got 'None'"),
        ({"device": "cuda:1"}, ValueError, "device must be cpu or one of the 1 CUDA GPUs here; got 'cuda:1'"),
    ],
)
def test_wrong_arguments(machine, monkeypatch, wrong, error, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = {"run": lambda: pytest.fail("it ran"), "samples": 1, "counter": machine.counter} | wrong
    with pytest.raises(error) as raised:
        measure(**arguments)
    assert str(raised.value) == text
    if "device" in wrong:
        with pytest.raises(ValueError, match="device must be cpu"):
            find_counter(wrong["device"])


@pytest.fixture
def powercap(tmp_path):
    """Three packages, two with DRAM, beside everything that must not be added to them."""

    def domain(path, name, microjoules, wrap=RANGE):
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", wrap)):
            (folder / file).write_text(f"{value}\n")

    (tmp_path / "intel-rapl").mkdir()
    for nested in ("", "intel-rapl:0/"):
        domain(f"{nested}intel-rapl:0:0", "core", 10)
        domain(f"{nested}intel-rapl:0:1", "uncore", 20)
        domain(f"{nested}intel-rapl:0:2", "dram", 4_000_000, 5_000_000)
    for path, name in (("intel-rapl:0", "package-0"), ("intel-rapl-mmio:0", "package-0"), ("intel-rapl:2", "psys")):
        domain(path, name, RANGE - 1_000_000)
    domain("intel-rapl:1", "package-1", 7_000_000)
    domain("intel-rapl:1:0", "core", 30)
    domain("intel-rapl:10", "package-2-die-1", 0)
    domain("intel-rapl:10:0", "dram", 40)
    return tmp_path


def spend(powercap, **microjoules):
    for name, value in microjoules.items():
        path = powercap / name.replace("rapl", "intel-rapl:").replace("_", ":") / "energy_uj"
        path.write_text(f"{value}\n")


def test_rapl_sums_packages_and_dram_across_wraps(powercap):
    counter, reason = find_counter("cpu", powercap=powercap)
    assert reason == ""
    names = "package-0 + package-0 dram + package-1 + package-2-die-1 + package-2-die-1 dram"
    assert counter.name == f"RAPL {names} (powercap)"
    assert counter.resolution == pytest.approx(2**-14, rel=1e-5)
    assert counter.read() == 0.0
    spend(powercap, rapl1=7_500_000, rapl10=250_000)
    assert counter.read() == 0.75
    spend(powercap, rapl0=2_000_000)  # over its end, after 1 J
    assert counter.read() == 3.75
    spend(powercap, rapl0_2=1_000_000, rapl1=8_500_000)  # over its end, after 1 J of its 5
    assert counter.read() == 6.75
    spend(powercap, rapl0_0=900_000, rapl0_1=900_000, rapl1_0=900_000, rapl2=0)
    assert counter.read() == 6.75


def test_rapl_takes_a_folder_by_name(powercap):
    counter, _ = find_counter(powercap=str(powercap))
    assert counter.read() == 0.0


def test_rapl_is_absent(tmp_path):
    reason = f"no {tmp_path}/intel-rapl:* on this machine (virtual machines hide it)"
    assert find_counter("cpu", powercap=tmp_path) == (None, reason)
    missing = tmp_path / "class"
    assert find_counter("cpu", powercap=missing) == (None, reason.replace(str(tmp_path), str(missing)))


def test_rapl_has_no_package(tmp_path):
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("psys\n")
    assert find_counter("cpu", powercap=tmp_path) == (None, f"no {tmp_path}/intel-rapl:* is a package")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "{}/intel-rapl:*/energy_uj is readable by root alone"),
        (OSError(61, "No data available"), "RAPL cannot be read: [Errno 61] No data available"),
    ],
)
def test_rapl_is_unreadable(powercap, monkeypatch, error, reason):
    read_text = Path.read_text

    def refuse(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise error
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert find_counter("cpu", powercap=powercap) == (None, reason.format(powercap))


@pytest.fixture
def nvml(monkeypatch):
    """NVML of two GPUs, of which PyTorch sees the second as its first; energies in millijoules by UUID."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    fake = ModuleType("pynvml")
    fake.NVMLError, fake.NVMLError_NotSupported = NVMLError, NVMLError_NotSupported
    fake.energies = {"GPU-aa-1": 1_000, "GPU-bb-2": 5_000}
    fake.names = {"GPU-aa-1": "NVIDIA T4", "GPU-bb-2": "NVIDIA H100"}
    fake.started = False

    def start():
        fake.started = True

    def handle(uuid):
        assert fake.started
        if uuid not in fake.names:
            raise NVMLError("Not Found")
        return (uuid,)

    def energy(handle):
        if handle[0] not in fake.energies:
            raise NVMLError_NotSupported("Not Supported")
        return fake.energies[handle[0]]

    fake.nvmlInit = start
    fake.nvmlDeviceGetHandleByUUID = handle
    fake.nvmlDeviceGetName = lambda handle: fake.names[handle[0]]
    fake.nvmlDeviceGetTotalEnergyConsumption = energy
    uuids = ["bb-2", "aa-1", "cc-3"]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=uuids[torch.device(d).index or 0]))
    return fake


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_nvml_reads_the_gpu_that_pytorch_uses(nvml, device):
    counter, reason = find_counter(device)
    assert (counter.name, counter.resolution, reason) == ("NVML NVIDIA H100", 0.001, "")
    before = counter.read()
    nvml.energies["GPU-aa-1"] += 9_000
    nvml.energies["GPU-bb-2"] += 1_500
    assert counter.read() - before == 1.5


def test_nvml_reads_the_other_gpu(nvml):
    assert find_counter("cuda:1")[0].name == "NVML NVIDIA T4"


def test_no_nvml(nvml, monkeypatch):
    assert find_counter("cuda:2") == (None, "NVML cannot read this GPU: Not Found")
    del nvml.energies["GPU-aa-1"]
    assert find_counter("cuda:1") == (None, "this GPU keeps no energy counter")

    def stop():
        raise nvml.NVMLError("NVML Shared Library Not Found")

    monkeypatch.setattr(nvml, "nvmlInit", stop)
    assert find_counter("cuda") == (None, "NVML cannot read this GPU: NVML Shared Library Not Found")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_counter("cuda") == (None, "nvidia-ml-py is not installed")
