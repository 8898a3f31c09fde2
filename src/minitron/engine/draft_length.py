"""How many tokens to draft: what maximizes tokens per second, from what was kept and from measured times.

Checking costs the more, beside a step without drafts, the more texts are decoded together, so each number of texts has
a rule of its own (`DraftLengths`). Without a gain nothing is drafted, and drafting is tried again less and less often.
Estimates may be wrong, so what drafting has in fact cost is counted too: it stops where it has lost more than a small
share of the time of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_DRAFTED = 7
"""Tokens drafted at a time. With an acceptance rate of 0.9 each further one adds less than half a token to a step."""
VERIFY = 0.25
"""A first guess of the share of a step's time that a drafted token adds to it. With n texts a step of one token each is
guessed to take 1 + VERIFY * (n - 1) times that of one text."""
PATIENCE = 64
"""Steps without a draft before one is tried again; doubled each time that drafting still does not pay."""
WORTH = 1.03
"""Tokens per second with drafts, over those without, from which on tokens are drafted."""
EXPECTED_RATE = 0.85
"""Share of drafted tokens that are accepted, before any was drafted."""
_PRIOR, _MEMORY = 5.0, 0.95
"""Tokens that the expected rate counts for, and the weight of a token when one more has been drafted."""
_REFERENCE = 48
"""Steps with drafts after which the time of a plain step is measured again."""
LOST_STEPS, LOST_SHARE = 1.0, 0.01
"""What drafting may lose in all: the time of so many plain steps, and this share of the time of decoding."""
MOST_CREDIT = 10.0
"""Plain steps that earlier gains can make up for."""


class _Cost:
    """Time of a drafted step over that of a plain one, for each number of drafted tokens per text, in quarters.

    Where it was not measured, it is a linear function of the number, fitted to recent measurements and, with a small
    weight, to a guess, so that it always has a slope.
    """

    def __init__(self, cost: float, most: int, texts: int) -> None:
        each = cost + texts * VERIFY / (1 + VERIFY * (texts - 1))
        guess = [self._terms(k, 1 + each * k) for k in (1, max(2, most))]
        self._guess = [sum(terms) for terms in zip(*guess, strict=True)]
        self._seen = [0.0] * 5
        self._of: dict[float, tuple[float, float]] = {}
        """For a number of tokens: the weight of its measurements, and their weighted sum."""

    @property
    def measured(self) -> bool:
        """Whether any step with drafts was."""
        return bool(self._of)

    @staticmethod
    def _quarters(k: float) -> float:
        return max(1, round(4 * k)) / 4

    @staticmethod
    def _terms(k: float, time: float) -> tuple[float, ...]:
        return 1, k, k * k, time, k * time

    def add(self, k: float, time: float) -> None:
        """Record the time of a step with k drafted tokens per text."""
        k = self._quarters(k)
        if k in self._of:
            time = min(time, 3 * self.at(k))  # another program may have taken the cores
        pairs = zip(self._seen, self._terms(k, time), strict=True)
        self._seen = [0.9 * old + new for old, new in pairs]
        weight, total = self._of.get(k, (0.0, 0.0))
        self._of[k] = 0.8 * weight + 1, 0.8 * total + time

    def at(self, k: float) -> float:
        """The expected time of a step with k drafted tokens per text."""
        n, x, xx, y, xy = (seen + 0.02 * guess for seen, guess in zip(self._seen, self._guess, strict=True))
        slope = (n * xy - x * y) / (n * xx - x * x)
        line = max(0.9, (y - slope * x) / n + slope * k)
        weight, total = self._of.get(self._quarters(k), (0.0, 0.0))
        return (0.25 * line + total) / (0.25 + weight)


class _Losses:
    """The seconds that drafting has lost against plain decoding, all texts together."""

    def __init__(self) -> None:
        self._decoding = 0.0
        self._lost = 0.0
        """Seconds; negative where drafting has gained."""

    def add(self, seconds: float, lost: float, plain: float) -> None:
        """Record some seconds of decoding, of which so many were lost."""
        self._decoding += seconds
        self._lost = max(-MOST_CREDIT * plain, self._lost + lost)

    def too_many(self, plain: float) -> bool:
        """Whether drafting has to stop until decoding has taken longer."""
        return self._lost > LOST_STEPS * plain + LOST_SHARE * self._decoding


class _Shared:
    """What the rules of all numbers of texts learn together."""

    def __init__(self) -> None:
        self.kept, self.tried = EXPECTED_RATE * _PRIOR, _PRIOR
        """Drafted tokens that were accepted, and all whose turn came; recent ones count more."""
        self.losses = _Losses()


class DraftLength:
    """How many tokens to draft for the most tokens per second (Leviathan et al. 2023, 3.1).

    With k drafted tokens, each accepted with probability `rate`, a step gives 1 + rate + ... + rate^k tokens to a text;
    of several texts, only a share may have drafts. `rate` follows recent acceptances. So does the time of a step, but
    only where the text cannot depend on it, because a seed must give one text.

    Args:
        cost: seconds for a drafted token over seconds for a step of the model; a first guess.
        most: the largest number of drafted tokens.
        measure: whether times count.
        texts: that are decoded together.
        shared: what is learned together with the rules of other numbers of texts.
    """

    def __init__(
        self,
        cost: float,
        most: int = MOST_DRAFTED,
        measure: bool = True,
        texts: int = 1,
        shared: _Shared | None = None,
    ) -> None:
        self.cost, self.most, self.measure, self.texts = _Cost(cost, most, texts), most, measure, texts
        self.guess = cost
        self._shared = _Shared() if shared is None else shared
        self._share = 1.0
        """Share of the texts that have drafted tokens in a step with drafts."""
        self.plain = 0.0
        """Seconds of a step with one token; 0 until known."""
        self._steps = 0
        self._idle, self._patience = 0, PATIENCE
        """Steps without a draft since the last one, and their limit."""
        self._drafted = 0
        """Steps with drafts since the last one without."""
        self._longest = 1
        """The largest number of tokens to draft so far: each measured step allows twice as many, so that a machine on
        which drafts do not pay shows it in a short one."""

    @property
    def rate(self) -> float:
        """Share of drafted tokens that are accepted."""
        return self._shared.kept / self._shared.tried

    @property
    def measured(self) -> bool:
        """Whether the time of a plain step is known."""
        return self.plain > 0

    @property
    def untried(self) -> bool:
        """Whether only guesses say what checking drafts takes."""
        return self.measure and not self.cost.measured

    @property
    def pause(self) -> int:
        """Steps until drafting is tried again; at least 1."""
        left = self._patience - self._idle
        return left if left > 0 else self._patience  # a trial was due, and the text is too short for it

    def begin(self) -> None:
        """Begin another text: its first step is not typical."""
        self._steps = 0

    def next(self, left: int = 1 << 30) -> int:
        """Tokens to draft now, where at most `left` tokens are still to come."""
        self._steps += 1
        if self.measure and (self._steps <= 2 or not self.measured):
            return 0  # the first step compiles and warms up, the second one is the reference
        if self.measure and (self._drafted >= _REFERENCE or self._shared.losses.too_many(self.plain)):
            return 0
        limit = self._longest if self.measure else self.most
        length, gain = self.best()
        if gain >= WORTH:
            self._patience = PATIENCE
            if self.measure and self._steps % 8 == 0:
                length = min(self.most, length + 1)  # to learn what one more costs
            return min(limit, length)
        if self.untried:  # the guess may be wrong, and a short draft loses little
            return 1
        if self._idle >= self._patience and left > self._patience:  # to notice when a low rate has risen
            self._patience *= 2
            return min(limit, max(1, self.best(max(self.rate, EXPECTED_RATE))[0]))
        return 0

    def best(self, rate: float | None = None) -> tuple[int, float]:
        """The number of tokens that is expected to give the most tokens per second, 0 for none, and the gain."""
        rate = self.rate if rate is None else rate
        best, length, tokens, chance = 1.0, 0, 1.0, 1.0
        for k in range(1, self.most + 1):
            chance *= rate
            tokens += self._share * chance
            gain = tokens / self.cost.at(self._share * k)
            if gain > best:
                best, length = gain, k
        return length, best

    def saved(self, tokens: int) -> float:
        """Seconds that drafts are expected to save for so many tokens."""
        return tokens * self.plain * (1 - 1 / self.best()[1])

    def probed(self, drafted: int, step_seconds: float, counts: bool = True) -> None:
        """Learn what checking so many tokens takes, before any draft; the draft's time is guessed.

        Args:
            counts: whether the time is typical. Otherwise it is only a loss.
        """
        if self.measured:
            if counts:
                self.cost.add(drafted, self.guess * drafted + step_seconds / self.plain)
            self._shared.losses.add(step_seconds, step_seconds - self.plain, self.plain)

    def saw(self, drafted: int, kept: int, draft_seconds: float, step_seconds: float, steps: int = 1) -> None:
        """Learn from a step of one text and its times, or from several steps without drafts."""
        self.saw_texts([(drafted, kept)], draft_seconds, step_seconds, steps, (kept + steps) * self.plain)

    def saw_texts(
        self,
        drafts: Sequence[tuple[int, int]],
        draft_seconds: float,
        step_seconds: float,
        steps: int,
        plain_seconds: float,
    ) -> None:
        """Learn from a step of several texts and its times, or from several steps without drafts.

        Args:
            drafts: for each text how many tokens were drafted and how many of these were kept.
            draft_seconds: of drafting.
            step_seconds: of all steps of the model.
            steps: of the model; 1 with drafts.
            plain_seconds: that plain decoding is expected to take for what is complete now and was not before.
        """
        # Each accepted token counts as a success; a rejection counts as one failure.
        shared = self._shared
        for drafted, kept in drafts:
            for outcome in [1.0] * kept + [0.0] * (kept < drafted):
                shared.kept, shared.tried = _MEMORY * shared.kept + outcome, _MEMORY * shared.tried + 1
        longest = max(drafted for drafted, _ in drafts)
        idle, self._idle = self._idle, 0 if longest else self._idle + steps
        self._drafted = self._drafted + 1 if longest else 0
        if longest:
            self._share += 0.2 * (sum(drafted > 0 for drafted, _ in drafts) / len(drafts) - self._share)
        if not self.measure or self._steps < 2:
            return
        seconds = draft_seconds + step_seconds
        if self.measured:
            # Without drafts nothing is lost, but texts that were ahead may have made the step a smaller one.
            taken = seconds if longest else steps * self.plain
            shared.losses.add(seconds, taken - plain_seconds, self.plain)
        if not longest:
            each = step_seconds / steps
            self.plain = 0.8 * self.plain + 0.2 * min(each, 3 * self.plain) if self.measured else each
        elif self.measured and idle < self.most:  # after a longer pause a draft first has a prefill
            self.cost.add(sum(drafted for drafted, _ in drafts) / len(drafts), seconds / self.plain)
            self._longest = max(self._longest, min(self.most, 2 * longest))


class DraftLengths:
    """The rules of a draft's length for each number of texts that are decoded together.

    The share of tokens that are accepted and the limit on what drafting may lose are common to all of them.

    Args:
        cost: as of `DraftLength`.
        kind: of the rules.
    """

    def __init__(self, cost: float, kind: type[DraftLength] = DraftLength) -> None:
        self._cost, self._kind = cost, kind
        self._shared = _Shared()
        self._rules: dict[int, DraftLength] = {}

    def begin(self) -> None:
        """Begin another request: its first step is not typical."""
        for rule in self._rules.values():
            rule.begin()

    def of(self, texts: int, most: int) -> DraftLength:
        """The rule for so many texts, with at most so many tokens (1 or more) drafted for each."""
        if texts not in self._rules:
            self._rules[texts] = self._kind(self._cost, most, texts=texts, shared=self._shared)
        self._rules[texts].most = most
        return self._rules[texts]

    def plain_seconds(self, texts: Sequence[int]) -> float:
        """The expected seconds of steps without drafts of so many texts each; 0 where nothing was measured.

        Of a number of texts that was not measured, it is that between the next ones.
        """
        known = sorted((count, rule.plain) for count, rule in self._rules.items() if rule.measured)
        if not known:
            return 0.0
        counts, seconds = zip(*known, strict=True)
        return float(np.interp(texts, counts, seconds).sum())
