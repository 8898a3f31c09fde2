"""What the `engine` of `generate` and of a server can be."""

ENGINES = ("auto", "cuda", "off")
"""auto: the fastest engine that runs the model. cuda: that for GPUs, on whichever device the model is. off:
transformers."""
