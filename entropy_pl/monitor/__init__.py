"""What the adapters of all trainers share: the step monitor, the probing of one run, discovery, prompts and loggers."""
