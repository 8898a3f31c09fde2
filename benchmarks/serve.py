"""The server's speed over HTTP: ours and llama.cpp's with the same client, weights and prompts, interleaved.

    python benchmarks/serve.py [--model bundled] [--gguf model.gguf] [--rows clients,single,turn,gap] [--smoke]
    python benchmarks/serve.py --interleavings 10000 [--state FILE]
    python benchmarks/serve.py --http-interleavings 200

Each server is a process of its own with two threads. Without --gguf, the model is converted for llama.cpp (package
xllamacpp) into a temporary folder. Without xllamacpp only our server is measured. A model whose context is shorter than
--context is served with more positions than it was trained with: the text gets worse, the work per token is the same.
The second form serves random requests that join, leave, hit the cache and are cancelled, and counts the answers that
differ in a bit from those of the same requests alone; it continues where a run with the same state file ended. The
third form does so over HTTP, with texts, and with llama.cpp's server too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import itertools
import json
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "samples"))

TEXT = "the fox and the crow met a boy in the wood and told him of a king who had lost his way home"
ROWS = ("clients", "single", "turn", "gap")


def prompt_of(words: int, seed: int) -> str:
    words_of = TEXT.split()
    return " ".join(words_of[(seed * 7 + index * (seed + 3)) % len(words_of)] for index in range(words))


class Streamed(NamedTuple):
    """One streamed answer: when it was asked for, when its pieces of text came, their text, and its tokens."""

    start: float
    times: list[float]
    text: str
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.start

    @property
    def rate(self) -> float:
        """Tokens a second after the first text; of the whole answer, if it came in one piece."""
        if len(self.times) == 1:
            return self.tokens / self.first
        return (self.tokens - 1) / (self.times[-1] - self.times[0])


def ask(port: int, path: str, tokens: int, begun: Callable[[], object] = lambda: None, **asked: object) -> Streamed:
    """Stream a greedy answer that does not end before its limit; `begun` is called at its first text."""
    body = {
        "model": "model",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **asked,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    start = time.perf_counter()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    lines = []
    for line in response:
        if line.startswith(b"data: {"):
            lines.append((time.perf_counter(), line))
            begun()
    connection.close()
    times, text, count = [], "", 0
    for moment, line in lines:
        event = json.loads(line[6:])
        choice = (event.get("choices") or [{}])[0]
        if piece := choice.get("text") or choice.get("delta", {}).get("content"):
            times.append(moment)
            text += piece
        if event.get("usage"):
            count = event["usage"]["completion_tokens"]
    return Streamed(start, times, text, count)


def complete(port: int, prompt: list[int] | str, tokens: int, **more: Any) -> Streamed:
    return ask(port, "/v1/completions", tokens, prompt=prompt, **more)


def at_once(work: Callable[[int], object], count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Prompts:
    """Prompts of an exact number of tokens, none of which begins as another one does."""

    def __init__(self, model: str) -> None:
        from minitron.loading import checkpoint_folder
        from minitron.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(checkpoint_folder(model))
        self._number = 0

    def text(self, tokens: int) -> str:
        """A text of about as many tokens, which begins with a number."""
        self._number += 1
        words = f"{self._number} {prompt_of(tokens, self._number)}".split()
        ids = self._tokenizer(" ".join(words))["input_ids"]
        return " ".join(words[: max(2, int(len(words) * tokens / len(ids)))])

    def ids(self, tokens: int) -> list[int]:
        self._number += 1
        return self._tokenizer(f"{self._number} {prompt_of(tokens, self._number)}")["input_ids"][:tokens]


def clients_row(port: int, prompts: Prompts, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of several clients at once."""
    counts: list[int] = []
    texts = [prompts.ids(24) for _ in range(options.clients)]
    start = time.perf_counter()
    at_once(lambda index: counts.append(complete(port, texts[index], options.tokens).tokens), options.clients)
    return {f"{options.clients} clients, tokens/s": sum(counts) / (time.perf_counter() - start)}


def single_row(port: int, prompts: Prompts, options: argparse.Namespace) -> dict[str, float]:
    """One client: its tokens a second, and the time to the first token after a long prompt."""
    length = 60 if options.smoke else 512
    return {
        "1 client, tokens/s": complete(port, prompts.ids(24), options.tokens).rate,
        f"first token after {length}, ms": 1000 * complete(port, prompts.ids(length), 2).first,
    }


