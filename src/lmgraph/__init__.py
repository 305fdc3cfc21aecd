"""lmgraph: many language models as one. See docs/architecture.md for the rooms."""

__version__ = "0.1.0"
