"""Nothing on the terminal that the user did not ask for."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils import logging as transformers_logging

from minitron.quiet import bar_class, drop_import_messages, progress_bars


def test_loading_and_generating_in_python_prints_nothing(tmp_path: Path) -> None:
    # Also where torchao is installed, which reports on every kernel that does not load.
    code = (
        "import minitron\n"
        "model, tokenizer = minitron.load()\n"
        "ids = tokenizer('Once upon a time', return_tensors='pt')\n"
        "model.generate(**ids, max_new_tokens=3, engine='off', do_sample=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_other_messages_of_the_same_loggers_stay() -> None:
    drop_import_messages()
    logger = logging.getLogger("torchao")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # other tests of this process may have changed it
    try:
        logger.warning("Failed to load kernels.so: Could not load this library")
        logger.warning("this model was not quantized")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert seen == ["this model was not quantized"]


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_before_afterwards(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
        warnings.simplefilter("error")
        with progress_bars(10):
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled() is shown
        warnings.simplefilter("ignore")
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


@pytest.mark.parametrize("kernel", [True, False])
def test_the_bar_of_a_notebook_is_its_own(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In IPython on a terminal the bar is the terminal's."""
    shell = SimpleNamespace(config={"IPKernelApp": {}} if kernel else {"TerminalIPythonApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for name in ("tqdm.autonotebook", "tqdm.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found, watched = bar_class()
    assert watched is kernel or sys.stderr.isatty()
    assert ("tqdm.autonotebook" in sys.modules) == kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar = found(total=1.0, disable=True)
        bar.write("a line", file=sys.stderr)
        bar.close()
