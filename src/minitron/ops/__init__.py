"""Pure tensor functions. They know shapes and dtypes, and nothing of models, files or tokenizers."""
