"""What is served where nobody says what. Apart from the registry, so that every command may import it."""

DEFAULT_MODEL = "smollm2-135m-instruct"
