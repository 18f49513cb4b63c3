"""Prepares rows from data sources: tokenised once, packed, fingerprinted, memory-mapped."""