def turn_row(port: int, prompts: Prompts, options: argparse.Namespace) -> dict[str, float]:
    """The time to the first token of the first and second turn of a conversation with a long history."""
    said = [{"role": "user", "content": prompts.text(60 if options.smoke else 1000)}]
    one = ask(port, "/v1/chat/completions", 32, messages=said)
    said += [{"role": "assistant", "content": one.text}, {"role": "user", "content": "And what did the crow say then?"}]
    two = ask(port, "/v1/chat/completions", 2, messages=said)
    return {"first turn, ms": 1000 * one.first, "second turn, ms": 1000 * two.first, "turns": two.first / one.first}


def gap_row(port: int, prompts: Prompts, options: argparse.Namespace) -> dict[str, float]:
    """The longest gap of four streams between the arrival of a long prompt and its first token."""
    length = 60 if options.smoke else 2000
    streams: list[Streamed] = []
    started = [threading.Event() for _ in range(4)]
    texts = [prompts.ids(8) for _ in started]

    def stream(index: int) -> None:
        streams.append(complete(port, texts[index], options.stream_tokens, begun=started[index].set))

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for event in started:
        event.wait(300)
    long = complete(port, prompts.ids(length), 1)
    for thread in threads:
        thread.join()
    end = long.start + long.first
    gaps = [
        later - earlier
        for one in streams
        for earlier, later in itertools.pairwise(one.times)
        if later > long.start and earlier < end
    ]
    active = sum(one.times[-1] > end for one in streams)
    return {
        f"longest gap while {length} arrive, ms": 1000 * max(gaps, default=0.0),
        f"first token of the {length}, ms": 1000 * long.first,
        "streams that outlast the prompt": active,
    }


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[int]:
    """A server's process; the port that it says it listens on."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        said = ""
        try:
            for line in server.stdout:
                said += line
                if found := re.search(r"listening on http://\S+?:(\d+)\b", line):
                    threading.Thread(target=server.stdout.read, daemon=True).start()
                    yield int(found[1])
                    break
            else:
                raise SystemExit(f"the server ended before it listened:\n{said}")
        finally:
            server.kill()


def our_server(model: str, slots: int, context: int) -> contextlib.AbstractContextManager[int]:
    options = ["--slots", str(slots), "--max-context", str(context), "--port", "0", "--threads", "2"]
    log = ["--log-file", "/dev/null"]
    return process([sys.executable, "-m", "minitron", "serve", f"model={model}", *options, *log])


def their_server(gguf: Path, slots: int, context: int) -> contextlib.AbstractContextManager[int]:
    return process([sys.executable, __file__, "--gguf", str(gguf), "--llama", f"{slots} {context}"])


def run_llama(gguf: Path, slots: int, context: int) -> None:
    """Serve with llama.cpp until this process is killed."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_parallel = slots
    parameters.n_ctx = context * slots
    parameters.cpuparams.n_threads = 2
    parameters.cpuparams_batch.n_threads = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        parameters.port = free.getsockname()[1]
    server = xllamacpp.Server(parameters)
    print(f"\nlistening on {server.listening_address} ", flush=True)
    threading.Event().wait()


def engine_rate(model: str, clients: int, tokens: int) -> float:
    """Tokens a second of the engine alone with a batch of as many sequences."""
    from minitron.engine.engines import open_engine
    from minitron.engine.model_weights import weights_of
    from minitron.loading import load

    loaded = load(model)
    with open_engine(weights_of(loaded.model), 512, clients) as engine:
        rates = []
        for _ in range(4):
            slots = [engine.acquire(512) for _ in range(clients)]
            for index, slot in enumerate(slots):
                engine.prefill(loaded.tokenizer(prompt_of(24, index))["input_ids"][:-1], slot)
            start = time.perf_counter()
            engine.greedy([5] * clients, tokens, (), slots)
            rates.append(clients * tokens / (time.perf_counter() - start))
            for slot in slots:
                engine.release(slot)
    return statistics.median(rates[1:])


def stretched(model: str, positions: int, folder: Path) -> Path:
    """The checkpoint, with at least so many positions."""
    from minitron.loading import checkpoint_folder

    checkpoint = checkpoint_folder(model)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["max_position_embeddings"] >= positions:
        return checkpoint
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return folder


