"""What every section of the settings has in common, and what is said of a setting beside its type."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Mark:
    """What is said of a setting beside its type, in `Annotated[...]`."""

    text: str


COMMON = Mark("what people set: shown by --help, which leaves the rest to --help-all")
NOT_IN_FINGERPRINT = Mark("a stage's output does not depend on it, or its fingerprint names it elsewhere")
T = TypeVar("T")
Common = Annotated[T, COMMON]


class Section(BaseModel):
    """A branch of the tree: frozen, and an unknown key is an error; so is `inf`, where a field does not allow it."""

    # JSON has no infinity: a field that allows it is written as a string, which reads as the same number
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="strings")

    def fingerprint_inputs(self, *, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the fields that a stage's output depends on, dumped.

        Args:
            exclude: Fields left out beside those marked `NOT_IN_FINGERPRINT`.

        Returns:
            The fields by name, nested models as dicts.
        """
        fields = type(self).model_fields
        marked = {name for name, field in fields.items() if NOT_IN_FINGERPRINT in field.metadata}
        return self.model_dump(exclude=marked | set(exclude))
