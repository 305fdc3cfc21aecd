"""The gateway: one OpenAI-compatible endpoint over a graph. `wire` is the format (pure), `app` the server."""
