"""Experiments: variants of one recipe over several seeds, measured side by side, reported with error bars.

Nothing is imported here: fork_server.py starts as a program of its own, and must not bring the rest.
"""
