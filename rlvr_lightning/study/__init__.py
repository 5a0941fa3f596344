"""Runs over settings and seeds, what they show, and the page that holds the papers to it."""
