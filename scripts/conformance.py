"""Run the conformance suites of others against the server.

    python scripts/conformance.py [SUITE...] [--smoke]       what `make conformance` runs

Suites: langchain (LangChain's tests of chat models and embeddings), openai (the openai client), litellm (LiteLLM as a
client), openapi (schemathesis with OpenAI's description of its API), schemas (400 JSON schemas of a public benchmark).

The suites' packages get an environment of their own, `.venv-conformance`, and talk HTTP to a server in this one. All
but `schemas` ask a model whose answers are scripted (tests/samples/scripted_model.py), because their tests expect
certain calls and arguments; tokenizer, template, scheduler, grammars and routes are the real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-conformance"
SUITES = ("langchain", "openai", "litellm", "openapi")
OPTIONS = ["-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "-W", "ignore", "-q", "-rA", "--tb=short"]
# One event loop for all tests, as in a program: langchain-openai keeps its connections from test to test.
LOOPS = ["asyncio_mode=auto", "asyncio_default_test_loop_scope=session", "asyncio_default_fixture_loop_scope=session"]


def environment() -> Path | None:
    """The Python of the suites' environment, which is made if it is missing; None if that fails."""
    python, ready = HOME / "bin/python", HOME / ".ready"
    if not ready.exists():
        venv.create(HOME, clear=True, with_pip=True)
        wanted = ["-r", str(ROOT / "scripts/conformance-requirements.txt")]
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"the suites cannot be installed here, so they did not run: {reason}")
            return None
        ready.touch()
    return python


@contextlib.contextmanager
def scripted_server() -> Iterator[str]:
    """The address of a server of the scripted model."""
    path = [str(ROOT / "src"), str(ROOT / "tests/samples"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, str(ROOT / "tests/samples/scripted_model.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.stdin.close()


def run_suites(python: Path, names: list[str], smoke: bool) -> int:
    """Run suites against a server of their own; the largest exit code."""
    settings = [part for option in LOOPS for part in ("-o", option)]
    with scripted_server() as url:
        variables = {**os.environ, "MINITRON_URL": url, "OPENAI_API_KEY": "none", "PYTHONDONTWRITEBYTECODE": "1"}
        variables |= {"LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        variables |= {"MINITRON_EXAMPLES": "10"} if smoke else {}
        codes = []
        for name in names:
            print(f"--- {name}", flush=True)
            command = [str(python), "-m", "pytest", *OPTIONS, *settings, f"tests/conformance/{name}_suite.py"]
            codes.append(subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode)
    return max(codes)


def run_schemas(smoke: bool) -> int:
    """Run the JSON schemas in this environment."""
    print("--- schemas", flush=True)
    command = [sys.executable, str(ROOT / "benchmarks/schemas.py"), *(["--smoke"] if smoke else [])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    """Run the suites; 0 if all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", default=[*SUITES, "schemas"])
    parser.add_argument("--smoke", action="store_true", help="few examples of schemathesis and few schemas")
    options = parser.parse_args()
    unknown = set(options.suites) - {*SUITES, "schemas"}
    if unknown:
        parser.error(f"there is no suite {min(unknown)!r}; there are {', '.join(SUITES)} and schemas")
    codes = [run_schemas(options.smoke)] if "schemas" in options.suites else []
    names = [name for name in SUITES if name in options.suites]
    if names:
        python = environment()
        codes.append(1 if python is None else run_suites(python, names, options.smoke))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
