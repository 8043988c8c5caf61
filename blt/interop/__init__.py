"""Weights of other formats into our models and back: the published reference's, and transformers'."""

from blt.interop.reference import from_reference, to_reference
from blt.interop.reference_directory import from_reference_directory
from blt.interop.transformers import from_transformers, to_transformers

__all__ = ["from_reference", "from_reference_directory", "from_transformers", "to_reference", "to_transformers"]
