"""Random requests for the scheduler, and random interleavings of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from minitron.engine.base import DecodeEngine
from minitron.sampling_parameters import SamplingParameters
from minitron.serve.scheduler import Scheduler, TextSequence
from minitron.serve.text_output import TextOutput
from minitron.serve.token_choice import TokenChooser, TokenRules

CHUNK = 16


@dataclass(frozen=True)
class Wanted:
    """A request: what a sequence is made of."""

    prompt: tuple[int, ...]
    rules: TokenRules
    limit: int
    ends: frozenset[int]

    def sequence(self, vocabulary: int) -> TextSequence:
        chooser = TokenChooser(self.rules, self.prompt, vocabulary)
        output = TextOutput(lambda ids: "".join(f"<{token}>" for token in ids), self.prompt)
        return TextSequence(list(self.prompt), chooser, output, self.limit, self.ends)


def random_wanted(random: random.Random, vocabulary: int, prefixes: list[tuple[int, ...]]) -> Wanted:
    """A request whose prompt often begins as another's does."""
    length = random.choice((1, 3, CHUNK, CHUNK + 1, 3 * CHUNK, random.randint(1, 6 * CHUNK)))
    prompt = tuple(random.randrange(vocabulary) for _ in range(length))
    if prefixes and random.random() < 0.6:
        start = random.choice(prefixes)
        prompt = start[: random.randint(1, len(start))] + prompt[: random.randint(1, len(prompt))]
    prefixes.append(prompt)
    kind = random.random()
    parameters = SamplingParameters(
        temperature=0.0 if kind < 0.4 else random.choice((0.7, 1.0, 1.5)),
        top_p=random.choice((1.0, 0.9)),
        top_k=random.choice((0, 40)),
        repetition_penalty=random.choice((1.0, 1.0, 1.3)),
        seed=random.randrange(1 << 30),
    )
    bias = {random.randrange(vocabulary): random.choice((-5.0, 5.0))} if random.random() < 0.2 else {}
    top = random.choice((None, None, 0, 3))
    rules = TokenRules(parameters, random.choice((0.0, 0.0, 0.5)), random.choice((0.0, 0.0, 0.5)), bias, top)
    ends = frozenset(random.randrange(vocabulary) for _ in range(random.choice((0, 1, 60))))
    return Wanted(prompt, rules, random.randint(1, 12), ends)


Answer = tuple[list[int], str, list[object], str | None]


def run(
    scheduler: Scheduler, sequences: dict[TextSequence, int], joins: dict[int, list[TextSequence]]
) -> dict[int, Answer]:
    """Run sequences that join before given steps, to their ends. Answers by the sequences' numbers."""
    answers: dict[int, Answer] = {number: ([], "", [], None) for number in sequences.values()}
    step = 0
    while joins or not all(sequence.ended for sequence in sequences):
        for sequence in joins.pop(step, []):
            scheduler.submit(sequence)
        scheduler.step()
        step += 1
        for sequence, update in scheduler.outbox:
            assert update.error is None, update.error
            tokens, text, reported, _ = answers[sequences[sequence]]
            answers[sequences[sequence]] = (
                tokens + update.tokens,
                text + update.text,
                reported + list(update.logprobs),
                update.finish,
            )
        scheduler.outbox.clear()
    return answers


def alone(engine: DecodeEngine, wanted: Wanted) -> Answer:
    """The answer of a request that has the engine for itself, without a prefix cache."""
    sequence = wanted.sequence(engine.weights.vocab_size)
    return run(Scheduler(engine, chunk=CHUNK, burst_seconds=0), {sequence: 0}, {0: [sequence]})[0]


def differing_interleavings(engine: DecodeEngine, seed: int, count: int, requests: int = 6) -> tuple[int, int, int]:
    """How many answers differ from those of the same requests alone, of how many, and how many cache hits there were.

    Each interleaving serves some requests that join at random steps; some are cancelled at random steps; the prefix
    cache is small, so that it evicts.
    """
    chance = random.Random(seed)
    vocabulary, prefixes = engine.weights.vocab_size, []
    scheduler = Scheduler(engine, chunk=CHUNK, cache_bytes=1 << 18, burst_seconds=0.002)
    pool = [random_wanted(chance, vocabulary, prefixes) for _ in range(min(40, 4 * count))]
    answers_alone = [alone(engine, wanted) for wanted in pool]
    differing = total = 0
    for _ in range(count):
        chosen = [chance.randrange(len(pool)) for _ in range(chance.randint(2, requests))]
        sequences: dict[TextSequence, int] = {}
        joins: dict[int, list[TextSequence]] = {}
        for number, index in enumerate(chosen):
            sequence = pool[index].sequence(vocabulary)
            sequences[sequence] = number
            joins.setdefault(chance.randint(0, 12), []).append(sequence)
        cancelled = {number: chance.randint(0, 15) for number in range(len(chosen)) if chance.random() < 0.2}
        found = _run_with_cancellations(scheduler, sequences, joins, cancelled)
        for number, index in enumerate(chosen):
            tokens, text, reported, finish = found[number]
            expected = answers_alone[index]
            total += 1
            if number in cancelled and finish is None:  # what it got is a beginning of its answer
                differing += not (
                    expected[0][: len(tokens)] == tokens
                    and expected[1].startswith(text)
                    and expected[2][: len(reported)] == reported
                )
            else:
                differing += (tokens, text, reported, finish) != expected
    return differing, total, scheduler.prefix_hits


def _run_with_cancellations(
    scheduler: Scheduler,
    sequences: dict[TextSequence, int],
    joins: dict[int, list[TextSequence]],
    cancelled: dict[int, int],
) -> dict[int, Answer]:
    by_number = {number: sequence for sequence, number in sequences.items()}
    joins = {**joins}
    original = scheduler.step
    step = 0

    def stepping() -> bool:
        nonlocal step
        for number, when in cancelled.items():
            if when <= step and not by_number[number].ended:
                scheduler.cancel(by_number[number])
        step += 1
        return original()

    scheduler.step = stepping  # type: ignore[method-assign]
    try:
        return run(scheduler, sequences, joins)
    finally:
        del scheduler.step
