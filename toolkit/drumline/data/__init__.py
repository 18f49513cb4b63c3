"""From files to prepared rows: tokenised once, packed, fingerprinted, memory-mapped."""
