"""What the ``progress`` argument may be, made into what the engine calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["ProgressArgument", "reporting"]

ProgressArgument = bool | Callable[[int, int], object] | None


@contextmanager
def reporting(progress: ProgressArgument, total: int) -> Iterator[Callable[[int], object] | None]:
    """Give the engine a callable of bytes done, or None where nobody wants to know.

    Parameters
    ----------
    progress : bool, callable or None
        True for a bar (tqdm), a callable ``(bytes_done, bytes_total)``, None or False for nothing.
    total : int
        In bytes.

    Raises
    ------
    ImportError
        A bar was asked for and tqdm is not installed.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError("progress=True shows a bar of tqdm: pip install tqdm") from None
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            yield lambda done: bar.update(done - bar.n)
            bar.update(total - bar.n)
    elif callable(progress):
        last = -1

        def report(done: int) -> None:
            nonlocal last
            if done != last:
                last = done
                progress(done, total)

        yield report
        report(total)
    else:
        raise TypeError(f"progress must be a bool or a callable, not {type(progress).__name__}")
