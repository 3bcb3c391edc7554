"""Accuracy with its interval, methods compared, evaluations paired, the picture."""
