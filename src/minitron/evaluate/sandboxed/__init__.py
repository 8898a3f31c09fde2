"""What runs inside the sandbox, started by `main.py`. It imports the standard library alone."""
