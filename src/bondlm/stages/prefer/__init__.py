"""Collect a person's preferences: pairs of answers to choose from, the file of choices, and a local page."""
