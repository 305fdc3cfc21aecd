"""`python -m lmgraph` is `lmgraph`."""

from lmgraph.cli import main

main()
