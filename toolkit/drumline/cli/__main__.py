"""`python -m drumline.cli`: the same as the command `drumline`."""

from drumline.cli import main

main()
