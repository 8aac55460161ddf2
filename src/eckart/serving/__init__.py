"""Compressed folders in serving engines that build their own layers."""
