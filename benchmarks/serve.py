"""The server's speed over HTTP: ours and llama.cpp's with the same client, weights and prompts, interleaved.

    python benchmarks/serve.py [--model bundled] [--gguf model.gguf] [--clients 8] [--smoke]
    python benchmarks/serve.py --interleavings 10000 [--state FILE]
    python benchmarks/serve.py --http-interleavings 200

Without --gguf, the model is converted for llama.cpp (package xllamacpp) into a temporary folder. Without xllamacpp only
our server is measured. The second form serves random requests that join, leave, hit the cache and are cancelled, and
counts the answers that differ in a bit from those of the same requests alone; it continues where a run with the same
state file ended. The third form does so over HTTP, with texts, and with llama.cpp's server too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "samples"))

TEXT = "the fox and the crow met a boy in the wood and told him of a king who had lost his way home"


def prompt_of(words: int, seed: int) -> str:
    words_of = TEXT.split()
    return " ".join(words_of[(seed * 7 + index * (seed + 3)) % len(words_of)] for index in range(words))


def ask(port: int, model: str, prompt: str, tokens: int) -> tuple[float, float, list[float], int]:
    """Seconds to the first text, seconds in all, gaps between pieces, and tokens, of one streamed completion."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    times, count = [], 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("choices") and event["choices"][0].get("text"):
            times.append(time.perf_counter())
        if event.get("usage"):
            count = event["usage"]["completion_tokens"]
    connection.close()
    end = time.perf_counter()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return times[0] - start, end - start, gaps, count


def together(port: int, model: str, clients: int, tokens: int, round_: int) -> float:
    """Tokens a second of several clients at once."""
    counts: list[int] = []

    def work(index: int) -> None:
        counts.append(ask(port, model, prompt_of(24, 100 * round_ + index), tokens)[3])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def longest_gap(port: int, model: str, words: int, tokens: int, round_: int) -> float:
    """The longest gap of four streams while a long prompt arrives."""
    gaps: list[float] = []

    def stream(index: int) -> None:
        gaps.extend(ask(port, model, prompt_of(8, 31 * round_ + index), tokens)[2])

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    ask(port, model, prompt_of(words, 77 + round_), 1)
    for thread in threads:
        thread.join()
    return max(gaps)


@contextlib.contextmanager
def our_server(model: str, slots: int, context: int | None) -> Iterator[tuple[int, str, Any]]:
    from live_server import live_server

    from minitron.serve.settings import ServeSettings

    settings = ServeSettings((f"model={model}",), slots=slots, max_context=context)
    with live_server(settings) as server:
        yield server.port, "model", server


