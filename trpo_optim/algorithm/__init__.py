"""The algorithms of the papers: pure functions of vectors and numbers."""
