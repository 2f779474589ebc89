"""Prompts: datasets by name, and the datamodule that keeps evaluation and update prompts apart."""
