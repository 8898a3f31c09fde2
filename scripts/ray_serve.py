"""Serve the bundled half model with two replicas on this machine through Ray Serve, and check what they answer.

    python scripts/ray_serve.py        needs pip install 'minitron[serve]' 'ray[serve]'; about a minute

It starts a cluster, or uses the one that RAY_ADDRESS names.

Answers through the cluster must be those of a replica alone, conversations that begin the same must reach one replica
and find their prefix in its cache, and different ones must reach both.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
import time
import urllib.request

import ray
from ray import serve

from minitron.serve.ray import deployment
from minitron.serve.settings import ServeSettings

SETTINGS = ServeSettings(("half=bundled-half",), slots=4, max_context=384, threads=1)
PORT = 8765


def ask(path: str, body: dict[str, object] | None = None) -> bytes:
    """The response of the cluster."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read()


def chat(topic: int, turn: int) -> dict[str, object]:
    """A request of one of some conversations."""
    system = f"Tale {topic}. " + "Once upon a time there was a little fox who lived in a wood. " * 6
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Tell it."}]
    messages += [{"role": "user", "content": f"And then? {turn}"}] * (turn > 0)
    return {"model": "half", "messages": messages, "max_tokens": 12, "temperature": 0}


def main() -> int:
    """Run the checks; 0 if all passed."""
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(deployment(SETTINGS, least=2, most=2))
    requests = [chat(topic, turn) for turn in range(3) for topic in range(6)]
    found = [json.loads(ask("/v1/chat/completions", request)) for request in requests[:6]]
    time.sleep(5)  # Ray tells its routers every few seconds which replica knows which prefix
    found += [json.loads(ask("/v1/chat/completions", request)) for request in requests[6:]]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        again = [json.loads(answer) for answer in pool.map(lambda one: ask("/v1/chat/completions", one), requests)]
    same = all(a["choices"] == b["choices"] for a, b in zip(found, again, strict=True))
    stream = ask("/v1/chat/completions", {**requests[0], "stream": True})
    later = sum(count > 0 for count in cached[6:])
    print(f"{len(requests)} answers, one after the other and eight at a time: {'equal' if same else 'DIFFERENT'}")
    print(f"later turns that found their conversation in a replica's cache: {later} of {len(requests) - 6}")
    whole = stream.rstrip().endswith(b"[DONE]")
    print(f"a stream of {stream.count(b'data: ')} events {'ends' if whole else 'DOES NOT END'} with [DONE]")
    replicas = serve.status().applications["default"].deployments["replica"].replica_states
    print(f"replicas: {dict(replicas)}")
    serve.shutdown()
    ray.shutdown()
    return 0 if same and later >= 6 and whole else 1


if __name__ == "__main__":
    sys.exit(main())
