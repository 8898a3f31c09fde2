"""OpenAI's own description of its API, restricted to the routes of the server at MINITRON_URL: schemathesis sends
requests that the description allows and such as it does not; every answer must be as described, and none a 5xx.

Added to the description: an answer 4XX with the error object, event streams for /completions, the model's name, and
embeddings as a string, which `encoding_format: base64` asks for and the description lacks. Of event streams
schemathesis checks the envelope, and `test_every_event_is_as_described` what is in it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

URL = f"{os.environ['MINITRON_URL']}/v1"
EXAMPLES = os.environ.get("MINITRON_EXAMPLES", "200")
DATA = Path(os.environ.get("MINITRON_DATA", Path(__file__).parents[3] / "shared" / "datasets"))
FILE = DATA / "openai_api" / "openapi.yaml.gz"
ROUTES = {
    "/chat/completions": "post",
    "/completions": "post",
    "/embeddings": "post",
    "/responses": "post",
    "/models": "get",
    "/models/{model}": "get",
}
MODEL = {"type": "string", "enum": ["scripted"]}
NOT_SERVED = {
    "CreateChatCompletionRequest": (
        "audio function_call functions modalities moderation prediction prompt_cache_options reasoning_effort "
        "service_tier store verbosity web_search_options"
    ),
    "CreateCompletionRequest": "best_of suffix",
    "CreateEmbeddingRequest": "dimensions",
    "CreateModelResponseProperties": "prompt_cache_options top_logprobs",
    "ModelResponseProperties": "top_logprobs",
    "ResponseProperties": "background max_tool_calls previous_response_id prompt tools tool_choice",
    "CreateResponse": (
        "context_management conversation include moderation reasoning service_tier store stream_options truncation"
    ),
}
"""Fields of requests that the server refuses by name; requests without them are answered more often."""

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no data sets in {DATA}")


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    with gzip.open(FILE) as file:
        return yaml.load(file, Loader=yaml.CSafeLoader)


def restricted(description: dict[str, Any], every_field: bool) -> dict[str, Any]:
    """The description of the routes that are served; of requests with every field, or with those that are served."""
    found = json.loads(json.dumps(description, default=str))
    found["paths"] = {path: {method: found["paths"][path][method]} for path, method in ROUTES.items()}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for path, method in ROUTES.items():
        found["paths"][path][method]["responses"]["4XX"] = {"description": "wrong", "content": error}
    for path in ("/chat/completions", "/completions", "/responses"):
        content = found["paths"][path]["post"]["responses"]["200"]["content"]
        content["text/event-stream"] = {"schema": {}}  # see `test_every_event_is_as_described`
    found["paths"]["/models/{model}"]["get"]["parameters"][0]["schema"] = MODEL
    for name, fields in NOT_SERVED.items():
        schema = found["components"]["schemas"][name]
        for part in schema.get("allOf", [schema]):
            properties = part.get("properties", {})
            if "model" in properties:
                properties["model"] = MODEL
            for field in () if every_field else fields.split():
                properties.pop(field, None)
    embedding = found["components"]["schemas"]["Embedding"]["properties"]
    embedding["embedding"] = {"anyOf": [embedding["embedding"], {"type": "string", "format": "byte"}]}
    found.pop("security", None)
    return found


@pytest.mark.parametrize("every_field", [False, True])
def test_every_answer_is_as_described(description, every_field, tmp_path) -> None:
    file, report = tmp_path / "openapi.json", tmp_path / "report.ndjson"
    file.write_text(json.dumps(restricted(description, every_field)))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file), "--url", URL, "--checks", checks]
    command += ["--max-examples", EXAMPLES, "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    command += ["--suppress-health-check", "all", "--report-ndjson-path", str(report), "--generation-database", "none"]
    done = subprocess.run(
        [*command, "--continue-on-failure"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # it keeps a cache where it runs
    statuses = Counter(re.findall(r'"status_code": ?(\d+)', report.read_text()))
    print(f"schemathesis, every_field={every_field}: {dict(sorted(statuses.items()))}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert statuses["200"] > 20
    assert not any(status.startswith("5") for status in statuses)


def with_null(schema: Any) -> Any:
    """A schema whose `nullable: true`, which OpenAPI 3.1 lacks and this description uses, is said in words of 3.1."""
    if isinstance(schema, list):
        return [with_null(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: with_null(part) for name, part in schema.items() if not (name == "nullable" and part is True)}
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") is True else made


TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"first": {"type": "integer"}}}}


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        ("/chat/completions", {"logprobs": True, "top_logprobs": 2, "n": 2}, "CreateChatCompletionStreamResponse"),
        (
            "/chat/completions",
            {"tools": [{"type": "function", "function": TOOL}]},
            "CreateChatCompletionStreamResponse",
        ),
        ("/responses", {}, "ResponseStreamEvent"),
        ("/responses", {"tools": [{"type": "function", **TOOL}]}, "ResponseStreamEvent"),
        ("/responses", {"max_output_tokens": 2}, "ResponseStreamEvent"),
    ],
)
def test_every_event_is_as_described(description, path, body, schema) -> None:
    said = [{"role": "user", "content": "Add 31 and 11"}]
    asked = {"messages": said, "stream_options": {"include_usage": True}} if "chat" in path else {"input": said}
    answer = httpx.post(URL + path, json={"model": "scripted", "stream": True, **asked, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    wanted = {"$ref": f"#/components/schemas/{schema}", "components": with_null(description["components"])}
    check = jsonschema.Draft202012Validator(wanted)
    assert len(events) > 3
    for event in events:
        errors = [error.message for error in check.iter_errors(json.loads(event))]
        assert errors == [], (event, errors)
