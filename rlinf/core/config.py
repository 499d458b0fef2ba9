"""The base of every configuration record: frozen, and it knows all of its keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A configuration node. Unknown keys, missing keys and wrong types are errors.

    Subclasses live beside the component that they configure; `launch/config.py` assembles the tree. Every field
    is declared with `Field(..., description=...)`: the description is its documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
