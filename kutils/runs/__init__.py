"""Recipes, run folders and how runs are started; imports no torch."""
