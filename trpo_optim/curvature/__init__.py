"""The local model of a closure: its gradient and its Fisher-vector products."""
