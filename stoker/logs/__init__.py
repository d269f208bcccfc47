"""The log: one line an event, for people on a terminal and as JSON elsewhere, without prompts, texts and passwords."""
