"""Folders with one file of weights, whatever its name; asked when no other format claims one."""

from __future__ import annotations

from ..errors import FormatError
from ..layout import Folder, Index
from ._header_text import short
from ._merge import merge
from .shards import checkpoints, files_in, shard_index

__all__ = ["LINKS", "index_folder", "sniff_folder"]

#: As the folders of shards: in the cache of Hugging Face's hub every file is a link.
LINKS = True

#: What files of weights end in. Others may be anything.
_WEIGHTS = (".safetensors", ".gguf", ".npz", ".npy", ".pt", ".pth", ".ckpt", ".bin")
#: Names that say so much as that the folder is one of torch.distributed.checkpoint.
_METADATA, _DISTCP = ".metadata", ".distcp"
#: How many names a message lists.
_SHOWN = 10


def _candidates(folder: Folder) -> list[str]:
    """Names of what could be the checkpoint."""
    found = files_in(folder)
    if _METADATA in found or any(name.endswith(_DISTCP) for name in found):
        return []
    weights = [name for name in found if name.endswith(_WEIGHTS)]
    alike = [name for name in weights if name.endswith(".safetensors")]
    return checkpoints(folder) or alike or weights


def sniff_folder(folder: Folder) -> bool:
    """Whether there is a file of weights in a folder."""
    return bool(_candidates(folder))


def index_folder(folder: Folder, *, verify: bool, strict: bool) -> Index:  # noqa: ARG001
    """Find the tensors of the one file.

    Raises
    ------
    FormatError
        There are several, of which none has a name that comes before the others'.
    """
    found = _candidates(folder)
    if len(found) > 1:
        shown = ", ".join(map(short, found[:_SHOWN]))
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise FormatError(
            f"{folder.name}: expected one checkpoint, found {shown}{more}: give the path of one"
        )
    return merge(folder.name, [(found[0], shard_index(folder.part(found[0]), verify), None)])
