"""The detector itself: tensors in, tensors out; no files, no terminal, no data sets."""
