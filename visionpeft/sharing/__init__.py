"""Files and names that others understand: the Hub, model cards, HF peft."""
