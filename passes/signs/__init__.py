"""Changes of queries and keys that leave every attention as it is, and make the keys easier to quantise."""
