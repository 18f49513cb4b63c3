"""Builds the recipe's model so that every split starts from the same weights.

build (on the meta device) -> edits -> materialise block by block.
"""

from drumline.train.models.blocks import BATCHNORM, has_batchnorm, named_blocks
from drumline.train.models.builder import ModelBuilder
from drumline.train.models.seeds import derived_seed

__all__ = ["BATCHNORM", "ModelBuilder", "derived_seed", "has_batchnorm", "named_blocks"]
