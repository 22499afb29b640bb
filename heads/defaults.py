"""The model that is served by default. It is apart from the registry, so that every command may import it."""

DEFAULT_MODEL = "smollm2-135m-instruct"
