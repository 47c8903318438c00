"""What the user hands over, and its safe evaluation."""
