"""Tag queries in the language booru users write, over a catalog.

grammar.py reads a query into the expressions of expressions.py; select.py finds the records, by a scan of the catalog
or through the index of index.py; explain.py counts every term.
"""
