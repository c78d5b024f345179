"""The terminal: the only floor that knows Typer and Rich."""
