"""The routes over HTTP, asked by the openai client, by httpx, and by sockets."""

from __future__ import annotations

import json
import math
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("starlette", reason="pip install 'minitron[serve]'")
pytest.importorskip("llguidance", reason="pip install 'minitron[serve]'")
openai = pytest.importorskip("openai", reason="pip install 'minitron[serve]'")
httpx = pytest.importorskip("httpx", reason="pip install 'minitron[serve]'")

from live_server import keys_file, live_server  # noqa: E402
from model_samples import build  # noqa: E402

from minitron.assets import bundled_model  # noqa: E402
from minitron.loading import load  # noqa: E402
from minitron.serve.settings import ServeSettings  # noqa: E402
from minitron.tokenizer import load_tokenizer  # noqa: E402

MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]
GREEDY = {"model": "half", "temperature": 0}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = load_tokenizer(bundled_model("half"))
    labels = {0: "fine", 1: "spam", 2: "other"}
    model = build("NemotronForSequenceClassification", vocab_size=4096, num_labels=3, id2label=labels, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(classifier):
    settings = ServeSettings(("half=bundled-half", f"judge={classifier}"), slots=4, max_waiting=4)
    with live_server(settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


def post(web, path: str, **body):
    return web.post(path, json=body)


def events(response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_greedy_completion_is_that_of_generate(client) -> None:
    loaded = load("bundled-half")
    ids = loaded.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    out = loaded.model.generate(ids, max_new_tokens=24, do_sample=False, engine="off")
    found = client.completions.create(prompt="Once upon a time", max_tokens=24, **GREEDY)
    assert found.choices[0].text == loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (ids.shape[1], 24)


def test_a_stream_adds_up_to_the_whole(web) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "seed": 5, "model": "half", "temperature": 1, "n": 2}
    whole = post(web, "/v1/chat/completions", **body).json()
    streamed = post(web, "/v1/chat/completions", **body, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(streamed)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    assert chunks[-1]["choices"] == []
    usages = [{**usage, "prompt_tokens_details": None} for usage in (chunks[-1]["usage"], whole["usage"])]
    assert usages[0] == usages[1]
    texts, ends = ["", ""], [[], []]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        if choice["finish_reason"]:
            assert choice["delta"] == {}  # the last frame has no content
            ends[choice["index"]].append(choice["finish_reason"])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [[choice["finish_reason"]] for choice in whole["choices"]]
    assert texts[0] != texts[1]


def test_stop_strings_end_the_text_and_do_not_appear(client) -> None:
    whole = client.completions.create(prompt="The old man", max_tokens=30, **GREEDY).choices[0].text
    stop = whole[9:12]
    for stream in (False, True):
        found = client.completions.create(
            prompt="The old man", max_tokens=30, stop=["@@", stop], stream=stream, **GREEDY
        )
        choices = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client) -> None:
    loaded = load("bundled-half")
    found = client.chat.completions.create(messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY)
    content = found.choices[0].logprobs.content
    prompt = loaded.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([list(prompt)])).logits[0, -1].double().log_softmax(-1)
    best = logits.topk(3)
    assert [top.logprob for top in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=0.05)
    assert content[0].top_logprobs[0].token == content[0].token
    assert b"".join(bytes(one.bytes) for one in content).decode() == found.choices[0].message.content
    assert all(math.isfinite(one.logprob) for one in content)


def test_an_echo_with_logprobs_scores_the_prompt(client) -> None:
    found = client.completions.create(prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1, **GREEDY)
    logprobs = found.choices[0].logprobs
    assert found.choices[0].text == "Once upon a time"
    assert "".join(logprobs.tokens).removeprefix("<s>") == "Once upon a time"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert found.usage.completion_tokens == 0


def test_a_seed_repeats_an_answer_beside_others(client) -> None:
    def ask(results, index, seed) -> None:
        found = client.completions.create(model="half", prompt="A dog", max_tokens=25, temperature=1.2, seed=seed)
        results[index] = found.choices[0].text

    alone: dict[int, str] = {}
    for seed in range(4):
        ask(alone, seed, seed)
    together: dict[int, str] = {}
    threads = [threading.Thread(target=ask, args=(together, index, index % 4)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(8)] == [alone[index % 4] for index in range(8)]
    assert len(set(alone.values())) == 4


def test_a_second_turn_is_read_from_the_cache(client) -> None:
    messages = [{"role": "user", "content": "The fox and the crow met in a wood. " * 12}]
    first = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
    messages += [first.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens // 32 * 32 > 0
    again = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
    assert again.choices[0].message.content == second.choices[0].message.content


def test_the_same_prompt_again_gets_the_same_answer_from_the_cache(client) -> None:
    prompt = "The crow saw a cheese and the fox saw the crow. " * 9
    found = [client.completions.create(prompt=prompt, max_tokens=9, **GREEDY) for _ in range(3)]
    assert len({one.choices[0].text for one in found}) == 1
    assert found[0].choices[0].text
    assert found[1].usage.prompt_tokens_details.cached_tokens >= found[0].usage.prompt_tokens // 32 * 32 - 32 > 0


def test_a_full_prefix_cache_holds_nobody_up() -> None:
    """A cache of one chunk or so, and more requests than slots that all want to be in it."""
    settings = ServeSettings(("half=bundled-half",), slots=2, prefix_cache=200_000)
    with live_server(settings) as found, openai.OpenAI(base_url=f"{found.url}/v1", api_key="none") as client:
        prompts = ["The fox met a boy. " * (5 + index % 3) + str(index % 4) for index in range(12)]
        answers: dict[int, str] = {}

        def ask(index: int) -> None:
            answer = client.completions.create(prompt=prompts[index], max_tokens=4, **GREEDY)
            answers[index] = answer.choices[0].text

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        [model] = found.context.served.writing
        cache = model.scheduler.cache
        assert 0 < cache.nbytes <= cache.limit
        assert len(answers) == 12
        for index in range(12):
            before = answers[index]
            ask(index)
            assert answers[index] == before


def test_responses(client) -> None:
    found = client.responses.create(
        model="half", input="A story", instructions="Be short.", max_output_tokens=9, temperature=0
    )
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "A story"}]
    chat = client.chat.completions.create(messages=messages, max_tokens=9, **GREEDY)
    assert found.output_text == chat.choices[0].message.content
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    stream = client.responses.create(
        model="half", input="A story", instructions="Be short.", max_output_tokens=9, temperature=0, stream=True
    )
    kinds = [(event.type, event.sequence_number, getattr(event, "delta", "")) for event in stream]
    assert "".join(delta for _, _, delta in kinds) == found.output_text
    assert [number for _, number, _ in kinds] == list(range(len(kinds)))
    assert kinds[-1][0] == "response.incomplete"


def test_only_the_last_event_of_a_response_has_usage(web) -> None:
    """The description of OpenAI's API does not allow null."""
    body = {"model": "half", "input": "A story", "max_output_tokens": 3, "stream": True}
    found = [json.loads(event) for event in events(post(web, "/v1/responses", **body)) if event != "[DONE]"]
    with_response = {event["type"]: event["response"] for event in found if "response" in event}
    assert list(with_response) == ["response.created", "response.in_progress", "response.incomplete"]
    assert ["usage" in response for response in with_response.values()] == [False, False, True]
    assert with_response["response.incomplete"]["usage"]["output_tokens"] == 3


def test_system_messages_at_the_beginning_are_one_for_a_template_that_takes_one(web) -> None:
    """The template of the bundled model does."""
    several = [{"role": "system", "content": text} for text in ("Be short.", "Be kind.")]
    one = {"role": "system", "content": "Be short.\n\nBe kind."}
    bodies = ([*several, *MESSAGES], [one, *MESSAGES])
    found = [post(web, "/tokenize", model="half", messages=messages) for messages in bodies]
    assert [answer.status_code for answer in found] == [200, 200]
    assert found[0].json()["tokens"] == found[1].json()["tokens"]


# --- structure -------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["fox", "crow"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {"name": "nothing", "parameters": {"type": "object", "additionalProperties": False}},
    },
]


