"""Files that anybody may have written: each is served as PEFT serves it, or refused with its name, and harms nobody."""
