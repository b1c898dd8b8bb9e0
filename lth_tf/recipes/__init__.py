"""Recipes: where masks come from, and when. One file each, and no other module names them."""

from lth_tf.recipes import imp, one_shot, sparse
from lth_tf.recipes.record import RECIPES, Levels, Recipe

RECIPES.register("imp")(imp.IMP)
RECIPES.register("one_shot")(one_shot.ONE_SHOT)
RECIPES.register("sparse")(sparse.SPARSE)

__all__ = ["RECIPES", "Levels", "Recipe"]
