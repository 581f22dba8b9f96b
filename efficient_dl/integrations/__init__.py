"""Adapters to the engines that users already run; no algorithms."""
