"""What a node decides for itself: which runs it admits, how it follows their settings, what one may take of it."""

from fedpeft.nodes.admission import require_admissible
from fedpeft.nodes.following import MODEL_VARIABLE, WITHOUT_A_FILE, followed, rows_of
from fedpeft.nodes.protections import PROTECTIONS, Protection, require_protections
from fedpeft.nodes.work import make_room, needed_bytes, require_memory, require_rank, require_room, within

__all__ = [
    "MODEL_VARIABLE",
    "PROTECTIONS",
    "WITHOUT_A_FILE",
    "Protection",
    "followed",
    "make_room",
    "needed_bytes",
    "require_admissible",
    "require_memory",
    "require_protections",
    "require_rank",
    "require_room",
    "rows_of",
    "within",
]
