"""Evaluation: scores of texts and tasks, one model or several side by side."""
