"""Serving: OpenAI's protocol over the engine (`schema`, `scheduler`, `app`), and rails in front of it."""
