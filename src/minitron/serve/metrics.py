"""What the server counts, for Prometheus. Names are vLLM's where they mean the same, so that its dashboards work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .scheduler import TextSequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of_model = {"labelnames": ["model_name"], "registry": self.registry}
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens of finished requests.", **of_model)
        self._generated = Counter("vllm:generation_tokens", "Tokens that were generated.", **of_model)
        self._success = Counter(
            "vllm:request_success",
            "Answers by the reason for which they ended.",
            labelnames=["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._first = Histogram(
            "vllm:time_to_first_token_seconds", "From a request to its first token.", buckets=SECONDS, **of_model
        )
        self._whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From a request to its end.", buckets=SECONDS, **of_model
        )
        self._running = Gauge("vllm:num_requests_running", "Sequences with a slot.", **of_model)
        self._waiting = Gauge("vllm:num_requests_waiting", "Sequences that wait for a slot.", **of_model)
        self._usage = Gauge("vllm:kv_cache_usage_perc", "Share of the KV cache that is filled, 0 to 1.", **of_model)
        self._queries = Gauge("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", **of_model)
        self._hits = Gauge("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", **of_model)
        self._engine = Gauge(
            "minitron:engine_info",
            "What runs a model: cpu, reference or transformers, and why not the first.",
            labelnames=["model_name", "engine", "reason"],
            registry=self.registry,
        )
        self._judged = Counter(
            "minitron:guard_judgements",
            "Prompts and answers that a guard has judged, by what it said.",
            labelnames=["model_name", "part", "outcome"],
            registry=self.registry,
        )
        self._guard = Gauge(
            "minitron:guard_info",
            "What guards a model, what it does, and in which forward pass: the model's (shared) or its own (separate).",
            labelnames=["model_name", "guard", "action", "forward"],
            registry=self.registry,
        )
        self._responses = Counter(
            "minitron:http_responses", "Responses by status.", labelnames=["route", "status"], registry=self.registry
        )

    def finished(self, model: str, reason: str) -> None:
        """An answer has ended: stop, length, content_filter, abort or error."""
        self._success.labels(model, reason).inc()

    def request(self, model: str, sequences: Sequence[TextSequence], started: float, first: float) -> None:
        """A request has ended; times are those of `time.monotonic`."""
        self._prompt.labels(model).inc(len(sequences[0].prompt))
        self._generated.labels(model).inc(sum(len(one.tokens) for one in sequences))
        if first:
            self._first.labels(model).observe(first - started)
        self._whole.labels(model).observe(time.monotonic() - started)

    def judged(self, model: str, part: str, outcome: str) -> None:
        """A guard has judged a "prompt" or an "answer": passed, or refused, flagged or counted."""
        self._judged.labels(model, part, outcome).inc()

    def response(self, route: str, status: int) -> None:
        """A response has begun."""
        self._responses.labels(route, str(status)).inc()

    def text(self, models: Iterable[Any]) -> bytes:
        """The page that Prometheus reads, for `served.ServedModel`s."""
        for model in models:
            scheduler = model.scheduler
            lengths = scheduler.engine.kv.lengths
            self._running.labels(model.name).set(scheduler.num_running)
            self._waiting.labels(model.name).set(scheduler.num_waiting)
            self._usage.labels(model.name).set(sum(lengths) / max(1, model.context * len(lengths)))
            self._queries.labels(model.name).set(scheduler.prefix_queries)
            self._hits.labels(model.name).set(scheduler.prefix_hits)
            self._engine.labels(model.name, model.engine_name, model.reason).set(1)
            if scheduler.guard is not None:
                forward = "shared" if scheduler.guard.shared else "separate"
                self._guard.labels(model.name, scheduler.guard.name, scheduler.guard.action, forward).set(1)
        return generate_latest(self.registry)
