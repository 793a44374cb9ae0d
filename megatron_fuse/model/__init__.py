"""The target model: its architecture from a Hugging Face config, the GPTModel that trains it, and its
weights both ways.
"""
