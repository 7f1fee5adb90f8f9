"""Files, tables, devices and ranks, child processes, progress; knows nothing of prompts, models or runs."""
