"""Everything that writes, replaces or deletes goes through here.

`writing` explains failures of the disk, `new_file` and `new_folder` write all or nothing, `check_target` protects what
exists already, and `locked` lets one process at a time into a folder. This room needs nothing but the standard library.
"""

from .drafts import new_file, new_folder, scratch_folder, write_bytes, write_json, write_text
from .errors import WriteError, allocate, explain, require_space, writing, written_bytes
from .locks import LockedError, locked, require_unlocked
from .ownership import RECORD, write_record
from .targets import TargetError, check_target, is_empty, require_apart, require_folder_name

__all__ = [
    "RECORD",
    "LockedError",
    "TargetError",
    "WriteError",
    "allocate",
    "check_target",
    "explain",
    "is_empty",
    "locked",
    "new_file",
    "new_folder",
    "require_apart",
    "require_folder_name",
    "require_space",
    "require_unlocked",
    "scratch_folder",
    "write_bytes",
    "write_json",
    "write_record",
    "write_text",
    "writing",
    "written_bytes",
]
