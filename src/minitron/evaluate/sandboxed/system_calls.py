"""A seccomp filter that makes the system calls fail which the other limits do not cover.

They make namespaces with new privileges, memory that no limit counts (System V shared memory, memory files), sockets
that no network namespace restricts (AF_VSOCK, AF_ALG and others), or open large parts of the kernel that no Python
program needs.
"""

import ctypes
import errno
import platform
import struct

from .kernel import call

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
AF_UNIX = 1
NAMESPACE_FLAGS = 0x7E020000  # every CLONE_NEW... that clone takes
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in the kernel's struct seccomp_data; the low half of a word
_X32_BIT = 0x40000000  # a second table of the same calls on x86_64

# Name: numbers on x86_64 and aarch64.
DENIED = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "syslog": (103, 116),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
}
EXAMINED = {"clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "socketpair": (53, 199)}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's number of each machine, in the order of the columns above."""


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
    return _instruction(_RETURN, _ERROR | number)


def program(machine: str) -> bytes:
    """The filter, in classic BPF.

    Raises:
        OSError: the system calls of this machine are not in the table.
    """
    if machine not in AUDIT:
        raise OSError(errno.ENOSYS, f"the system calls of {machine} are not known here, only of {' and '.join(AUDIT)}")
    column = list(AUDIT).index(machine)
    allow = _instruction(_RETURN, _ALLOW)
    parts = [
        _instruction(_LOAD, _MACHINE),
        _instruction(_JUMP_EQUAL, AUDIT[machine], 1, 0),
        _instruction(_RETURN, _KILL),  # a 32-bit program, which has a table of its own
        _instruction(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        parts += [_instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _fail(errno.ENOSYS)]
    for numbers in DENIED.values():
        parts += [_instruction(_JUMP_EQUAL, numbers[column], 0, 1), _fail(errno.EPERM)]
    # Its flags are in memory, which a filter cannot read; without it the C library uses `clone`.
    parts += [_instruction(_JUMP_EQUAL, EXAMINED["clone3"][column], 0, 1), _fail(errno.ENOSYS)]
    first = _instruction(_LOAD, _FIRST_ARGUMENT)
    flags = [first, _instruction(_JUMP_ANY_BIT, NAMESPACE_FLAGS, 0, 1), _fail(errno.EPERM), allow]
    parts += [_instruction(_JUMP_EQUAL, EXAMINED["clone"][column], 0, len(flags)), *flags]
    family = [first, _instruction(_JUMP_EQUAL, AF_UNIX, 1, 0), _fail(errno.EAFNOSUPPORT), allow]
    for name in ("socket", "socketpair"):
        parts += [_instruction(_JUMP_EQUAL, EXAMINED[name][column], 0, len(family)), *family]
    return b"".join([*parts, allow])


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def restrict() -> None:
    """Install the filter for this process and its children. It needs `no_new_privs`.

    Raises:
        OSError: the kernel has no filters, or the machine is not in the table.
    """
    code = program(platform.machine())
    what = _Program(len(code) // 8, code)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(what), 0, 0)
