"""From texts to tokens, as lm-evaluation-harness makes them; without torch, for every kind that tokenises."""
