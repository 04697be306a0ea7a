"""Caches that keep some tokens of each head: which ones, what attention sees of them, what they hold."""
