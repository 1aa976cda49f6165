"""Broken files: each is served as PEFT serves it, or refused by name, and harms no other backend."""
