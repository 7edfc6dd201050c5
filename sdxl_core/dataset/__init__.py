"""Collections on disk: listing pictures, reading tags, picking subsets, merging into metadata JSON."""
