"""`python -m ssd_client`."""

from .cli import program

program()
