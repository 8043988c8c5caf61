"""Rotary angles as configurations of transformers say them, and as ours do; both directions.

Today's files have `rope_parameters` with `rope_type` and `rope_theta` in it; older ones `rope_scaling`, which goes
first where both are there, with `type` in it and `rope_theta` beside it.
Source of keys and precedence: transformers 5, modeling_rope_utils.py.
"""

from collections.abc import Mapping
from dataclasses import asdict

from blt.config_json import Json, json_object
from blt.interop.arguments import Arguments
from blt.layers import RopeScaling, TransformerConfig

COMPUTED = ("default", "llama3")
"""Kinds of rotary angles that are computed here."""


def read_rope(values: Mapping[str, object], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the angles. ValueError for a kind that is not computed here, or one without its numbers."""
    rope = _section(values)
    theta = rope.number("rope_theta", Arguments(values, (), {}).number("rope_theta", default_theta))
    kind = rope_type(values)
    if kind not in COMPUTED:
        raise ValueError(f"rope_type must be {' or '.join(map(repr, COMPUTED))}, got {kind!r}")
    if kind == "default":
        return theta, None
    positions = Arguments(values, (), {}).optional_integer("max_position_embeddings")
    return theta, RopeScaling(
        factor=rope.required_number("factor"),
        low_freq_factor=rope.required_number("low_freq_factor"),
        high_freq_factor=rope.required_number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", positions),
    )


def rope_type(values: Mapping[str, object]) -> object:
    """The kind of angles as it stands there, whether it is computed here or not."""
    rope = _section(values)
    return rope.given("rope_type") or rope.given("type") or "default"


def partial_rotary_factor(values: Mapping[str, object]) -> float:
    """The share of a head's columns that is rotated."""
    return _section(values).number(
        "partial_rotary_factor", Arguments(values, (), {}).number("partial_rotary_factor", 1.0)
    )


def write_rope(shape: TransformerConfig) -> dict[str, Json]:
    """The keys of a configuration that say a stack's angles."""
    scaling = shape.rope_scaling
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}}
    # Computed with by nobody, but transformers warns of a scaled context that is no longer than the original one.
    positions = int(scaling.factor * scaling.original_max_position_embeddings)
    return {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": shape.rope_theta, **asdict(scaling)},
        "max_position_embeddings": positions,
    }


def _section(values: Mapping[str, object]) -> Arguments:
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return Arguments(json_object(given, "rope_parameters"), (), {})
