"""Models in the form of Hugging Face's transformers: read and written, each through the one decoder."""
