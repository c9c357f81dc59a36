"""A server for a base model and its adapters, with the API of OpenAI's chat completions."""
