"""Subsets of a catalog: a manifest that says where each picture is, or copies and links of the files themselves."""