@contextlib.contextmanager
def their_server(gguf: Path, slots: int, context: int) -> Iterator[tuple[int, str, Any]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_parallel = slots
    parameters.n_ctx = context * slots
    parameters.cpuparams.n_threads = 2
    parameters.port = 18089
    server = xllamacpp.Server(parameters)
    yield int(server.listening_address.rsplit(":", 1)[1]), "model", server


def engine_rate(model: str, clients: int, tokens: int) -> float:
    """Tokens a second of the engine alone with a batch of as many sequences."""
    from minitron.engine.engines import open_engine
    from minitron.engine.model_weights import weights_of
    from minitron.loading import load

    loaded = load(model)
    with_room = open_engine(weights_of(loaded.model), 512, clients)
    slots = [with_room.acquire(512) for _ in range(clients)]
    for index, slot in enumerate(slots):
        with_room.prefill(loaded.tokenizer(prompt_of(24, index))["input_ids"][:-1], slot)
    start = time.perf_counter()
    with_room.greedy([5] * clients, tokens, (), slots)
    seconds = time.perf_counter() - start
    with_room.close()
    return clients * tokens / seconds


def both_servers(options: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, tuple[int, str, Any]]:
    """Our server, and llama.cpp's where it can be had."""
    servers = {"minitron": stack.enter_context(our_server(options.model, options.clients, options.context))}
    gguf = options.gguf
    if not options.smoke and importlib.util.find_spec("xllamacpp") is not None:
        if gguf is None:
            from minitron.convert import convert
            from minitron.loading import checkpoint_folder

            gguf = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
            convert(checkpoint_folder(options.model), gguf)
        servers["llama.cpp"] = stack.enter_context(their_server(gguf, options.clients, options.context or 512))
    return servers


def measure(options: argparse.Namespace) -> dict[str, Any]:
    tokens, rounds, words = (8, 1, 60) if options.smoke else (options.tokens, options.rounds, 300)
    found: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        servers = both_servers(options, stack)
        for round_ in range(rounds):
            for name, (port, model, _) in servers.items():
                of = found.setdefault(name, {})
                of.setdefault("total tokens/s", []).append(together(port, model, options.clients, tokens, round_))
                first, seconds, _, count = ask(port, model, prompt_of(words, 9 + round_), tokens)
                of.setdefault("first token, long prompt, s", []).append(first)
                of.setdefault("tokens/s of one client", []).append((count - 1) / (seconds - first))
                text = prompt_of(words, 9 + round_) + " and then they all went home " + prompt_of(8, round_)
                of.setdefault("first token, second turn, s", []).append(ask(port, model, text, 1)[0])
                of.setdefault("longest gap, s", []).append(longest_gap(port, model, words, 2 * tokens, round_))
    medians = {name: {key: statistics.median(values) for key, values in of.items()} for name, of in found.items()}
    medians["engine alone"] = {"total tokens/s": engine_rate(options.model, min(options.clients, 8), tokens)}
    return medians


PART = 100
"""Interleavings after which the totals are written."""


def interleave(count: int, seed: int, state: Path | None) -> dict[str, Any]:
    from served_sequences import differing_interleavings

    from minitron.assets import bundled_model
    from minitron.engine.engines import open_engine
    from minitron.engine.weights import from_checkpoint

    engine = open_engine(from_checkpoint(bundled_model()), 256, 4)
    total = dict.fromkeys(("interleavings", "answers", "differing", "cached_tokens"), 0)
    if state is not None and state.exists():
        total = json.loads(state.read_text())
    while total["interleavings"] < count:
        part = min(PART, count - total["interleavings"])
        differing, answers, hits = differing_interleavings(engine, seed + total["interleavings"], part)
        total["interleavings"] += part
        total["answers"] += answers
        total["differing"] += differing
        total["cached_tokens"] += hits
        print(json.dumps(total), file=sys.stderr)
        if state is not None:
            state.write_text(json.dumps(total))
    return total


def texts_in_company(port: int, model: str, requests: list[dict[str, Any]], delays: list[float]) -> list[str]:
    """The texts of completions that are asked for at the same time, each after a delay."""
    texts = [""] * len(requests)

    def work(index: int) -> None:
        time.sleep(delays[index])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({**requests[index], "model": model})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        texts[index] = json.loads(connection.getresponse().read())["choices"][0]["text"]
        connection.close()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


def http_interleavings(port: int, model: str, count: int, seed: int) -> dict[str, int]:
    """How many texts differ from those of the same requests alone."""
    chance = random.Random(seed)
    pool = [
        {
            "prompt": prompt_of(chance.randint(1, 60), index % 7),
            "max_tokens": chance.randint(4, 16),
            "temperature": chance.choice((0, 1.0)),
            "seed": index,
        }
        for index in range(min(30, 3 * count))
    ]
    alone = [texts_in_company(port, model, [request], [0])[0] for request in pool]
    differing = answers = 0
    for _ in range(count):
        chosen = [chance.randrange(len(pool)) for _ in range(chance.randint(2, 6))]
        delays = [chance.random() * 0.05 for _ in chosen]
        texts = texts_in_company(port, model, [pool[index] for index in chosen], delays)
        answers += len(chosen)
        differing += sum(text != alone[index] for text, index in zip(texts, chosen, strict=True))
    return {"interleavings": count, "answers": answers, "differing": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int)
    parser.add_argument("--interleavings", type=int, default=0)
    parser.add_argument("--http-interleavings", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file for the totals of --interleavings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.interleavings:
        found = interleave(2 if options.smoke else options.interleavings, options.seed, options.state)
    elif options.http_interleavings:
        with contextlib.ExitStack() as stack:
            found = {
                name: http_interleavings(port, model, options.http_interleavings, options.seed)
                for name, (port, model, _) in both_servers(options, stack).items()
            }
    else:
        found = measure(options)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
