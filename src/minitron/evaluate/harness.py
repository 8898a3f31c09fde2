"""The adapter for lm-evaluation-harness: its requests, answered by `loglikelihoods` and by the engine's `generate`.

The model gets exactly what the harness's own Hugging Face backend would give it: the same tokens of context and
continuation, the same truncation from the left, the same windows, stop strings and end token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from ..templates import render_conversation
from .answers import Answers
from .generations import Wanted, write
from .loglikelihood import Request, loglikelihoods, was_truncated
from .quick import prefix_token

_TEXTS_PER_CALL = 4096

Progress = Callable[[int, int], None]
"""Called with (answered, all): the number of answered requests and of all requests."""


class MinitronLM(TemplateLM):
    """A model of this package behind lm-evaluation-harness's interface.

    Args:
        model, tokenizer: as from `minitron.load`.
        answers: the cache of answers; in memory if None.
        versions: version and settings of each task, part of an answer's key.
        progress: called as requests are answered.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        answers: Answers | None = None,
        versions: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer: PreTrainedTokenizerBase = tokenizer  # type: ignore[assignment]
        self._device = model.device
        self.answers = answers or Answers(None, "unnamed")
        self.versions = versions or {}
        self.progress: Progress = progress or (lambda done, total: None)
        self.truncated: Counter[str] = Counter()
        """Number of requests, by task, whose context was truncated from the left."""
        self.shortened: Counter[str] = Counter()
        """Number of generations, by task, for which the model's context has less room than the task allows."""

    @property
    def eot_token_id(self) -> int:
        """The end of a text; what stands before one where the tokenizer has no bos."""
        end = self.tokenizer.eos_token_id
        return prefix_token(self.tokenizer) if end is None else int(end)  # type: ignore[arg-type]

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        return prefix_token(self.tokenizer)

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of chat prompts."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return render_conversation(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- tokens --------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens unless the text begins with one."""
        return self._encode([string], add_special_tokens)[0]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Ids of many texts, each as `tok_encode` gives them."""
        start: Any = self.tokenizer.decode([self.prefix_token_id])
        found: dict[str, list[int]] = {}
        for has_start in (False, True):
            group = [text for text in dict.fromkeys(texts) if text.startswith(start) == has_start]
            add = add_special_tokens if add_special_tokens is not None else (False if has_start else None)
            options: dict[str, Any] = {} if add is None else {"add_special_tokens": add}
            for at in range(0, len(group), _TEXTS_PER_CALL):
                part = group[at : at + _TEXTS_PER_CALL]
                ids = self.tokenizer(
                    part, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
                )["input_ids"]
                found.update(zip(part, ids, strict=True))  # type: ignore[arg-type]
        return [found[text] for text in texts]

    def _pairs(self, requests: Iterable[tuple[str, str]]) -> Iterator[Request]:
        """Contexts and continuations as tokens, split as `TemplateLM.loglikelihood` does.

        White space at the end of a context moves to the continuation, even if nothing else is left of the context: its
        tokens are then those of an empty text, bos in most tokenizers. If there are none, the prefix token takes their
        place, as for an empty context.
        """
        moved = []
        for context, continuation in requests:
            bare = context.rstrip()
            moved.append((context, bare, context[len(bare) :] + continuation))
        wholes = iter(self._encode([bare + rest for context, bare, rest in moved if context]))
        contexts = iter(self._encode([bare for context, bare, _ in moved if context]))
        alone = iter(self._encode([rest for context, _, rest in moved if not context], False))
        for context, _, _ in moved:
            if context:
                ids = next(contexts)
                yield Request(ids or [self.prefix_token_id], next(wholes)[len(ids) :])
                continue
            ids = next(alone)
            if ids and ids[0] == self.prefix_token_id:
                yield Request(ids[:1], ids[1:])
            else:
                yield Request([self.prefix_token_id], ids)

    # --- log-likelihoods -----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        keys = [self._key("loglikelihood", request, request.args) for request in requests]
        tokens = list(self._pairs(_pair_of(request) for request in requests))
        for request, pair in zip(requests, tokens, strict=True):
            self.truncated[request.task_name or ""] += was_truncated(pair, self.max_length)
        return [(log_prob, bool(greedy)) for log_prob, greedy in self._answer(keys, tokens)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """The same for requests that are tokens already; the harness's interface to subclasses of `TemplateLM`."""
        tokens = [Request(list(context), list(continuation)) for _, context, continuation in requests]
        keys = [self.answers.key("tokens", *pair) for pair in tokens]
        return [(log_prob, bool(greedy)) for log_prob, greedy in self._answer(keys, tokens)]

    def _answer(self, keys: list[str], tokens: list[Request]) -> list[Any]:
        found = [self.answers.get(key) for key in keys]
        open_ = [index for index, answer in enumerate(found) if answer is None]
        done = len(found) - len(open_)
        self.progress(done, len(found))
        try:
            for part in loglikelihoods(self.model, [tokens[index] for index in open_]):
                for place, answer in part:
                    index = open_[place]
                    found[index] = list(answer)
                    self.answers.put(keys[index], found[index])
                done += len(part)
                self.progress(done, len(found))
        finally:
            self.answers.commit()
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in disjoint windows of the model's context."""
        windows: list[Request] = []
        owner: list[int] = []
        for index, (ids, _) in enumerate(
            zip(self._encode([request.args[0] for request in requests]), requests, strict=True)
        ):
            pieces = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for piece in map(make_disjoint_window, pieces):
                windows.append(Request(*map(list, piece)))
                owner.append(index)
        keys = [self.answers.key("tokens", *window) for window in windows]
        totals = [0.0] * len(requests)
        for index, (log_prob, _) in zip(owner, self._answer(keys, windows), strict=True):
            totals[index] += log_prob
        return totals

    # --- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each prompt, up to a stop string."""
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            plain = self._key("generate_until", request, request.args)
            keys.append(self.answers.key(plain, seen[plain]))  # samples of one prompt differ
            seen[plain] += 1
        written: list[str | None] = [self.answers.get(key) for key in keys]
        wanted = []
        for request, prompt, key in zip(requests, self._encode([r.args[0] for r in requests]), keys, strict=True):
            settings: Any = normalize_gen_kwargs(request.args[1], 256)  # type: ignore[misc]
            wanted.append(self._wanted(prompt, dict(settings), key))
            task = request.task_name or ""
            self.shortened[task] += wanted[-1].room < settings["max_gen_toks"]
            self.truncated[task] += len(prompt) > self.max_length - wanted[-1].room
        open_ = [index for index, text in enumerate(written) if text is None]
        done = len(requests) - len(open_)
        self.progress(done, len(requests))
        try:
            for part in write(self.model, self.tokenizer, self.eot_token_id, [wanted[index] for index in open_]):
                for place, text in part:
                    index = open_[place]
                    written[index] = postprocess_generated_text(text, list(wanted[index].until), None)
                    self.answers.put(keys[index], written[index])
                done += len(part)
                self.progress(done, len(requests))
        finally:
            self.answers.commit()
        return written  # type: ignore[return-value]

    def _wanted(self, prompt: list[int], settings: dict[str, Any], key: str) -> Wanted:
        """What the harness asks for; a task that allows more tokens than the model's context gets half of it."""
        end: Any = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(settings.pop("until", None), eos=end)
        room = settings.pop("max_gen_toks")
        room = room if room < self.max_length else self.max_length // 2
        seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
        return Wanted(prompt[-(self.max_length - room) :], room, tuple(until), settings, seed)

    def _key(self, kind: str, request: Instance, args: tuple[Any, ...]) -> str:
        task = request.task_name or ""
        return self.answers.key(kind, task, self.versions.get(task), *args)


def _pair_of(request: Instance) -> tuple[str, str]:
    context, continuation = request.args  # type: ignore[misc]
    return context, continuation
