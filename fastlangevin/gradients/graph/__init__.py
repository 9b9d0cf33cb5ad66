"""An energy recorded as a graph of operators."""
