"""Training: one loop, its schedule, its log; the loss is a parameter."""
