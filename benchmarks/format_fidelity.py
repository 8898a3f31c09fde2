"""What each weight format costs on a text: KL to the model's own weights, perplexity, bytes.

Beside llama.cpp on GGUF files of as many bits (Q8_0, Q4_0), where llama-cpp-python is installed.

python benchmarks/format_fidelity.py --text FILE            the bundled model
python benchmarks/format_fidelity.py --text FILE --model CHECKPOINT --documents 40
"""

from __future__ import annotations

import argparse
import itertools
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import minitron
from minitron.bench.fidelity import fidelity
from minitron.bench.peers import GGUF_TYPES, LlamaPeer, llama_peer
from minitron.data.documents import read_documents


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text or JSON lines that the model was not trained on")
    parser.add_argument("--model", help="a checkpoint; the bundled model if left out")
    parser.add_argument("--documents", type=int, default=20, help="documents read")
    parser.add_argument("--window", type=int, default=256, help="tokens of each, from its beginning")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = minitron.load(arguments.model, device="cpu")
    pieces = []
    # The beginnings of documents; a model for short texts knows nothing of the middle of a long one.
    for text in itertools.islice(read_documents(arguments.text), arguments.documents):
        ids = tokenizer(text[: 20 * arguments.window], add_special_tokens=False)["input_ids"]
        pieces.append([model.config.bos_token_id, *ids[: arguments.window - 1]])
    with ExitStack() as stack:
        peers = {}
        for format in ("int8", "int4"):
            found = stack.enter_context(llama_peer(model, format, arguments.window))
            peers |= {
                f"{name} {GGUF_TYPES[format]}": peer.logits
                for name, peer in found.items()
                if isinstance(peer, LlamaPeer)
            }
        rows = fidelity(model, pieces, ("bf12", "int8", "int4"), peers)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'format':16}{'bytes':>12}{'KL':>12}{'perplexity':>12}{'same best':>11}   over {rows[0].tokens} tokens")
    for row in rows:
        print(f"{row.format:16}{row.nbytes:12}{row.kl:12.2e}{row.perplexity:12.4f}{row.same_best:11.2%}")


if __name__ == "__main__":
    main()
