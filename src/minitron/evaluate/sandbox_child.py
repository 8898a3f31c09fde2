"""The inside of the sandbox: a script of the standard library alone, started by `sandbox.py`.

Stage 0 reads the job and enters new namespaces. Stage 1 is process 1 of them: it builds a small read-only root, gives
up all privileges, sets the limits, and starts stage 2, which runs the program. When stage 1 ends, the kernel ends
everything that the program may have started.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import sys
import time

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
MOST_ANSWER_BYTES = 4096

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    """A function of the C library; OSError where it fails."""
    if getattr(libc, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount; see mount(2)."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def make_read_only(path: str, recursive: bool) -> None:
    """Make a mount read-only, with all that is mounted below it."""

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    what = Attributes(MOUNT_ATTR_RDONLY, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(what), ctypes.sizeof(what))


def enter_namespaces() -> None:
    """New process ids, mounts, network (none), and, for who is not root, a user namespace that permits the rest."""
    spaces = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if os.getuid() == 0:
        try:
            call("unshare", spaces)
            return
        except PermissionError:  # root of a container, with few rights
            become_nobody()
    user, group = os.getuid(), os.getgid()
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that the files below are ours
    call("unshare", spaces | CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def become_nobody() -> None:
    """Root has no process limit, and owns everything; so it becomes somebody who has one, and owns nothing."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def build_root(root: str, visible: list[str], disk_bytes: int) -> None:
    """Move into a new root: `visible` folders, read-only; a few devices; /tmp, the one place to write to."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for path in sorted(visible):
        here = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(here), exist_ok=True)
            os.symlink(os.readlink(path), here)
        elif not os.path.exists(here):  # below another visible folder it is there already
            os.makedirs(here)
            mount(path, here, "", MS_BIND | MS_REC)
    for folder in ("dev", "proc", "tmp", "old"):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
    for device in ("null", "zero", "urandom", "random"):
        with open(f"{root}/dev/{device}", "w", encoding="ascii"):
            pass
        mount(f"/dev/{device}", f"{root}/dev/{device}", "", MS_BIND)
    call("syscall", SYS_PIVOT_ROOT[platform.machine()], root.encode(), f"{root}/old".encode())
    os.chdir("/")
    with contextlib.suppress(OSError):  # refused inside some containers; the program then sees an empty /proc
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    call("umount2", b"/old", MNT_DETACH)
    make_read_only("/", recursive=True)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=1024,mode=1777")
    os.chdir("/tmp")


def drop_everything() -> None:
    """Capabilities, and any way to get them back."""
    if os.getuid() == 0:
        become_nobody()
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_limits(job: dict) -> None:
    """For this process and all that it starts."""
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


def run_program(source: str, token: str, answer: int) -> None:
    """Stage 2. Ends the process."""
    sys.setrecursionlimit(10_000)
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.dup2(answer, 3)
    os.closerange(4, 64)
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "program"})
        text = f"{token} passed"
    except BaseException as error:
        text = f"failed: {type(error).__name__}: {error}"[:500]
    os.write(3, text.encode("utf-8", "replace"))
    os._exit(0)


def wait_for(pid: int, seconds: float) -> int | None:
    """Exit status of a process; None where it did not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == pid:
            return status
        time.sleep(0.002)
    return None


def supervise(job: dict) -> dict:
    """Stage 1: run the program and say how it ended."""
    token = os.urandom(16).hex()
    answer, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_program(job["program"], token, write)
    os.close(write)
    status = wait_for(pid, job["seconds"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # whatever the program has started
    ready = select.select([answer], [], [], 0)[0]
    text = os.read(answer, MOST_ANSWER_BYTES).decode("utf-8", "replace") if ready else ""
    if status is None:
        return {"passed": False, "reason": f"timed out after {job['seconds']} seconds"}
    if os.WIFSIGNALED(status):
        return {"passed": False, "reason": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
    if text == f"{token} passed" and status == 0:
        return {"passed": True, "reason": "passed"}
    return {"passed": False, "reason": text.replace(token, "") or "ended the process before the tests were over"}


def main() -> None:
    """Stage 0."""
    job = json.load(sys.stdin)
    enter_namespaces()
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # process 1 of a namespace gets only signals that it handles
    os.setsid()
    try:
        build_root(job["root"], job["visible"], job["disk_bytes"])
        drop_everything()
        set_limits(job)
    except OSError as error:
        result = {"error": str(error)}
    else:
        result = supervise(job)
    os.write(1, json.dumps(result).encode())
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except OSError as failure:
        os.write(1, json.dumps({"error": str(failure)}).encode())
