"""The verbs: each function does one command's work and yields progress instead of printing."""
