"""How many tokens to draft: what maximizes tokens per second, from what was kept and from measured times.

Without a gain nothing is drafted, and drafting is tried again less and less often. Estimates may be wrong, so what
drafting has in fact cost is counted too: it stops where it has lost more than a small share of the time of decoding.
"""

from __future__ import annotations

MOST_DRAFTED = 7
"""Tokens drafted at a time. With an acceptance rate of 0.9 each further one adds less than half a token to a step."""
VERIFY = 0.25
"""A first guess of the share of a step's time that a drafted token adds to it."""
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
    """Time of a drafted step over that of a plain one, for each number of drafted tokens.

    Where it was not measured, it is a linear function of the number, fitted to recent measurements and, with a small
    weight, to a guess, so that it always has a slope.
    """

    def __init__(self, cost: float, most: int) -> None:
        guess = [self._terms(k, 1 + (cost + VERIFY) * k) for k in (1, max(2, most))]
        self._guess = [sum(terms) for terms in zip(*guess, strict=True)]
        self._seen = [0.0] * 5
        self._of: dict[int, tuple[float, float]] = {}
        """For a number of tokens: the weight of its measurements, and their weighted sum."""

    @staticmethod
    def _terms(k: int, time: float) -> tuple[float, ...]:
        return 1, k, k * k, time, k * time

    def add(self, k: int, time: float) -> None:
        """Record the time of a step with k drafted tokens."""
        if k in self._of:
            time = min(time, 3 * self.at(k))  # another program may have taken the cores
        pairs = zip(self._seen, self._terms(k, time), strict=True)
        self._seen = [0.9 * old + new for old, new in pairs]
        weight, total = self._of.get(k, (0.0, 0.0))
        self._of[k] = 0.8 * weight + 1, 0.8 * total + time

    def at(self, k: int) -> float:
        """The expected time of a step with k drafted tokens."""
        n, x, xx, y, xy = (seen + 0.02 * guess for seen, guess in zip(self._seen, self._guess, strict=True))
        slope = (n * xy - x * y) / (n * xx - x * x)
        line = max(0.9, (y - slope * x) / n + slope * k)
        weight, total = self._of.get(k, (0.0, 0.0))
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


class DraftLength:
    """How many tokens to draft for the most tokens per second (Leviathan et al. 2023, 3.1).

    With k drafted tokens, each accepted with probability `rate`, a step gives 1 + rate + ... + rate^k tokens. `rate`
    follows recent acceptances. So does the time of a step, but only where the text cannot depend on it, because a seed
    must give one text.

    Args:
        cost: seconds for a drafted token over seconds for a step of the model; a first guess.
        most: the largest number of drafted tokens.
        measure: whether times count.
    """

    def __init__(self, cost: float, most: int = MOST_DRAFTED, measure: bool = True) -> None:
        self.cost, self.most, self.measure = _Cost(cost, most), most, measure
        self.guess = cost
        self._kept, self._tried = EXPECTED_RATE * _PRIOR, _PRIOR
        self.plain = 0.0
        """Seconds of a step with one token; 0 until known."""
        self._steps = 0
        self._idle, self._patience = 0, PATIENCE
        """Steps without a draft since the last one, and their limit."""
        self._drafted = 0
        """Steps with drafts since the last one without."""
        self._losses = _Losses()
        self._longest = 1
        """The largest number of tokens to draft so far: each measured step allows twice as many, so that a machine on
        which drafts do not pay shows it in a short one."""

    @property
    def rate(self) -> float:
        """Share of drafted tokens that are accepted."""
        return self._kept / self._tried

    @property
    def measured(self) -> bool:
        """Whether the time of a plain step is known."""
        return self.plain > 0

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
        if self.measure and (self._drafted >= _REFERENCE or self._losses.too_many(self.plain)):
            return 0
        limit = self._longest if self.measure else self.most
        length, gain = self.best()
        if gain >= WORTH:
            self._patience = PATIENCE
            if self.measure and self._steps % 8 == 0:
                length = min(self.most, length + 1)  # to learn what one more costs
            return min(limit, length)
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
            tokens += chance
            gain = tokens / self.cost.at(k)
            if gain > best:
                best, length = gain, k
        return length, best

    def saved(self, tokens: int) -> float:
        """Seconds that drafts are expected to save for so many tokens."""
        return tokens * self.plain * (1 - 1 / self.best()[1])

    def probed(self, drafted: int, step_seconds: float) -> None:
        """Learn what checking so many tokens takes, before any draft; the draft's time is guessed."""
        if self.measured:
            self.cost.add(drafted, self.guess * drafted + step_seconds / self.plain)
            self._losses.add(step_seconds, step_seconds - self.plain, self.plain)

    def saw(self, drafted: int, kept: int, draft_seconds: float, step_seconds: float, steps: int = 1) -> None:
        """Learn from a step and its times, or from several steps without drafts."""
        # Each accepted token counts as a success; a rejection counts as one failure.
        for outcome in [1.0] * kept + [0.0] * (kept < drafted):
            self._kept, self._tried = _MEMORY * self._kept + outcome, _MEMORY * self._tried + 1
        idle, self._idle = self._idle, 0 if drafted else self._idle + steps
        self._drafted = self._drafted + 1 if drafted else 0
        if not self.measure or self._steps < 2:
            return
        seconds = draft_seconds + step_seconds
        if self.measured:
            lost = seconds - (kept + 1) * self.plain if drafted else 0.0
            self._losses.add(seconds, lost, self.plain)
        if drafted == 0:
            each = step_seconds / steps
            self.plain = 0.8 * self.plain + 0.2 * min(each, 3 * self.plain) if self.measured else each
        elif self.measured and idle < self.most:  # after a longer pause a draft first has a prefill
            self.cost.add(drafted, seconds / self.plain)
            self._longest = max(self._longest, min(self.most, 2 * drafted))
