"""Constants of a machine: the shipped ones and files of the same form. What is concluded from them is elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from runtime.errors import InvalidInput

SHIPPED = files("runtime") / "machines"


class Machine(msgspec.Struct, frozen=True):
    """As they are reached and not as they are advertised."""

    name: str
    flops: float
    """Floating-point operations per second of one rank in the denoiser's precision."""
    memory_bandwidth: float
    """Bytes per second of one rank's memory."""
    memory: float
    """Bytes that one rank has."""
    link_bandwidth: float
    """Bytes per second that one rank sends to the others."""
    link_latency: float
    """Seconds that a collective takes at least."""
    launch: float
    """Seconds that a layer takes at least."""
    element: int = 2
    """Bytes of a value in the denoiser's precision."""

    def check(self) -> None:
        """Raises `InvalidInput` for a constant that no machine can have."""
        for name in ("flops", "memory_bandwidth", "memory", "link_bandwidth"):
            if not getattr(self, name) > 0:
                raise InvalidInput("machine", f"{name} is {getattr(self, name)}; it must be above 0")
        if self.link_latency < 0 or self.launch < 0 or self.element not in {1, 2, 4}:
            raise InvalidInput("machine", "link_latency and launch are seconds from 0 on, element is 1, 2 or 4 bytes")


def load_machine(name: str) -> Machine:
    """A shipped machine by its name, or a JSON file of `Machine`.

    Raises:
        InvalidInput: there is no such machine, or the file does not hold one.
    """
    shipped = sorted(entry.name.removesuffix(".json") for entry in SHIPPED.iterdir() if entry.name.endswith(".json"))
    place = SHIPPED / f"{name}.json" if name in shipped else Path(name)
    try:
        machine = msgspec.json.decode(place.read_bytes(), type=Machine)
    except OSError as error:
        raise InvalidInput("machine", f"{name} is no file and none of {', '.join(shipped)}") from error
    except msgspec.DecodeError as error:
        raise InvalidInput("machine", f"{name}: {error}") from error
    machine.check()
    return machine
