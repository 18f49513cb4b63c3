"""`python -m toolkit.cli`: the same as the command `drumline`."""

from toolkit.cli import main

main()
