"""Keys and values of prompts that were prefilled before: in memory, and on the disk that a machine's workers share."""
