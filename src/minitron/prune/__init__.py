"""Structured pruning: importance scores, a plan of what stays, and the cut."""
