"""LangChain's own tests of chat models and embeddings, through langchain-openai, against the server at MINITRON_URL."""

from __future__ import annotations

import os
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

SERVER = {"base_url": f"{os.environ['MINITRON_URL']}/v1", "api_key": "none"}


class TestChat(ChatModelIntegrationTests):
    """Chat with what the server does: text, tools, JSON; no images, sound or documents."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**SERVER, "model": "scripted", "temperature": 0, "stream_usage": True, "max_retries": 0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "scripted-too"

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @property
    def supports_image_inputs(self) -> bool:
        return False


class TestChatByFunctionCalls(TestChat):
    """The same, with structured output by a forced call."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestChatByResponses(TestChat):
    """The same over /v1/responses."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}


class TestEmbeddings(EmbeddingsIntegrationTests):
    """Embeddings; `check_embedding_ctx_length` sends texts, and not the tokens of another model."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {**SERVER, "model": "scripted", "check_embedding_ctx_length": False}
