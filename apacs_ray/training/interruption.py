"""What may come between two steps of a training. No torch here."""

from __future__ import annotations

from enum import Enum


class Interruption(Enum):
    """Why an epoch is interrupted."""

    KEEP = "a checkpoint is due; training goes on"
    LEAVE = "the node is to be taken away: a checkpoint, and training ends here"
