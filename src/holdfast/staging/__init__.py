"""Memory of devices, turned into memory of the host and back while the engine moves it.

Nothing else of holdfast knows that a device is there. Neither CuPy nor torch is imported before
a device other than the host is asked for.
"""

from __future__ import annotations

from .base import COPY, CopyLostError, Device, Event
from .parts import Part, Staging
from .pool import release_pinned
from .registry import allocate, device, register, resolve, unregister
from .ring import to_device, to_host

__all__ = [
    "COPY",
    "CopyLostError",
    "Device",
    "Event",
    "Part",
    "Staging",
    "allocate",
    "device",
    "register",
    "release_pinned",
    "resolve",
    "to_device",
    "to_host",
    "unregister",
]