def both_servers(options: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, int]:
    """The ports of our server, and of llama.cpp's where it can be had."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "model").mkdir()
    model = stretched(options.model, options.context, folder / "model")
    servers = {"minitron": stack.enter_context(our_server(str(model), options.clients, options.context))}
    gguf = options.gguf
    if not options.smoke and importlib.util.find_spec("xllamacpp") is not None:
        if gguf is None:
            from minitron.convert import convert

            gguf = folder / "model.gguf"
            convert(model, gguf)
        servers["llama.cpp"] = stack.enter_context(their_server(gguf, options.clients, options.context))
    return servers


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The medians of the rounds for each server, after one round that does not count, and the medians of ratios."""
    rows = {"clients": clients_row, "single": single_row, "turn": turn_row, "gap": gap_row}
    found: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        servers = both_servers(options, stack)
        prompts = Prompts(options.model)
        for round_ in range(options.rounds + 1):
            names = list(servers)[:: 1 if round_ % 2 else -1]
            for row in options.rows.split(","):
                for name in names:
                    for key, value in rows[row](servers[name], prompts, options).items():
                        found.setdefault(name, {}).setdefault(key, []).append(value)
    medians: dict[str, Any] = {
        name: {key: round(statistics.median(values[1:]), 3) for key, values in of.items()} for name, of in found.items()
    }
    if "llama.cpp" in found:
        ours, theirs = found["minitron"], found["llama.cpp"]
        medians["minitron / llama.cpp"] = {
            key: round(statistics.median(a / b for a, b in zip(ours[key][1:], theirs[key][1:], strict=True)), 3)
            for key in ours
            if key != "turns"
        }
    counts = {"clients": options.clients, "single": 1}
    medians["engine alone, tokens/s"] = {  # after the servers have ended
        str(count): round(engine_rate(options.model, count, options.tokens), 1)
        for row, count in counts.items()
        if row in options.rows.split(",")
    }
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


def texts_in_company(port: int, requests: list[dict[str, Any]], delays: list[float]) -> list[str]:
    """The texts of completions that are asked for at the same time, each after a delay."""
    texts = [""] * len(requests)

    def work(index: int) -> None:
        time.sleep(delays[index])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({**requests[index], "model": "model"})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        texts[index] = json.loads(connection.getresponse().read())["choices"][0]["text"]
        connection.close()

    at_once(work, len(requests))
    return texts


def http_interleavings(port: int, count: int, seed: int) -> dict[str, int]:
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
    alone = [texts_in_company(port, [request], [0])[0] for request in pool]
    differing = answers = 0
    for _ in range(count):
        chosen = [chance.randrange(len(pool)) for _ in range(chance.randint(2, 6))]
        delays = [chance.random() * 0.05 for _ in chosen]
        texts = texts_in_company(port, [pool[index] for index in chosen], delays)
        answers += len(chosen)
        differing += sum(text != alone[index] for text, index in zip(texts, chosen, strict=True))
    return {"interleavings": count, "answers": answers, "differing": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--stream-tokens", type=int, default=1000, help="tokens of the streams of the row gap")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=2304)
    parser.add_argument("--interleavings", type=int, default=0)
    parser.add_argument("--http-interleavings", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file for the totals of --interleavings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--llama", help=argparse.SUPPRESS)  # the process of llama.cpp's server: slots and context
    options = parser.parse_args()
    if unknown := set(options.rows.split(",")) - {*ROWS}:
        parser.error(f"there is no row {min(unknown)!r}; there are {', '.join(ROWS)}")
    if options.smoke:
        options.tokens, options.stream_tokens, options.rounds, options.context = 8, 30, 1, 384
    if options.llama:
        run_llama(options.gguf, *map(int, options.llama.split()))
    elif options.interleavings:
        found = interleave(2 if options.smoke else options.interleavings, options.seed, options.state)
        print(json.dumps(found, indent=2))
    elif options.http_interleavings:
        with contextlib.ExitStack() as stack:
            found = {
                name: http_interleavings(port, options.http_interleavings, options.seed)
                for name, port in both_servers(options, stack).items()
            }
        print(json.dumps(found, indent=2))
    else:
        print(json.dumps(measure(options), indent=2))


if __name__ == "__main__":
    main()
