"""Mixture-of-experts: how many bits each expert gets."""
