"""Devices to plan for: those that are named (`3x48GiB,1x24GiB@l4`), with assumed rates, or those that are here, measured."""

import re
from dataclasses import dataclass

from throughline.errors import InputError
from throughline.records import PlannedDevice
from throughline.registry import unknown

PRODUCTS_SHARE = 0.5  # of a card's published products, that training reaches
MEMORY_SHARE = 0.7  # of its published bandwidth
START_SECONDS = 1.0  # from a job's start to the reading of its model, in a process that has imported all
GIB = 2**30
EXPECTED = "expected COUNTxMEMORYGiB[@CARD], several with commas, such as 3x48GiB,1x24GiB or 2x80GiB@h100"


@dataclass(frozen=True)
class Card:
    """Published figures of a device: matrix products without sparsity in TFLOP/s, bandwidth of its memory in TB/s."""

    memory_gib: float
    bfloat16: float | None  # None: it has none
    float32: float
    bandwidth: float
    on_cpu: bool = False


# In order of memory: a size without a card is taken for the first that has as much.
CARDS = {
    "t4": Card(16, None, 8.1, 0.32),
    "a10": Card(24, 125, 31.2, 0.6),
    "l4": Card(24, 121, 30.3, 0.3),
    "v100": Card(32, None, 15.7, 0.9),
    "a100-40": Card(40, 312, 19.5, 1.555),
    "a6000": Card(48, 155, 38.7, 0.768),
    "l40s": Card(48, 362, 91.6, 0.864),
    "a100": Card(80, 312, 19.5, 2.039),
    "h100": Card(80, 989, 67, 3.35),
    "h200": Card(141, 989, 67, 4.8),
    "b200": Card(192, 2250, 80, 8.0),
    # two cores with AVX-512, of which training reaches the shares above
    "cpu": Card(1024, 0.8, 0.33, 0.03, on_cpu=True),
}


def parse_devices(text: str) -> list[PlannedDevice]:
    """The devices of `3x48GiB,1x24GiB@l4`, with assumed rates; InputError says what is expected."""
    devices: list[PlannedDevice] = []
    for part in text.split(","):
        found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)(GiB|GB)(?:@([\w-]+))?", part.strip(), re.IGNORECASE)
        if not found or not int(found[1] or 1) or not float(found[2]):
            raise InputError(f"--devices: {EXPECTED}; found {part.strip()!r}")
        memory = float(found[2]) * (GIB if found[3].lower() == "gib" else 1e9)
        card = found[4].lower() if found[4] else _card_of(memory)
        if card not in CARDS:
            raise InputError(f"--devices: {unknown('card', card, list(CARDS))}")
        size = f"{float(found[2]):g}{found[3]}"
        devices += [
            assume(f"{card}-{len(devices) + i}", f"{size}@{card}", int(memory), CARDS[card])
            for i in range(int(found[1] or 1))
        ]
    return devices


def _card_of(memory_bytes: float) -> str:
    gpus = [name for name, card in CARDS.items() if not card.on_cpu]
    return next((name for name in gpus if memory_bytes <= CARDS[name].memory_gib * GIB), gpus[-1])


def assume(name: str, kind: str, memory_bytes: int, card: Card) -> PlannedDevice:
    """A device that nobody has measured, at the usual shares of its card's figures."""
    return PlannedDevice(
        name=name,
        kind=kind,
        memory_bytes=memory_bytes,
        flops_per_second=PRODUCTS_SHARE * 1e12 * (card.bfloat16 or card.float32),
        float32_flops_per_second=PRODUCTS_SHARE * 1e12 * card.float32,
        bytes_per_second=MEMORY_SHARE * 1e12 * card.bandwidth,
        start_seconds=START_SECONDS,
        measured=False,
        on_cpu=card.on_cpu,
        bfloat16=card.bfloat16 is not None,
    )


def describe_assumptions(devices: list[PlannedDevice]) -> list[str]:
    """A line for each kind of device: its rates, and whether they were measured here."""
    lines = []
    for kind, device in {device.kind: device for device in devices}.items():
        dtype = "bfloat16" if device.bfloat16 else "float32"
        how = (
            "measured just now"
            if device.measured
            else f"assumed: {PRODUCTS_SHARE:.0%} of the published products, {MEMORY_SHARE:.0%} of the bandwidth"
        )
        lines.append(
            f"{kind}: {device.flops_per_second / 1e12:.3g} TFLOP/s in {dtype}, {device.bytes_per_second / 1e9:.3g} GB/s ({how})"
        )
    return lines
