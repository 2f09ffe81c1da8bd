"""What only OneFlow itself can do: global tensors of several processes, and compiled graphs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["gathering", "reads", "save_graph", "spread", "writes"]


def _oneflow() -> Any:
    """OneFlow, if it is imported: without it there is one process and no global tensor."""
    return sys.modules.get("oneflow")


def _check(rank: Any, name: str) -> None:
    flow = _oneflow()
    count = flow.env.get_world_size() if flow is not None else 1
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} expected type int, but got {type(rank)}.")
    if not 0 <= rank < count:
        raise ValueError(
            f"{name} out of range (expected to be in range of [0, {count}), but got {rank})."
        )


def _rank() -> int:
    flow = _oneflow()
    return 0 if flow is None else int(flow.env.get_rank())


def writes(rank: int | None) -> bool:
    """Whether this process writes what is saved."""
    return rank is None or rank == _rank()


def reads(rank: int | None) -> bool:
    """Whether this process reads what is loaded; raises for what is no rank."""
    if rank is None:
        return True
    if _oneflow() is None:
        import importlib.util

        if importlib.util.find_spec("oneflow") is not None:
            import oneflow  # noqa: F401 - it says how many processes there are
    _check(rank, "global_src_rank")
    return rank == _rank()


def gathering(rank: int | None) -> Callable[[Any], Any]:
    """What is saved for a tensor: for a global one, all of it in the memory of process `rank`.

    Raises
    ------
    TypeError, ValueError
        `rank` is none.
    """
    if rank is not None:
        _check(rank, "global_dst_rank")

    def localize(tensor: Any) -> Any:
        flow = _oneflow()
        if flow is None or not isinstance(tensor, flow.Tensor) or not tensor.is_global:
            return tensor
        if rank is None:
            raise ValueError("Please set global_dst_rank in `flow.save` to save global tensor")
        host = flow.placement("cpu", tensor.placement.ranks)
        there = flow.placement("cpu", [rank])
        moved = tensor.detach().to_global(sbp=tensor.sbp, placement=host)
        whole = moved.to_global(sbp=flow.sbp.broadcast, placement=there).to_local()
        if isinstance(tensor, flow.nn.Parameter):
            return flow.nn.Parameter(whole, requires_grad=tensor.requires_grad)
        return whole

    return localize


def spread(obj: Any, rank: int, location: Any) -> Any:
    """`obj` with global tensors on process `rank`, in all processes; then moved to `location`."""
    import oneflow as flow
    from oneflow.nn.graph.util import ArgsTree

    made = flow.utils.global_view.to_global(
        obj,
        placement=flow.placement("cpu", [rank]),
        sbp=flow.sbp.broadcast,
        warn_on_non_tensor_leaf=False,
    )
    if location is None:
        return made

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, flow.Tensor):
            return leaf
        if isinstance(location, str | flow.device):
            return leaf.to(device=location)
        if isinstance(location, flow.placement):
            return leaf.to_global(placement=location)
        found = location(leaf, None)
        return leaf if found is None else found

    return ArgsTree(made).map_leaf(move)


def save_graph(obj: Any, path: Any) -> bool:
    """Have OneFlow save `obj` if it is a graph of its own; whether it was.

    Raises
    ------
    RuntimeError
        It is not compiled yet.
    ValueError
        `path` is no path.
    """
    flow = _oneflow()
    if flow is None or not isinstance(obj, flow.nn.Graph):
        return False
    if not isinstance(path, str | os.PathLike):
        raise ValueError(
            "path_or_buffer must be the type of {`str`, `pathlib.Path`} while obj is Graph"
        )
    flow.save(obj, os.fspath(path))
    return True
