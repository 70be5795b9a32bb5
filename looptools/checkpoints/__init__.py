"""What is saved, how it is written, found and loaded again."""

from .files import require_folder, require_own
from .inventory import inventory, only, require_owners
from .resume import resume
from .save import save

__all__ = ["inventory", "only", "require_folder", "require_own", "require_owners", "resume", "save"]
