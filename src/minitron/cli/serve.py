"""`minitron serve`: an HTTP server that speaks OpenAI's protocol."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Optional

import typer

from ..locate import locate
from .common import MODEL_HELP, quiet_libraries, say, sentence_errors

NEEDED = ("starlette", "uvicorn", "prometheus_client", "llguidance", "pydantic", "yaml")


@sentence_errors
def serve(
    models: Optional[list[str]] = typer.Argument(  # noqa: B008, UP045 (typer reads this annotation at run time)
        None, help=f"{MODEL_HELP} Several may be given, each as NAME=CHECKPOINT too. Default: `bundled`."
    ),
    config: Optional[Path] = typer.Option(None, help="YAML file of these options; those given here take precedence."),  # noqa: B008, UP045
    host: Optional[str] = typer.Option(None, help="Address to listen on. [default: 127.0.0.1]"),  # noqa: UP045
    port: Optional[int] = typer.Option(None, help="Port; 0 picks a free one. [default: 8000]"),  # noqa: UP045
    api_keys: Optional[str] = typer.Option(None, help="File with one API key a line."),  # noqa: UP045
    allow_public: Optional[bool] = typer.Option(  # noqa: UP045
        None, "--allow-public", help="Listen on a public address without API keys."
    ),
    cors: Optional[list[str]] = typer.Option(None, help="Origin whose pages may call; may be repeated."),  # noqa: B008, UP045
    dtype: Optional[str] = typer.Option(None, help="auto, bf16, fp16 or fp32. [default: auto]"),  # noqa: UP045
    device: Optional[str] = typer.Option(None, help="auto, cpu, cuda, cuda:1, ... [default: auto]"),  # noqa: UP045
    format: Optional[str] = typer.Option(None, help="Load the weights as bf16, fp32, bf12, int8 or int4."),  # noqa: UP045
    threads: Optional[int] = typer.Option(None, help="Threads that compute. [default: all cores]"),  # noqa: UP045
    slots: Optional[int] = typer.Option(None, help="Requests answered at the same time. [default: 8]"),  # noqa: UP045
    max_context: Optional[int] = typer.Option(None, help="Longest prompt with its answer, in tokens."),  # noqa: UP045
    engine: Optional[str] = typer.Option(None, help="auto, cuda or off (transformers). [default: auto]"),  # noqa: UP045
    prefill_chunk: Optional[int] = typer.Option(  # noqa: UP045
        None, help="Prompt tokens between decode steps. [default: 32, on a GPU 256]"
    ),
    prefix_cache: Optional[int] = typer.Option(None, help="Bytes of the prefix cache; 0 turns it off."),  # noqa: UP045
    max_waiting: Optional[int] = typer.Option(None, help="Requests that may wait for a slot. [default: 128]"),  # noqa: UP045
    request_seconds: Optional[float] = typer.Option(None, help="Longest time of a request. [default: 600]"),  # noqa: UP045
    body_seconds: Optional[float] = typer.Option(None, help="Longest time to send a body. [default: 30]"),  # noqa: UP045
    max_body: Optional[int] = typer.Option(None, help="Largest body in bytes. [default: 4194304]"),  # noqa: UP045
    max_schema: Optional[int] = typer.Option(None, help="Largest JSON schema in bytes. [default: 65536]"),  # noqa: UP045
    drain_seconds: Optional[float] = typer.Option(None, help="Longest time to finish after SIGTERM. [default: 600]"),  # noqa: UP045
    adapters: Optional[str] = typer.Option(  # noqa: UP045
        None, help="LoRA adapters: merged, or shared (over one base model, slower). [default: merged]"
    ),
    guard: Optional[list[str]] = typer.Option(  # noqa: B008, UP045
        None, help="[MODEL=]HEAD: a classification head that judges prompts and answers; may be repeated."
    ),
    guard_block: Optional[list[str]] = typer.Option(None, help="Label that blocks; may be repeated."),  # noqa: B008, UP045
    guard_threshold: Optional[float] = typer.Option(None, help="Probability that blocks. [default: 0.5]"),  # noqa: UP045
    guard_action: Optional[str] = typer.Option(None, help="refuse, flag or count. [default: refuse]"),  # noqa: UP045
    guard_separate: Optional[bool] = typer.Option(  # noqa: UP045
        None, "--guard-separate", help="Allow a guard that is not a head on the served model, slower."
    ),
    log_file: Optional[str] = typer.Option(None, help="File for the log. [default: standard error]"),  # noqa: UP045
) -> None:
    """Serve models over HTTP to every client that speaks OpenAI's protocol.

    Examples:

      minitron serve

      minitron serve path/to/checkpoint --port 8080 --slots 16

      minitron serve chat=path/to/chat code=path/to/code --api-keys keys.txt

      minitron serve bundled --guard runs/spam/model --guard-block spam

      minitron serve --config serve.yaml
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {missing[0]}, which is not installed; pip install 'minitron[serve]'")
    given: dict[str, Any] = {
        "models": tuple(models) if models else None,
        "host": host,
        "port": port,
        "api_keys": api_keys,
        "allow_public": allow_public,
        "cors": tuple(cors) if cors else None,
        "dtype": dtype,
        "device": device,
        "format": format,
        "threads": threads,
        "slots": slots,
        "max_context": max_context,
        "engine": engine,
        "prefill_chunk": prefill_chunk,
        "prefix_cache": prefix_cache,
        "max_waiting": max_waiting,
        "request_seconds": request_seconds,
        "body_seconds": body_seconds,
        "max_body": max_body,
        "max_schema": max_schema,
        "drain_seconds": drain_seconds,
        "adapters": adapters,
        "guard": tuple(guard) if guard else None,
        "guard_block": tuple(guard_block) if guard_block else None,
        "guard_threshold": guard_threshold,
        "guard_action": guard_action,
        "guard_separate": guard_separate,
        "log_file": log_file,
    }
    from ..serve.settings import read_settings

    settings = read_settings(config, given)
    for model in (*settings.models, *settings.guard):
        locate(model.partition("=")[2] or model)
    if settings.api_keys is not None:
        from ..serve.gate import ApiKeys

        ApiKeys.read(Path(settings.api_keys))
    quiet_libraries()
    from ..serve.server import serve as run

    code = run(settings, say)
    if code:
        raise typer.Exit(code)
