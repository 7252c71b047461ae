"""Checks any OpenAI-compatible endpoint: streams, errors and endings. `make conformance URL=… [KEY=…] [MODEL=…]`."""
