"""Arrays in, numbers out: detection metrics."""
