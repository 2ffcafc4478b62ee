"""Every test, nbval included, runs lessons as tools/notebooks.py does."""

from tools.notebooks import set_environment

set_environment()  # before anything imports torch
