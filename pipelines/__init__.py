"""Data and workers: what moves bytes between storage, Ray and `blt`. Imports `blt`, never `jobs`; assumes that Ray
is running.

`pipelines.open_patches` reads a patch dataset; it needs no Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.patches import open_patches

__all__ = ["open_patches"]


def __getattr__(name: str) -> Any:
    """The public reader, imported when it is first asked for: Arrow and torch take seconds."""
    if name != "open_patches":
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    from pipelines.patches import open_patches

    return open_patches
