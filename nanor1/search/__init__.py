"""Inference-time scaling: votes, beams over steps and over tokens, thinking longer."""
