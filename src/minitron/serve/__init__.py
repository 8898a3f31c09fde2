"""Serving: OpenAI's protocol over the engine, and rails in front of it."""
