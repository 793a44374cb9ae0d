"""Progressive fusion of several source language models into one target (ProFuser, arXiv 2408.04998) on
Megatron-core.
"""
