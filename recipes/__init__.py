"""Recipes that run as they stand; `compress recipes ls` lists them."""
