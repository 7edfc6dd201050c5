"""Tags and captions of a folder or a catalog into one metadata JSON, byte-identical to what sd-scripts writes.

plan.py cuts the pictures into shards; shards.py turns one shard into a fragment of the JSON, from text files
(folder.py) or from a catalog (records.py); join.py streams the fragments into place. Fragments are named by their
content's digest, so a second run over what has not changed reads none of it again.
"""
