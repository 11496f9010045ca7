"""A PPLLaVA small enough to live in a repository, and the world it was trained on."""