def test_a_schema_is_followed(client) -> None:
    from jsonschema import validate

    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    for seed in range(5):
        found = client.chat.completions.create(
            model="half", messages=MESSAGES, max_tokens=80, seed=seed, temperature=1, response_format=form
        )
        assert found.choices[0].finish_reason == "stop"
        validate(json.loads(found.choices[0].message.content), SCHEMA)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_forced_call_has_valid_arguments_streamed_or_not(client, choice) -> None:
    from jsonschema import validate

    body = {"model": "half", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 3, "temperature": 1}
    found = client.chat.completions.create(**body, parallel_tool_calls=False).choices[0]
    assert found.finish_reason == "tool_calls"
    [call] = found.message.tool_calls
    assert found.message.content is None
    if call.function.name == "look_up":
        validate(json.loads(call.function.arguments), SCHEMA)
    chunks = [
        chunk.choices[0] for chunk in client.chat.completions.create(**body, parallel_tool_calls=False, stream=True)
    ]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert parts[0].function.name == call.function.name
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert len(parts) > 3
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_call_and_its_result_go_back(client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{not json"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "a fox"}]},
    ]
    found = client.chat.completions.create(messages=messages, tools=TOOLS, max_tokens=4, **GREEDY)
    assert found.choices[0].finish_reason in ("length", "stop")


def test_no_tools_is_as_if_tools_were_not_named(client) -> None:
    bodies = ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"})
    found = [client.chat.completions.create(messages=MESSAGES, max_tokens=8, **GREEDY, **body) for body in bodies]
    assert len({(one.choices[0].message.content, one.usage.prompt_tokens) for one in found}) == 1


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "https://example.org/x"}}}, "schema"),
        ({"type": "nonsense"}, "schema"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?<=a)b"}, "schema"),
        ({"enum": ["x" * 70_000]}, "bytes"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_in_bounded_time(web, schema, word) -> None:
    start = time.monotonic()
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    found = post(web, "/v1/chat/completions", model="half", messages=MESSAGES, response_format=form)
    assert found.status_code == 400, found.text
    assert word in found.json()["error"]["message"]
    assert time.monotonic() - start < 20
    assert post(web, "/v1/completions", prompt="a", max_tokens=1, **GREEDY).status_code == 200


# --- vectors, labels, tokens -----------------------------------------------------------------------------------------


def test_embeddings_do_not_depend_on_company_and_are_of_length_one(client) -> None:
    texts = ["a fox", "a very long text about a crow and a fox", "x"]
    together = client.embeddings.create(model="half", input=texts, encoding_format="float")
    alone = [client.embeddings.create(model="half", input=[text], encoding_format="float").data[0] for text in texts]
    assert [one.embedding for one in together.data] == [one.embedding for one in alone]
    assert sum(x * x for x in together.data[0].embedding) == pytest.approx(1)
    packed = client.embeddings.create(model="half", input=texts[0])  # base64
    assert packed.data[0].embedding == pytest.approx(together.data[0].embedding, abs=1e-6)


def test_labels_are_those_of_the_head(web, classifier) -> None:
    from minitron.heads import NemotronForSequenceClassification

    texts = ["a fox", "buy now, a very good offer"]
    found = post(web, "/classify", model="judge", input=texts).json()
    model = NemotronForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = load_tokenizer(classifier)
    for text, one in zip(texts, found["data"], strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert one["probs"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert one["label"] == ["fine", "spam", "other"][int(expected.argmax())]
    pair = post(web, "/classify", model="judge", input=["a fox"], pair=["a crow"]).json()["data"][0]
    with torch.inference_mode():
        expected = model(**tokenizer("a fox", "a crow", return_tensors="pt")).logits[0].softmax(-1)
    assert pair["probs"] == pytest.approx(expected.tolist(), abs=1e-6)
    for wrong, words in (
        ({"pair": "a crow"}, "pair must be one text where input is one"),
        ({"pair": ["a", "b", "c"]}, "as many texts where it is a list"),
        ({"calibrated": True}, "label_temperature is None"),
        ({"question": "why?"}, "takes no question"),
    ):
        refused = post(web, "/classify", model="judge", input=texts, **wrong)
        assert (refused.status_code, words in refused.text) == (400, True), refused.text
    assert post(web, "/v1/classify", model="half", input="x").status_code == 400
    assert post(web, "/v1/completions", model="judge", prompt="x").status_code == 400


def test_tokens_there_and_back(web) -> None:
    ids = post(web, "/tokenize", prompt="Once upon a time").json()["tokens"]
    assert ids == load_tokenizer(bundled_model("half"))("Once upon a time")["input_ids"]
    assert post(web, "/detokenize", tokens=ids[1:]).json()["prompt"] == "Once upon a time"


# --- bad input -------------------------------------------------------------------------------------------------------

CHAT = {"model": "half", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[1]", 400, "JSON object"),
        (b'{"model": "half", "messages": [{"role": "user", "content": "\xff"}]}', 400, "not UTF-8: byte 0xff"),
        (b'{"model": "half", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
        (json.dumps({**CHAT, "temperature": float("nan")}).encode(), 400, "NaN"),
        (b"[" * 100_000, 400, "deep"),
        (json.dumps(CHAT).encode().replace(b'"half"', b"9" * 5000), 400, ""),
        (json.dumps({**CHAT, "max_tokens": -1}).encode(), 400, "max_tokens is -1"),
        (json.dumps({**CHAT, "n": 10**9}).encode(), 400, "n is 1000000000"),
        (json.dumps({**CHAT, "max_tokens": 10**6}).encode(), 400, "This model's maximum context length is"),
        (json.dumps({**CHAT, "stop": ["x"] * 99}).encode(), 400, "stop"),
        (json.dumps({**CHAT, "nonsense": 1}).encode(), 400, "unknown field 'nonsense'"),
        (json.dumps({**CHAT, "store": True}).encode(), 400, "store is not supported"),
        (json.dumps({**CHAT, "model": "other"}).encode(), 404, "models here are half, judge"),
        (json.dumps({**CHAT, "messages": [{"role": "user", "content": "x " * 5000}]}).encode(), 400, "context"),
        (json.dumps({**CHAT, "messages": [*MESSAGES, {"role": "system", "content": "x"}]}).encode(), 400, "system"),
        (json.dumps({**CHAT, "user": "x" * (5 << 20)}).encode(), 413, "bytes"),
    ],
)
def test_bad_bodies_get_an_error_object(web, body, status, words) -> None:
    found = web.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "Traceback" not in found.text


def test_unknown_routes_methods_and_content_types(web) -> None:
    for found, status in (
        (web.get("/v1/nothing"), 404),
        (web.get("/v1/chat/completions"), 405),
        (web.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"}), 415),
        (web.get("/v1/models/other"), 404),
    ):
        assert found.status_code == status
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_full_queue_is_refused_with_retry_after(server, web) -> None:
    """Four slots and four waiting: sixteen choices do not fit."""
    found = post(web, "/v1/completions", model="half", prompt="a", max_tokens=5, n=16)
    assert found.status_code == 429
    assert int(found.headers["retry-after"]) > 0
    assert found.json()["error"]["code"] == "queue_full"


# --- clients that leave ----------------------------------------------------------------------------------------------


def send(server, body: dict, path: str = "/v1/completions") -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_generation_ends_when_the_client_leaves(server, stream) -> None:
    scheduler = next(iter(server.context.served.writing)).scheduler
    prompt = " ".join(str(number) for number in range(90))
    body = {"model": "half", "prompt": prompt, "stream": stream, "ignore_eos": True, "logprobs": 5, "max_tokens": 250}
    connections = [send(server, body) for _ in range(6)]
    deadline = time.monotonic() + 20
    while scheduler.num_running < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert scheduler.num_running == 4
    for connection in connections:
        connection.close()
    while scheduler.num_running + scheduler.num_waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    assert scheduler.num_running + scheduler.num_waiting == 0
    aborted = server.context.metrics.text(server.context.served.writing).decode()
    assert 'finished_reason="abort"' in aborted


# --- operation -------------------------------------------------------------------------------------------------------


def test_metrics_name_the_engine(web) -> None:
    text = web.get("/metrics").text
    assert 'minitron:engine_info{engine="cpu",model_name="half",reason=""} 1.0' in text
    for name in ("vllm:generation_tokens_total", "vllm:num_requests_running", "vllm:prefix_cache_hits_total"):
        assert f'{name}{{model_name="half"}}' in text


def test_keys_are_asked_for_on_every_route_but_two(server, tmp_path) -> None:
    models = list(server.context.served)
    settings = ServeSettings(("half",), api_keys=keys_file(tmp_path, "first", "second"))
    with live_server(settings, models[1:]) as found, httpx.Client(base_url=found.url) as web:
        for path in ("/v1/models", "/metrics", "/tokenize", "/v1/nothing"):
            assert web.get(path).status_code == 401
            assert web.get(path, headers={"authorization": "Bearer third"}).status_code == 401
        assert web.get("/v1/models", headers={"authorization": "Bearer second"}).status_code == 200
        assert web.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert [web.get(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_no_other_origin_may_call_by_default(web) -> None:
    found = web.get("/v1/models", headers={"origin": "https://example.org"})
    assert "access-control-allow-origin" not in found.headers
