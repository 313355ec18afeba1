"""What each parameter of the model is, by its name. Whatever treats parameters differently derives it from here.

The rows of the Engram tables are not parameters.
"""

from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, get_args

Part = Literal[
    "input_embedding",
    "output_head",
    "engram_projections",
    "engram_vectors",
    "hyper_connections",
    "routers",
    "routed_experts",
    "shared_experts",
    "dense_ffn",
    "norms",
    "attention",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""Names of the parts. `engram_vectors` are norms and convolutions; `attention` and `dense_ffn` are without norms."""


class Kind(NamedTuple):
    """Parameters that are treated alike."""

    part: Part
    pattern: str
    """Shell pattern of their names; the first kind with one that matches takes a parameter."""
    linear: bool = False
    """Their matrices are linear maps, which is what Muon is for."""
    within: str = ""
    """A text that their names also contain."""


KINDS = (
    Kind("input_embedding", "*embed*"),
    Kind("output_head", "*lm_head*"),
    Kind("routers", "*.mlp.gate.*"),
    Kind("engram_vectors", "*norm*", within=".engram."),
    Kind("norms", "*norm*"),
    Kind("engram_vectors", "*conv*"),
    Kind("hyper_connections", "*hyper_connection*"),
    Kind("engram_projections", "*.engram.*_proj*", linear=True),
    Kind("routed_experts", "*.mlp.experts.*", linear=True),
    Kind("shared_experts", "*.mlp.shared_experts.*", linear=True),
    Kind("dense_ffn", "*.mlp.*", linear=True),
    Kind("attention", "*.self_attn.*", linear=True),
)
ADAM_PATTERNS = tuple(dict.fromkeys(kind.pattern for kind in KINDS if not kind.linear))
"""Shell patterns of the names of all other parameters."""


def kind_of(name: str) -> Kind:
    """The kind that the parameter of this name is of.

    Raises:
        ValueError: it is of none.
    """
    for kind in KINDS:
        if fnmatchcase(name, kind.pattern) and kind.within in name:
            return kind
    raise ValueError(f"parameter {name} is of no kind that model/parameters.py lists")


def matrices_fused(name: str) -> int:
    """How many linear maps of equal size a matrix of this parameter holds, one above the other."""
    return 2 if "gate_up_proj" in name.split(".") else 1
