"""What is saved, how it is written, found and loaded again."""

from ..archives.files import require_folder
from ..cursor import Cursor
from .changes import take_untold
from .fingerprint import note_seed
from .inventory import inventory, only, require_owners
from .memory import note_parts
from .resume import resume
from .save import Saver, save, saver

__all__ = ["Saver", "inventory", "look", "only", "require_folder", "resume", "save", "saver", "take_untold"]


def look(cursor: Cursor) -> None:
    """When a run is built: refuse what could not be saved, and note what a checkpoint will be compared with."""
    require_owners(cursor)
    note_parts(cursor)
    note_seed(cursor)
