"""How fast models are, and the shapes that they are made of: measured in turn, on this machine."""
