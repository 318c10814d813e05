"""What the accuracy bench reads, measures and makes. Not part of the package."""
