"""The inside of a sandbox, started by `sandbox.py` for a program and for its judge.

Stage 0 reads the job and enters new namespaces. Stage 1 is process 1 in them: it builds a small read-only root, drops
all privileges, sets the limits, and starts stage 2, which runs the program or the tests. When stage 1 ends, the kernel
kills everything that they may have started.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from . import judge, program, system_calls
from .kernel import call

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
MOST_ANSWER_BYTES = 1 << 16  # the capacity of a pipe; an escaped character of a reason takes up to 12 bytes
GO = b"g"
"""A judge that is ready tells the program's side."""


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount; see mount(2)."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def make_read_only(path: str, read_only: bool = True) -> None:
    """Make a mount and everything mounted below it read-only, or make this one mount writable."""

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    what = Attributes(MOUNT_ATTR_RDONLY, 0, 0, 0) if read_only else Attributes(0, MOUNT_ATTR_RDONLY, 0, 0)
    flags = AT_RECURSIVE if read_only else 0
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(what), ctypes.sizeof(what))


def enter_namespaces() -> None:
    """Enter new namespaces for users, process ids, mounts and network (without any interface).

    Root gets a user namespace too: its processes are counted there, not together with all others of the user.
    """
    spaces = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if os.getuid() == 0:
        try:
            with mapping_from_outside("0 0 1\n65534 65534 1\n"):
                call("unshare", spaces)
            return
        except PermissionError:  # root of a container, with few rights
            become_nobody()
    user, group = os.getuid(), os.getgid()
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that the files below /proc/self belong to us
    call("unshare", spaces)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


@contextlib.contextmanager
def mapping_from_outside(users: str) -> Iterator[None]:
    """Map more than one user. Only a process outside the new namespace may do that: a child that stays outside."""
    wait, go = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(go)
        try:
            if os.read(wait, 1):
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{parent}/{name}", "w", encoding="ascii") as file:
                        file.write(users)
            os._exit(0)
        except OSError:
            os._exit(1)
    os.close(wait)
    try:
        yield
        os.write(go, b"x")
    finally:
        os.close(go)
        status = os.waitpid(child, 0)[1]
    if status != 0:
        raise OSError(errno.EPERM, "users cannot be mapped into a namespace")


def become_nobody() -> None:
    """Root has no process limit and owns everything, so it becomes a user who has a limit and owns nothing."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def build_root(root: str, visible: list[str], hidden: list[str], disk_bytes: int) -> None:
    """Move into a new root with the `visible` folders, read-only, in which `hidden` files are empty, and a writable
    /tmp."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    os.mkdir(f"{root}/tmp")  # before the visible folders: an environment may be in there
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=1024,mode=1777")
    for path in sorted(visible):
        here = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(here), exist_ok=True)
            os.symlink(os.readlink(path), here)
        elif not os.path.exists(here):  # it is there already, below another visible folder
            os.makedirs(here)
            mount(path, here, "", MS_BIND | MS_REC)
    for folder in ("dev", "proc", "old"):
        os.mkdir(f"{root}/{folder}")
    for device in ("null", "zero", "urandom", "random"):
        with open(f"{root}/dev/{device}", "w", encoding="ascii"):
            pass
        mount(f"/dev/{device}", f"{root}/dev/{device}", "", MS_BIND)
    for path in hidden:
        if os.path.exists(root + path):
            mount("/dev/null", root + path, "", MS_BIND)
    call("syscall", SYS_PIVOT_ROOT[platform.machine()], root.encode(), f"{root}/old".encode())
    os.chdir("/")
    with contextlib.suppress(OSError):  # refused inside some containers; the program then sees an empty /proc
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    call("umount2", b"/old", MNT_DETACH)
    make_read_only("/")
    make_read_only("/tmp", read_only=False)
    os.chdir("/tmp")


def drop_everything() -> None:
    """Drop all capabilities and every way to regain them."""
    if os.getuid() == 0:
        become_nobody()
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    system_calls.restrict()


def set_limits(job: dict[str, Any]) -> None:
    """Set the limits of this process and its children."""
    seconds = int(job["seconds"]) + 1
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NPROC: job["processes"] + 2,  # stages 0 or 1 count
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))


def start(job: dict[str, Any], requests: int, answers: int) -> tuple[int, int]:
    """Start stage 2. Returns its process id, and a descriptor to read the judge's result from."""
    found, write = os.pipe()
    pid = os.fork()
    if pid:
        for number in (write, requests, answers):
            os.close(number)
        return pid, found
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    # The pipes have the numbers that they had in the parent: any. So they are copied to free numbers above 5, which
    # overwrites nothing, then to their places.
    copies = [fcntl.fcntl(number, fcntl.F_DUPFD, 6) for number in (requests, answers, write)]
    for place, copy in enumerate(copies, 3):
        os.dup2(copy, place)
    judging = job["role"] == "judge"
    os.closerange(6 if judging else 5, max(requests, answers, write, *copies) + 1)
    if not judging:
        program.run(job, 3, 4)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # so that a program that has ended gives an error to report
    with contextlib.suppress(BrokenPipeError):
        os.write(3, GO)
    os.write(5, json.dumps(judge.judge(job, 3, 4)).encode())
    os._exit(0)


def wait_for(pid: int, seconds: float) -> int | None:
    """Exit status of a process; None if it did not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == pid:
            return status
        time.sleep(0.002)
    return None


def supervise(job: dict[str, Any], requests: int, answers: int) -> dict[str, Any]:
    """Stage 1: run the program or the tests and report how they ended. Only a judge reports that tests passed."""
    judging = job["role"] == "judge"
    if not judging and os.read(requests, 1) != GO:  # so that the program's time starts when the judge is ready
        return {"reason": "the judge did not start"}
    pid, found = start(job, requests, answers)
    status = wait_for(pid, job["wall_seconds"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # everything that the program has started
    if status is None:
        return {"passed": False, "reason": f"timed out after {job['seconds']} seconds"}
    if os.WIFSIGNALED(status):
        return {"passed": False, "reason": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
    ready = judging and select.select([found], [], [], 0)[0]
    text = os.read(found, MOST_ANSWER_BYTES) if ready else b""
    return json.loads(text) if text else {"passed": False, "reason": "ended the process before the tests were over"}


def main() -> None:
    """Stage 0."""
    try:
        enter_and_run(json.load(sys.stdin))
    except OSError as failure:
        os.write(1, json.dumps({"error": str(failure)}).encode())


def enter_and_run(job: dict[str, Any]) -> None:
    """The rest of stage 0, and stage 1."""
    enter_namespaces()
    requests, answers = job["requests"], job["answers"]
    pid = os.fork()
    if pid:
        os.close(requests)
        os.close(answers)
        os.waitpid(pid, 0)
        return
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # process 1 of a namespace receives only signals that it handles
    os.setsid()
    try:
        call("sethostname", b"sandbox", 7)
        build_root(job["root"], job["visible"], job["hidden"], job["disk_bytes"])
        drop_everything()
        set_limits(job)
    except OSError as error:
        result = {"error": str(error)}
    else:
        result = supervise(job, requests, answers)
    os.write(1, json.dumps(result).encode())
    os._exit(0)
