"""Serving a model: the OpenAI-compatible API and the page. The extra ``serve`` holds what it needs."""
