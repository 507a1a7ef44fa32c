"""The devices of this machine and their rates, measured in a few seconds; nothing is kept of it."""

import time
from collections.abc import Callable

import torch

from throughline.planning.devices import START_SECONDS
from throughline.pools import threads_of
from throughline.records import PlannedDevice
from throughline.training.memory import free_bytes
from throughline.training.precision import trains_in_bfloat16

MEASURED_SECONDS = 0.6  # of each rate, after a first try that is not counted
SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of the square matrices
MOVED_BYTES = {"cpu": 2**27, "cuda": 2**30, "mps": 2**28}  # of the array that is copied: more than a cache holds


def find_devices(precision: str) -> list[PlannedDevice]:
    """All GPUs of this machine, or its processor, with measured rates for training in `precision`."""
    if torch.cuda.is_available():
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    else:
        names = ["mps" if torch.backends.mps.is_available() else "cpu"]
    return [calibrate(name, precision) for name in names]


def calibrate(name: str, precision: str) -> PlannedDevice:
    """Measure one device: products of square matrices, and copies of an array (each byte is read and written)."""
    device = torch.device(name)
    bfloat16 = trains_in_bfloat16(precision, name)
    rates = {d: _flops_per_second(device, d) for d in {torch.float32, torch.bfloat16 if bfloat16 else torch.float32}}
    source = torch.ones(MOVED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return PlannedDevice(
        name=name,
        kind=torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        memory_bytes=free_bytes(name),
        flops_per_second=rates[torch.bfloat16 if bfloat16 else torch.float32],
        float32_flops_per_second=rates[torch.float32],
        bytes_per_second=2 * len(source) * _calls_per_second(device, lambda: target.copy_(source)),
        start_seconds=START_SECONDS,
        measured=True,
        on_cpu=device.type == "cpu",
        bfloat16=bfloat16,
        threads=threads_of(device),
    )


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 * _calls_per_second(device, lambda: torch.mm(a, b, out=out))


def _calls_per_second(device: torch.device, call: Callable[[], object]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    call()
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_SECONDS:
        call()
        wait()
        count += 1
    return count / (time.perf_counter() - started)
