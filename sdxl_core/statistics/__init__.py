"""What a set of pictures is made of: tags, sizes, ratings, lengths in tokens, and what is missing."""
