"""RefineDet on the command line: train, detect, evaluate and ship detectors."""

__version__ = "0.1.0"
