"""Tuning: a search for the options that a model learns best with."""
