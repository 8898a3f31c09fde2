"""Task definitions that lm-evaluation-harness has not."""
