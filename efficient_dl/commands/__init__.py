"""The commands of `edl`, one file each; efficient_dl/cli.py puts them together."""
