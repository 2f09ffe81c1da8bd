"""Past the page cache or through it: what comes in parts is written in whichever way is faster."""

from __future__ import annotations

__all__ = ["BATCH", "PROBE", "Pace"]

#: Written in one way before it is judged for the first time ...
PROBE = 64 << 20
#: ... and before it is judged again.
BATCH = 192 << 20


class Pace:
    """Which way to write what comes in parts: through the page cache, or past it.

    The faster one changes from minute to minute, so both are tried and the slower one is left, as
    the engine does it where it is given all at once.

    Parameters
    ----------
    direct : bool or None
        None to find out.
    """

    def __init__(self, direct: bool | None) -> None:
        self.direct = bool(direct)
        self._given = direct is not None
        self._rates = {False: 0.0, True: 0.0}
        self._moved, self._took = 0, 0.0

    @property
    def due(self) -> int:
        """How many bytes more to write in this way before it is judged."""
        return (BATCH if all(self._rates.values()) else PROBE) - self._moved

    def saw(self, nbytes: int, seconds: float) -> None:
        """So many bytes have been written in the way that `direct` said."""
        if self._given:
            return
        self._moved, self._took = self._moved + nbytes, self._took + seconds
        if self.due > 0:
            return
        rates = self._rates
        rates[self.direct] = self._moved / (self._took + 1e-9)
        self.direct = not rates[True] or rates[True] > rates[False]
        self._moved, self._took = 0, 0.0
