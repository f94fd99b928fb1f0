"""Files into an index, again and again: what is new, what moved, what cannot be read, and what is left to do.

Ledger   beside the index: what was done with each file, and what its content is known to lack
Sources  the files that an index has pages of, by any spelling of their paths
Job      one run over some files
folders  what is in the folders that are watched
"""
