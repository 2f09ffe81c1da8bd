"""What contenders do, each in the way its own documentation shows: one function an action.

Libraries are imported inside, so that one that is missing is missed by its own rows alone; the
import is paid in the round that is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import limits


@dataclass(frozen=True, slots=True)
class Job:
    """What an action gets: the object as its framework has it, a path, the name of one tensor."""

    obj: Any
    path: Path
    one: str


Action = Callable[[Job], Any]


def durably(save: Action) -> Action:
    """What a careful user does after a save that does not sync: fsync of file and directory."""

    def action(job: Job) -> None:
        save(job)
        limits.sync_file(job.path)
        limits.sync_directory(job.path)

    return action


# ---- holdfast ---------------------------------------------------------------------------------


def hold_save(job: Job) -> None:
    import holdfast

    holdfast.save(job.obj, job.path, durable=False)


def hold_save_durable(job: Job) -> None:
    import holdfast

    holdfast.save(job.obj, job.path)


def hold_load(framework: str, mmap: bool) -> Action:
    def action(job: Job) -> Any:
        import holdfast

        return holdfast.load(job.path, mmap=mmap, framework=framework)

    return action


def hold_one(framework: str) -> Action:
    def action(job: Job) -> Any:
        import holdfast

        with holdfast.open(job.path, framework=framework) as f:
            return f[job.one]

    return action


def hold_each(framework: str) -> Action:
    def action(job: Job) -> Any:
        import holdfast

        with holdfast.open(job.path, framework=framework) as f:
            return {name: f[name] for name in f}

    return action


def hold_fill(job: Job) -> None:
    import holdfast

    holdfast.load_into(job.obj, job.path)


def hold(framework: str) -> dict[str, Action]:
    return {
        "save": hold_save,
        "save-durable": hold_save_durable,
        "load": hold_load(framework, mmap=False),
        "load-mapped": hold_load(framework, mmap=True),
        "one": hold_one(framework),
        "each": hold_each(framework),
        "fill": hold_fill,
    }


def hold_torch_save(durable: bool) -> Action:
    """To the archive that torch.load reads, whatever the path ends in."""

    def action(job: Job) -> None:
        import holdfast

        holdfast.save(job.obj, job.path, format="torch", durable=durable)

    return action


def hold_torch(framework: str) -> dict[str, Action]:
    """What we do with the files of torch.save; those that are read, torch has written."""
    found = hold(framework)
    if framework == "torch":
        found |= {"save": hold_torch_save(False), "save-durable": hold_torch_save(True)}
    else:
        del found["save"], found["save-durable"]
    return found


def hold_format(format: str, framework: str) -> dict[str, Action]:
    """What we do with a format that a path does not say: a folder of OneFlow's, say."""

    def save(durable: bool) -> Action:
        def action(job: Job) -> None:
            import holdfast

            holdfast.save(job.obj, job.path, format=format, durable=durable)

        return action

    found = hold(framework) | {"save": save(False), "save-durable": save(True)}
    del found["fill"]
    return found


def hold_shards(count: int, framework: str) -> dict[str, Action]:
    """The same tensors in `count` files, or in one more where they do not divide evenly."""

    def save(durable: bool) -> Action:
        def action(job: Job) -> None:
            import holdfast

            total = sum(tensor.nbytes for tensor in job.obj.values())
            most = -(-total // count)
            holdfast.save(job.obj, job.path, max_shard_size=most, durable=durable)

        return action

    found = hold(framework) | {"save": save(False), "save-durable": save(True)}
    del found["fill"]
    return found


# ---- torch ------------------------------------------------------------------------------------


def torch_save(job: Job) -> None:
    import torch

    torch.save(job.obj, job.path)


def torch_load(mmap: bool) -> Action:
    def action(job: Job) -> Any:
        import torch

        return torch.load(job.path, weights_only=True, mmap=mmap)

    return action


def torch_one(job: Job) -> Any:
    return torch_load(mmap=True)(job)[job.one]


def _copy_over(target: Any, loaded: Any) -> None:
    if isinstance(target, dict):
        for key, value in target.items():
            _copy_over(value, loaded[key])
    elif hasattr(target, "copy_"):
        target.copy_(loaded)


def fill_from(load: Action) -> Action:
    """Fill by a load and a copy, as ``load_state_dict`` does it."""

    def action(job: Job) -> None:
        _copy_over(job.obj, load(job))

    return action


# ---- safetensors and NumPy --------------------------------------------------------------------


def st_torch_save(job: Job) -> None:
    from safetensors.torch import save_file

    save_file(job.obj, job.path)


def st_torch_load(job: Job) -> Any:
    from safetensors.torch import load_file

    return load_file(job.path)


def st_numpy_save(job: Job) -> None:
    from safetensors.numpy import save_file

    save_file(job.obj, job.path)


def st_numpy_load(job: Job) -> Any:
    from safetensors.numpy import load_file

    return load_file(job.path)


def st_one(framework: str) -> Action:
    def action(job: Job) -> Any:
        from safetensors import safe_open

        with safe_open(job.path, framework=framework) as f:
            return f.get_tensor(job.one)

    return action


def st_each(framework: str) -> Action:
    def action(job: Job) -> Any:
        from safetensors import safe_open

        with safe_open(job.path, framework=framework) as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no mapping

    return action


def npz_save(job: Job) -> None:
    import numpy as np

    with job.path.open("wb") as f:
        np.savez(f, **job.obj)


def npz_load(job: Job) -> Any:
    import numpy as np

    with np.load(job.path) as archive:
        return dict(archive.items())


def npz_one(job: Job) -> Any:
    import numpy as np

    with np.load(job.path) as archive:
        return archive[job.one]
