"""`python -m minitron`."""

from .cli import main

main()
