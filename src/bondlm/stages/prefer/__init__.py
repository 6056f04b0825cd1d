"""Preferences of a person: pairs of answers to choose from, the file of choices, and a page on this machine."""
